"""Rows, experiments and recipes of ``regvq paper``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from regvq_fast.config import PresetName

Scale = Literal["tiny", "full"]


class Published(NamedTuple):
    """A row of the paper on one data set."""

    fid_r: float
    """FID[R]: of reconstructions."""
    psnr: float
    """PSNR[R], dB."""
    fid_g: float
    """FID[G]: of generated images."""


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenizer of an experiment."""

    name: str
    """Name, as in the paper."""
    key: str
    """Name of its folder."""
    flags: tuple[str, ...]
    """Flags of regvq train vq."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Published numbers by data set."""
    x: float | None = None
    """Position on the axis of a sweep."""
    series: str = ""
    """Curve of a sweep."""


class Recipe(NamedTuple):
    """Flags of the commands at a scale, on top of a preset."""

    preset: PresetName
    """Preset of the commands."""
    tokenizer: tuple[str, ...]
    """Flags of `regvq train vq`."""
    cache: tuple[str, ...]
    """Flags of `regvq tokens`."""
    prior: tuple[str, ...]
    """Flags of the prior's training."""
    val_images: int | None
    """Validation images of all metrics; None: the whole split."""
    unconditional: bool = False
    """True if priors ignore the conditions of the data."""


@dataclass(frozen=True)
class Experiment:
    """Rows to compare."""

    title: str
    rows: Mapping[Scale, tuple[Row, ...]]
    with_prior: bool
    """True if generated images are evaluated, too."""
    axis: str = ""
    """Label of a sweep's x-axis."""
    own_recipe: Callable[[Scale, bool], Recipe] | None = None
    """Settings for any data, given the scale and whether the data are the embedded scenes; None: the preset's."""
    with_costs: bool = False
    """True if bits, parameters, time and memory of a step and the prior's loss are compared, too."""
    shown: float | None = None
    """Position on the axis of the rows in the figures; None: all rows."""
