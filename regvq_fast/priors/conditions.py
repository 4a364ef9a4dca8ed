"""Conditions of images: semantic maps, captions, labels, or none. Every prior supports some of these kinds."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regvq_fast.data.samples import Field
from regvq_fast.image_grids import caption_tiles, color_map, legend_of

Condition = Literal["segmentation", "caption", "label", "none"]
"""Kind of condition: the field of a data set's samples that images are conditioned on, or "none"."""
Conditions = Tensor | Sequence[str]
"""Conditions of B images: maps (B, H, W) uint8, captions, labels (B,) int64; without a condition, a tensor (B, 0)."""
CONDITION_FLAGS: dict[Condition, str] = {"segmentation": "--map", "caption": "--text", "label": "--label"}
"""Flag of `regvq sample` that states a condition."""

_TEXT_SIZE = 192  # smallest width of a caption's tile in pixels


def fields_of(condition: Condition) -> tuple[Field, ...]:
    """Return the fields that samples must have."""
    return () if condition == "none" else (condition,)


def choose_condition(
    wanted: Condition | None, takes: Sequence[Condition], has: Collection[Field], source: str
) -> Condition:
    """Return the condition that a prior is trained with.

    Args:
        wanted: --condition; None: the first of `takes` that the data have, else "none".
        takes: kinds that the prior supports, by preference.
        has: fields of the data.
        source: of the images, for messages.

    Raises:
        ValueError: the prior does not support the kind, or the data lack it.
    """
    if wanted is None:
        return next((kind for kind in takes if kind in has), "none")
    if wanted not in takes:
        raise ValueError(f"--condition {wanted} is not for this prior: take one of {', '.join(takes)}")
    if wanted != "none" and wanted not in has:
        there = ", ".join(sorted(has)) or "no condition at all"
        raise ValueError(f"{source} has no {wanted}, only {there}: leave out --condition, or give data with a {wanted}")
    return wanted


def conditions_of(batch: Mapping[str, Any], condition: Condition) -> Any:
    """Return the conditions in a batch of images or tokens."""
    if condition == "none":
        return no_conditions(len(batch["tokens" if "tokens" in batch else "image"]))
    return batch[condition]


def no_conditions(count: int) -> Tensor:
    """Return the conditions of images of an unconditional prior: an int64 tensor (count, 0)."""
    return torch.empty(count, 0, dtype=torch.int64)


def take(conditions: Conditions, indices: Sequence[int]) -> Any:
    """Return some of the conditions."""
    return conditions[list(indices)] if isinstance(conditions, Tensor) else [conditions[k] for k in indices]


def label_ids(labels: Sequence[str | int] | Tensor, names: Sequence[str], source: str) -> Tensor:
    """Return labels as ids (B,) int64.

    Args:
        labels: names, in any case, or ids, also as text; or a tensor (B,) of ids.
        names: of the labels by id.
        source: of the labels, for messages.

    Raises:
        ValueError: an unknown name, or an id out of range.
    """
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    ids = {name.casefold(): k for k, name in enumerate(names)}
    found = []
    for label in labels:
        k = ids.get(label.strip().casefold()) if isinstance(label, str) else label
        if k is None and str(label).strip().isdecimal():
            k = int(label)
        if k is None:
            close = difflib.get_close_matches(str(label).casefold(), ids, n=3, cutoff=0.5) or list(ids)[:5]
            shown = ", ".join(repr(names[ids[name]]) for name in close)
            raise ValueError(f"{source} {label!r} is none of the prior's {len(names)} labels, such as {shown}")
        if not 0 <= k < len(names):
            raise ValueError(f"{source} {label} is out of range: the prior has {len(names)} labels, from 0 on")
        found.append(k)
    return torch.tensor(found, dtype=torch.int64)


def render(
    condition: Condition, conditions: Conditions, shape: tuple[int, int], names: Sequence[str] = ()
) -> tuple[list[Tensor], dict[int, str]]:
    """Render conditions for a grid of images.

    Args:
        condition: their kind.
        conditions: of B images.
        shape: height and width of an image in pixels.
        names: of the class ids in maps, or of the labels.

    Returns:
        A list with a row of tiles (B, 3, H, W) uint8, empty without a condition; names of the class ids in maps.
    """
    text_size = shape[1] * max(1, -(-_TEXT_SIZE // shape[1]))
    if not isinstance(conditions, Tensor):
        return [caption_tiles(conditions, text_size)], {}
    if condition == "segmentation":
        return [color_map(conditions, shape)], legend_of(conditions, names)
    if condition == "label":
        return [caption_tiles([names[k] for k in conditions.tolist()], text_size)], {}
    return [], {}


def trainable(has: Collection[Field], takes: Mapping[str, Sequence[Condition]]) -> str:
    """Describe the priors that can be trained on some fields: "ar by segmentation, diffusion by caption".

    Args:
        has: fields of the images.
        takes: kinds of conditions by prior.
    """
    described = []
    for name, kinds in takes.items():
        usable = [kind for kind in kinds if kind in has]
        described.append(f"{name} by {' or '.join(usable)}" if usable else f"{name} without a condition")
    return ", ".join(described)


assert set(CONDITION_FLAGS) == set(get_args(Field))
