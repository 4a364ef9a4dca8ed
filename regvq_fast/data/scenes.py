"""Scenes: an endless, labelled data set composed on the fly from real photographs, with nothing to download.

Sixteen photographs that scikit-image's wheel carries are the classes. A scene fills the regions of a random layout
with random crops of distinct classes, and comes with its semantic map and a caption that states layout and classes.
Each photograph is cut once, vertically: training crops come from its left two thirds, validation crops from the rest.
"""

import importlib.util
import itertools
import math
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from regvq_fast.data.samples import Sample, Split, check_index, check_split, sample_random
from regvq_fast.data.transforms import Box, resize_box

MIN_IMAGE_SIZE = 16
WHOLE_PROBABILITY = 0.25
"""Share of the scenes that are one crop of one photograph; the other layouts share the rest equally."""

_TRAIN_SHARE = 2 / 3
"""Of each photograph's columns."""
_CLOSEST = 0.25
"""The closest view: a crop that would span this share of the photograph's size if it filled the whole scene.

It is a share of the whole photograph, not of the split's part, so that both splits show textures at like scales.
"""


class Photograph(NamedTuple):
    """A class of the scenes: its name, how a caption speaks of it, and the file in scikit-image's data folder."""

    name: str
    phrase: str
    file: str


PHOTOGRAPHS = (
    Photograph("astronaut", "an astronaut", "astronaut.png"),
    Photograph("bricks", "bricks", "brick.png"),
    Photograph("cameraman", "a cameraman", "camera.png"),
    Photograph("cat", "a cat", "chelsea.png"),
    Photograph("coffee", "coffee", "coffee.png"),
    Photograph("coins", "coins", "coins.png"),
    Photograph("galaxies", "galaxies", "hubble_deep_field.jpg"),
    Photograph("grass", "grass", "grass.png"),
    Photograph("gravel", "gravel", "gravel.png"),
    Photograph("handwriting", "handwriting", "text.png"),
    Photograph("moon", "the moon", "moon.png"),
    Photograph("motorcycle", "a motorcycle", "motorcycle_left.png"),
    Photograph("page", "a printed page", "page.png"),
    Photograph("retina", "a retina", "retina.jpg"),
    Photograph("rocket", "a rocket", "rocket.jpg"),
    Photograph("tissue", "tissue", "ihc.png"),
)
CLASSES = tuple(photograph.name for photograph in PHOTOGRAPHS)
"""Class names; a class id in a semantic map is an index into this tuple."""


class Region(NamedTuple):
    """Where one crop goes: a rectangle in scene pixels and, for other shapes, the share it takes of each pixel."""

    top: int
    left: int
    bottom: int
    right: int
    coverage: NDArray[np.float32] | None = None  # (bottom - top, right - left), 0..1; None: all of it


class Layout(NamedTuple):
    """A caption with a slot for each region, and the regions, drawn at random and painted in this order."""

    caption: str
    regions: Callable[[int, random.Random], list[Region]]


def _strips(count: int, vertical: bool) -> Callable[[int, random.Random], list[Region]]:
    def regions(size: int, rng: random.Random) -> list[Region]:
        shift = 0.3 / count  # each cut moves by up to this share of the scene
        cuts = [0, *(round(size * (k / count + rng.uniform(-shift, shift))) for k in range(1, count)), size]
        return [Region(0, a, size, b) if vertical else Region(a, 0, b, size) for a, b in itertools.pairwise(cuts)]

    return regions


def _quarters(size: int, rng: random.Random) -> list[Region]:
    y, x = (round(size * rng.uniform(0.35, 0.65)) for _ in range(2))
    return [Region(0, 0, y, x), Region(0, x, y, size), Region(y, 0, size, x), Region(y, x, size, size)]


