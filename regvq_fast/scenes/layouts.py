"""Components of scenes: photographs, random layouts, and captions that state both."""

import itertools
import math
import random
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_IMAGE_SIZE = 16


class Photograph(NamedTuple):
    """A class of the scenes: its name, its phrase in captions, and its file in scikit-image's data folder."""

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
"""The photographs that scenes are composed of; each is a class."""
CLASSES = tuple(photograph.name for photograph in PHOTOGRAPHS)
"""Class names; a class id in a semantic map is an index into this tuple."""


class Region(NamedTuple):
    """Extent of one crop: a rectangle in scene pixels and, for other shapes, the fraction it covers of each pixel."""

    top: int
    left: int
    bottom: int
    right: int
    coverage: NDArray[np.float32] | None = None  # (bottom - top, right - left), 0..1; None: all of it


class Layout(NamedTuple):
    """A caption with a slot for each region, and the regions, sampled at random and painted in this order."""

    caption: str
    regions: Callable[[int, random.Random], list[Region]]


def _strips(count: int, vertical: bool) -> Callable[[int, random.Random], list[Region]]:
    def regions(size: int, rng: random.Random) -> list[Region]:
        shift = 0.3 / count  # each cut moves by up to this fraction of the scene
        cuts = [0, *(round(size * (k / count + rng.uniform(-shift, shift))) for k in range(1, count)), size]
        return [Region(0, a, size, b) if vertical else Region(a, 0, b, size) for a, b in itertools.pairwise(cuts)]

    return regions


def _quarters(size: int, rng: random.Random) -> list[Region]:
    y, x = (round(size * rng.uniform(0.35, 0.65)) for _ in range(2))
    return [Region(0, 0, y, x), Region(0, x, y, size), Region(y, 0, size, x), Region(y, x, size, size)]


def _inset(circle: bool) -> Callable[[int, random.Random], list[Region]]:
    def regions(size: int, rng: random.Random) -> list[Region]:
        side = round(size * rng.uniform(0.4, 0.65))
        # Always over the scene's centre and never at its edge, so that the caption determines which class is where.
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
"""Layouts by name."""


def region_map(regions: list[Region], size: int) -> NDArray[np.uint8]:
    """Return the number of the region that each pixel shows: the last one that covers at least half of it."""
    numbers = np.empty((size, size), dtype=np.uint8)
    for number, region in enumerate(regions):
        area = numbers[region.top : region.bottom, region.left : region.right]
        area[... if region.coverage is None else region.coverage >= 0.5] = number
    return numbers


class ParsedCaption(NamedTuple):
    """Layout and classes that a caption states."""

    layout: str
    """A key of LAYOUTS."""
    classes: tuple[int, ...]
    """Indices into CLASSES, in the order of the layout's regions."""


def parse_caption(caption: str) -> ParsedCaption:
    """Return layout and classes of a scene's caption.

    Raises:
        ValueError: the caption is no sentence of LAYOUTS with phrases of PHOTOGRAPHS, each at most once.
    """
    for name, pattern in _caption_patterns().items():
        if found := pattern.fullmatch(caption):
            phrases = [found[f"region{k}"] for k in range(pattern.groups)]
            if len(set(phrases)) < len(phrases):
                raise ValueError(f"{caption!r} names a photograph twice: name a different one in each region")
            ids = {photograph.phrase: label for label, photograph in enumerate(PHOTOGRAPHS)}
            return ParsedCaption(name, tuple(ids[phrase] for phrase in phrases))
    raise ValueError(
        f"{caption!r} is not a caption of the scenes: write one like 'a cat on the left and bricks on the right', "
        "with a sentence of LAYOUTS and phrases of PHOTOGRAPHS (regvq_fast.scenes)"
    )


@cache
def _caption_patterns() -> dict[str, re.Pattern[str]]:
    phrases = "|".join(re.escape(photograph.phrase) for photograph in PHOTOGRAPHS)
    slots = [f"(?P<region{k}>{phrases})" for k in range(4)]  # no layout has more; format ignores those it lacks
    return {name: re.compile(layout.caption.format(*slots)) for name, layout in LAYOUTS.items()}
