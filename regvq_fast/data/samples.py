"""Samples of a data set, which is a pure function of a global sample index.

A training set accepts *any* index g >= 0: epoch ``g // n``, position ``g % n`` in that epoch's shuffled order, and
augmentation from a generator seeded by (seed, g). So the training stream is endless, can be resumed at any g, and does
not depend on the number of workers, the batch size or the number of processes. A validation set has a fixed order and
no augmentation, and is finite: an index outside ``range(len(dataset))`` raises IndexError.
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
    """One image. Images stay uint8 until they are on the training device."""

    image: Tensor
    """(3, H, W) uint8, RGB."""
    segmentation: NotRequired[Tensor]
    """(H, W) uint8, class id of each pixel."""
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
    """Return the generator of sample ``index``; equal arguments give equal numbers in every process and run.

    ``stream`` names the data set, so that data sets with the same seed get different numbers.
    """
    return random.Random(f"{stream}/{seed}/{index}")


def shuffled_position(index: int, count: int, seed: int) -> int:
    """Return the position among ``count`` items of sample ``index`` >= 0 in an endless stream, shuffled in each epoch.

    The ``count`` indices from a multiple of ``count`` on visit every item once.
    """
    epoch, position = divmod(index, count)
    return int(_permutation(count, seed, epoch)[position])


@lru_cache(maxsize=4)  # two for prefetching across epochs, and two for a second data set
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(sample_random("order", seed, epoch).getrandbits(128)).permutation(count)
