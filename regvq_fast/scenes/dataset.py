"""Scenes: an endless, labelled data set composed on the fly from real photographs, without a download.

The classes are sixteen photographs in scikit-image's wheel. A scene fills the regions of a random layout with random
crops of distinct classes. It has a semantic map, and a caption that states layout and classes. Training crops come from
the left two thirds of each photograph, validation crops from the rest.
"""

import importlib.util
import math
import os
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.image_dataset import FieldCounts, ImageDataset, Provenance, SplitSettings, TrainedPrior
from regvq_fast.data.samples import Sample, Split, check_index, check_split, sample_random
from regvq_fast.data.transforms import Box, resize_box
from regvq_fast.scenes.evaluation import evaluate_samples
from regvq_fast.scenes.layouts import CLASSES, LAYOUTS, MIN_IMAGE_SIZE, PHOTOGRAPHS, region_map

WHOLE_PROBABILITY = 0.25
"""Fraction of the scenes with the layout "whole"; the other layouts are equally likely."""

_TRAIN_FRACTION = 2 / 3
"""Fraction of each photograph's columns."""
TRAIN_LENGTH = 8192
"""Scenes that count as an epoch."""
_CLOSEST = 0.25
"""The closest view: a crop that fills the scene spans this fraction of the photograph's size.

The fraction is of the whole photograph, not of the split's columns, so that both splits show textures at equal scales.
"""
_COMPOSED = tuple(name for name in LAYOUTS if name != "whole")


class ScenesDataset(ImageDataset):
    """Composed scenes with semantic maps and captions (see the module's docstring).

    Args:
        split: "train": each index >= 0 is another scene. "val": ``length`` scenes, from columns of the photographs
            that are not used in training.
        image_size: height and width in pixels, at least 16. Photographs are small: 256 and above enlarges some crops.
        length: result of ``len``. None: 8192 for training, where it only defines an epoch, and 256 for validation.
        seed: a scene is a function of (seed, split, index) only.

    A sample: ``image`` (3, image_size, image_size) uint8; ``segmentation`` (image_size, image_size) uint8, indices into
    CLASSES; ``caption`` str, one of the sentences of LAYOUTS.

    Raises:
        ValueError: an unknown split, an image size below 16, a length below 1.
        FileNotFoundError: the installed scikit-image lacks a photograph.
    """

    title = "embedded scenes"
    num_classes = len(CLASSES)
    class_names = CLASSES
    vocabulary = " ".join(
        [layout.caption.format("", "", "", "") for layout in LAYOUTS.values()] + [photo.phrase for photo in PHOTOGRAPHS]
    )

    def __init__(self, split: Split = "train", image_size: int = 64, length: int | None = None, seed: int = 0) -> None:
        check_split(split)
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"scenes need an image size of at least {MIN_IMAGE_SIZE}, got {image_size}")
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.split: Split = split
        self.image_size = image_size
        self.length = length or (TRAIN_LENGTH if split == "train" else 256)
        self.seed = seed
        _load_photographs(split)  # now, so that a missing file is an error here, and forked workers share the pixels

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is None

    @classmethod
    def open(cls, data: str | os.PathLike[str] | None, settings: SplitSettings) -> Self:
        return cls(settings.split, settings.image_size, settings.length, settings.seed)

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> FieldCounts:
        return FieldCounts(TRAIN_LENGTH, {"caption": TRAIN_LENGTH, "segmentation": TRAIN_LENGTH})

    @classmethod
    def evaluate_samples(cls, prior: TrainedPrior) -> Mapping[str, float]:
        if prior.condition not in ("segmentation", "caption"):
            return {}
        size, seed = prior.image_size, prior.seed
        return evaluate_samples(prior, cls("train", size, seed=seed), cls("val", size, prior.val_images, seed))

    def provenance(self) -> Provenance:
        data = f"embedded scenes, seed {self.seed}"
        return Provenance(data, crop="none", resize="none: composed at this size", variant=f"seed {self.seed}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Compose scene ``index``; IndexError for a negative one and, in validation, beyond the last."""
        check_index(index, self.length, self.split)
        rng = sample_random(f"scenes-{self.split}", self.seed, index)
        layout = LAYOUTS["whole" if rng.random() < WHOLE_PROBABILITY else rng.choice(_COMPOSED)]
        regions = layout.regions(self.image_size, rng)
        classes = rng.sample(range(len(CLASSES)), len(regions))

        photographs = _load_photographs(self.split)
        image = np.empty((self.image_size, self.image_size, 3), dtype=np.uint8)
        segmentation = np.array(classes, dtype=np.uint8)[region_map(regions, self.image_size)]
        for region, label in zip(regions, classes, strict=True):
            area = np.s_[region.top : region.bottom, region.left : region.right]
            height, width = region.bottom - region.top, region.right - region.left
            crop = photographs[label].random_crop(height, width, self.image_size, rng)
            if region.coverage is None:
                image[area] = crop
            else:
                coverage = region.coverage[..., None]
                image[area] = np.rint(image[area] * (1 - coverage) + crop * coverage)

        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segmentation=torch.from_numpy(segmentation),
            caption=layout.caption.format(*(PHOTOGRAPHS[label].phrase for label in classes)),
        )


class _Pyramid:
    """One split's columns of a photograph, with halved copies, so that crops are resized from few pixels."""

    def __init__(self, photograph: Image.Image, split: Split) -> None:
        cut = round(photograph.width * _TRAIN_FRACTION)
        left, right = (0, cut) if split == "train" else (cut, photograph.width)
        # A copy without the other split's pixels: resizing filters read beyond the edge of a box.
        self.levels = [photograph.crop((left, 0, right, photograph.height))]
        while min(self.levels[-1].size) >= 2 * MIN_IMAGE_SIZE:
            self.levels.append(self.levels[-1].reduce(2))
        self.closest = _CLOSEST * math.sqrt(photograph.width * photograph.height)

    def random_crop(self, height: int, width: int, image_size: int, rng: random.Random) -> NDArray[np.uint8]:
        """Return a random crop, resized to (height, width, 3); the zoom is log-uniform between its limits."""
        full_width, full_height = self.levels[0].size
        farthest = min(full_width / width, full_height / height)  # photograph pixels per scene pixel
        closest = min(self.closest / image_size, farthest)
        zoom = math.exp(rng.uniform(math.log(closest), math.log(farthest)))
        left, top = rng.uniform(0, full_width - zoom * width), rng.uniform(0, full_height - zoom * height)

        level = min(max(int(math.log2(zoom)), 0), len(self.levels) - 1)
        image = self.levels[level]
        left, top, zoom = left / 2**level, top / 2**level, zoom / 2**level
        right, bottom = min(left + zoom * width, image.width), min(top + zoom * height, image.height)
        crop = np.asarray(resize_box(image, Box(left, top, right, bottom), width, height))
        return crop[:, ::-1] if rng.random() < 0.5 else crop


@cache
def _load_photographs(split: Split) -> tuple[_Pyramid, ...]:
    return tuple(_Pyramid(image, split) for image in _open_photographs())


def _open_photographs() -> list[Image.Image]:
    spec = importlib.util.find_spec("skimage")  # not imported: only its files are needed
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the scenes need scikit-image's photographs: pip install scikit-image")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    missing = [photograph.file for photograph in PHOTOGRAPHS if not (folder / photograph.file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which the scenes are made of; "
            "reinstall scikit-image from its wheel (pip install --force-reinstall scikit-image), or train on a folder"
        )
    images = []
    for photograph in PHOTOGRAPHS:
        with Image.open(folder / photograph.file) as image:
            images.append(image.convert("RGB"))
    return images