def _inset(circle: bool) -> Callable[[int, random.Random], list[Region]]:
    def regions(size: int, rng: random.Random) -> list[Region]:
        side = round(size * rng.uniform(0.4, 0.65))
        # Always over the scene's centre, and never at its edge: what lies where follows from the caption.
        margin = max(size // 16, 1)
        inner = margin + (math.ceil(side * (1 - math.sqrt(0.5)) / 2) if circle else 0)  # to the square in the circle
        low, high = max(margin, size // 2 - side + inner), min(size // 2 - inner, size - side - margin)
        top, left = rng.randint(low, high), rng.randint(low, high)
        coverage = None
        if circle:
            offset = np.arange(side, dtype=np.float32) - (side - 1) / 2
            coverage = (side / 2 - np.hypot(offset[:, None], offset) + 0.5).clip(0, 1)
        return [Region(0, 0, size, size), Region(top, left, top + side, left + side, coverage)]

    return regions


def _diagonal(falling: bool) -> Callable[[int, random.Random], list[Region]]:
    def regions(size: int, rng: random.Random) -> list[Region]:
        shift = size * rng.uniform(-0.25, 0.25)
        across = np.arange(size, dtype=np.float32)
        across = across if falling else size - 1 - across
        distance = (np.arange(size, dtype=np.float32)[:, None] + across - (size - 1) - shift) / math.sqrt(2)
        return [Region(0, 0, size, size), Region(0, 0, size, size, (distance + 0.5).clip(0, 1))]

    return regions


def _whole(size: int, rng: random.Random) -> list[Region]:
    return [Region(0, 0, size, size)]


LAYOUTS: dict[str, Layout] = {
    "whole": Layout("a picture of {0}", _whole),
    "left-right": Layout("{0} on the left and {1} on the right", _strips(2, vertical=True)),
    "top-bottom": Layout("{0} at the top and {1} at the bottom", _strips(2, vertical=False)),
    "columns": Layout("{0} on the left, {1} in the middle and {2} on the right", _strips(3, vertical=True)),
    "rows": Layout("{0} at the top, {1} in the middle and {2} at the bottom", _strips(3, vertical=False)),
    "quarters": Layout(
        "{0} at the top left, {1} at the top right, {2} at the bottom left and {3} at the bottom right", _quarters
    ),
    "square": Layout("{1} in a square on {0}", _inset(circle=False)),
    "circle": Layout("{1} in a circle on {0}", _inset(circle=True)),
    "diagonal-falling": Layout("{0} in the upper left half and {1} in the lower right half", _diagonal(falling=True)),
    "diagonal-rising": Layout("{0} in the upper right half and {1} in the lower left half", _diagonal(falling=False)),
}
_COMPOSED = tuple(name for name in LAYOUTS if name != "whole")


def region_map(regions: list[Region], size: int) -> NDArray[np.uint8]:
    """Which of the regions each pixel of a scene shows, by number: the last one that takes half of it or more."""
    numbers = np.empty((size, size), dtype=np.uint8)
    for number, region in enumerate(regions):
        place = numbers[region.top : region.bottom, region.left : region.right]
        place[... if region.coverage is None else region.coverage >= 0.5] = number
    return numbers


class ParsedCaption(NamedTuple):
    """What a caption says."""

    layout: str
    """A key of LAYOUTS."""
    classes: tuple[int, ...]
    """Indices into CLASSES, in the order of the layout's regions."""


def parse_caption(caption: str) -> ParsedCaption:
    """Layout and classes of a scene's caption.

    Raises:
        ValueError: not such a caption: no sentence of LAYOUTS with phrases of PHOTOGRAPHS, each at most once.
    """
    for name, pattern in _caption_patterns().items():
        if found := pattern.fullmatch(caption):
            phrases = [found[f"region{k}"] for k in range(pattern.groups)]
            if len(set(phrases)) < len(phrases):
                raise ValueError(f"{caption!r} names a photograph twice, which no scene does: name different ones")
            ids = {photograph.phrase: label for label, photograph in enumerate(PHOTOGRAPHS)}
            return ParsedCaption(name, tuple(ids[phrase] for phrase in phrases))
    raise ValueError(
        f"{caption!r} is no caption of the scenes: write one like 'a cat on the left and bricks on the right', "
        "with a sentence of LAYOUTS and phrases of PHOTOGRAPHS (regvq_fast.data.scenes)"
    )


@cache
def _caption_patterns() -> dict[str, re.Pattern[str]]:
    phrases = "|".join(re.escape(photograph.phrase) for photograph in PHOTOGRAPHS)
    slots = [f"(?P<region{k}>{phrases})" for k in range(4)]  # no layout has more; format ignores those it lacks
    return {name: re.compile(layout.caption.format(*slots)) for name, layout in LAYOUTS.items()}


class ScenesDataset(Dataset[Sample]):
    """Composed scenes with semantic maps and captions (see the module's text).

    Args:
        split: "train": any index >= 0 is a scene of its own, nothing repeats. "val": ``length`` scenes, cut from the
            parts of the photographs that training never sees.
        image_size: height and width in pixels, at least 16. Photographs are small: 256 and above enlarges some crops.
        length: what ``len`` says. None: 8192 for training (an "epoch" in name only), 256 for validation.
        seed: scenes are a function of (seed, split, index) and of nothing else.

    A sample: ``image`` (3, image_size, image_size) uint8; ``segmentation`` (image_size, image_size) uint8, indices into
    CLASSES; ``caption`` str, one of the sentences of LAYOUTS.

    Raises:
        ValueError: an unknown split, an image size below 16, a length below 1.
        FileNotFoundError: the installed scikit-image lacks a photograph.
    """

    label = "embedded scenes"
    """What the pictures are, for people."""
    num_classes = len(CLASSES)
    """Ids of the semantic maps."""

    def __init__(self, split: Split = "train", image_size: int = 64, length: int | None = None, seed: int = 0) -> None:
        check_split(split)
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"scenes need an image size of at least {MIN_IMAGE_SIZE}, got {image_size}")
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.split: Split = split
        self.image_size = image_size
        self.length = length or (8192 if split == "train" else 256)
        self.seed = seed
        _load_photographs(split)  # here, so that a missing file shows at once and forked workers share the pixels

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
            place = np.s_[region.top : region.bottom, region.left : region.right]
            height, width = region.bottom - region.top, region.right - region.left
            crop = photographs[label].random_crop(height, width, self.image_size, rng)
            if region.coverage is None:
                image[place] = crop
            else:
                share = region.coverage[..., None]
                image[place] = np.rint(image[place] * (1 - share) + crop * share)

        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segmentation=torch.from_numpy(segmentation),
            caption=layout.caption.format(*(PHOTOGRAPHS[label].phrase for label in classes)),
        )


class _Pyramid:
    """One split's part of a photograph, with halved copies so that a crop of any scale is resized from few pixels."""

    def __init__(self, photograph: Image.Image, split: Split) -> None:
        cut = round(photograph.width * _TRAIN_SHARE)
        left, right = (0, cut) if split == "train" else (cut, photograph.width)
        # A copy: resizing filters read beyond a box's edge, so the other split's pixels must not be there.
        self.levels = [photograph.crop((left, 0, right, photograph.height))]
        while min(self.levels[-1].size) >= 2 * MIN_IMAGE_SIZE:
            self.levels.append(self.levels[-1].reduce(2))
        self.closest = _CLOSEST * math.sqrt(photograph.width * photograph.height)

    def random_crop(self, height: int, width: int, image_size: int, rng: random.Random) -> NDArray[np.uint8]:
        """A random crop resized to (height, width, 3), zoom log-uniform from the closest view to all that fits."""
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
    spec = importlib.util.find_spec("skimage")  # located, not imported: only its files are wanted
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the scenes are made of scikit-image's photographs: pip install scikit-image")
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
