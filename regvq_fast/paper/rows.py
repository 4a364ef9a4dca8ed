"""Rows, experiments and recipes: the forms of what ``regvq paper`` knows."""

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
    """As in the paper."""
    key: str
    """Names its folder."""
    flags: tuple[str, ...]
    """Flags of regvq train vq."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """By data set."""
    x: float | None = None
    """Position on the axis of a sweep."""
    series: str = ""
    """Curve of a sweep that it belongs to."""


class Recipe(NamedTuple):
    """Flags that make a scale out of the presets."""

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
    """True if priors have no condition, whatever the data has."""


@dataclass(frozen=True)
class Experiment:
    """Rows that are compared."""

    title: str
    rows: Mapping[Scale, tuple[Row, ...]]
    with_prior: bool
    """True if generated images are evaluated, too."""
    axis: str = ""
    """Label of a sweep's x-axis."""
    own_recipe: Callable[[Scale, bool], Recipe] | None = None
    """Settings on any data, by scale and whether it is the embedded scenes; None: those of the preset."""
    with_costs: bool = False
    """True if bits, parameters, time and memory of a step and the prior's loss are compared, too."""
    shown: float | None = None
    """Position on the axis whose rows are in the pictures; None: all rows."""
