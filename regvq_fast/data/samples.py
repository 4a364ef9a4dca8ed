"""Samples of a data set, which is a pure function from a global sample index to a sample.

A training set takes *any* index g >= 0: epoch ``g // n``, position ``g % n`` in that epoch's own shuffled order, and
augmentation sampled from a generator seeded by (seed, g). So the training stream never ends, can be resumed at any g,
and does not depend on the number of workers, the batch size or the number of processes that share it. A validation
set has a fixed order, no augmentation, and ends: an index outside ``range(len(dataset))`` raises IndexError.
"""

import random
from functools import lru_cache
from typing import Literal, NotRequired, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["train", "val"]
"""Part of a data set: endless and shuffled, or each sample once, in order."""
Crop = Literal["random-resized", "center"]
"""Crop of training images: at a random position and scale, or the largest central square."""
Field = Literal["caption", "label", "segmentation"]
"""Optional field of a sample."""
Part = Literal["image", "caption", "label", "segmentation"]
"""The image of a sample, or one of its fields."""


class Sample(TypedDict):
    """One image. Images stay uint8 until they are on the device that trains."""

    image: Tensor
    """(3, H, W) uint8, RGB."""
    segmentation: NotRequired[Tensor]
    """(H, W) uint8, a class id at each pixel."""
    caption: NotRequired[str]
    label: NotRequired[int]
    """Class of the whole image, an id into `ImageDataset.label_names`."""


class Batch(TypedDict):
    """Samples, stacked."""

    image: Tensor
    """(B, 3, H, W) uint8, RGB."""
    segmentation: NotRequired[Tensor]
    """(B, H, W) uint8."""
    caption: NotRequired[list[str]]
    label: NotRequired[Tensor]
    """(B,) int64."""


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is "train" or "val"."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {split!r}")


def check_index(index: int, length: int, split: Split) -> None:
    """Raise IndexError unless a data set of this split and length has a sample at ``index``."""
    if index < 0 or (split == "val" and index >= length):
        raise IndexError(f"sample {index} asked of a {split!r} split with {length} samples")


def sample_random(stream: str, seed: int, index: int) -> random.Random:
    """Return the generator of sample ``index``: equal arguments give equal numbers, in every process and run.

    ``stream`` names the data set, so that two data sets with one seed do not get the same numbers.
    """
    return random.Random(f"{stream}/{seed}/{index}")


def shuffled_position(index: int, count: int, seed: int) -> int:
    """Return the position of sample ``index`` >= 0 of an endless stream among ``count`` items, shuffled in each epoch.

    Any ``count`` indices from a multiple of ``count`` on visit every item exactly once.
    """
    epoch, position = divmod(index, count)
    return int(_permutation(count, seed, epoch)[position])


@lru_cache(maxsize=4)  # two for prefetching across the end of an epoch, and room for a second data set
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(sample_random("order", seed, epoch).getrandbits(128)).permutation(count)
