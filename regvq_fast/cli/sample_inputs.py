"""Inputs of ``regvq sample``: conditions from flags, files and data sets, and images to edit."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from regvq_fast.config import read_config
from regvq_fast.console import say
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.loading import read_samples
from regvq_fast.data.reading import opened_image
from regvq_fast.data.tokens import TokenDataset, majority_vote
from regvq_fast.data.transforms import Box, center_box, crop_labels, crop_rgb, image_to_tensor, to_float, upright_size
from regvq_fast.models.weights import weights_hash
from regvq_fast.priors.canvas import Direction, Plan
from regvq_fast.priors.conditions import (
    CONDITION_FLAGS,
    Condition,
    Conditions,
    conditions_of,
    fields_of,
    no_conditions,
)
from regvq_fast.priors.diffusion.text import words_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PriorName
from regvq_fast.priors.trained_on import TrainedOn
from regvq_fast.scenes.embedded import is_embedded
from regvq_fast.settings import Section

MOST_CONDITIONS = 64
"""Largest number of conditions to take from a data set."""


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(Section):
    """Prior and conditions."""

    prior: PriorName | None = None
    """Fail unless the run is of this prior. Default: any."""
    run: Path | None = None
    """Prior: run, or ORGANIZATION/NAME on the hub. Default: embedded scenes, for maps or, with --text, captions."""
    out: Path
    """New or empty folder of the images."""
    num_images: int = 16
    """Number of images; conditions repeat in turn."""
    per_class: int | None = None
    """Number of images per label, instead of --num-images."""
    map: Path | None = None
    """Semantic map: image with class ids as pixels (grayscale or palette); center-cropped, like --edit and --mask."""
    text: tuple[str, ...] = ()
    """Captions, each in quotes."""
    label: tuple[str, ...] = ()
    """Labels, by name or number. Default: all labels of the prior."""
    data: Path | None = None
    """Data set whose validation split gives up to 64 conditions. Default: the prior's training data."""
    edit: Path | None = None
    """Image to edit: kept where --mask is black, or entirely with --extend."""
    mask: Path | None = None
    """Image that is white where --edit is resampled."""
    extend: tuple[Direction, ...] = ()
    """Directions to extend images in; each one adds half of the prior's image size."""


def check_flags(config: SubjectConfig, sampler: ImageSampler) -> None:
    """Raise ValueError for flags of priors with another condition."""
    condition, kind = sampler.condition, sampler.entry.sampler
    given: dict[str, tuple[object, Condition]] = {
        "--map": (config.map, "segmentation"),
        "--text": (config.text, "caption"),
        "--label": (config.label, "label"),
        "--per-class": (config.per_class, "label"),
    }
    for flag, (value, wanted) in given.items():
        if value and wanted != condition:
            there = "without a condition" if condition == "none" else f"conditioned on a {condition}"
            raise ValueError(f"{flag} is for priors conditioned on a {wanted}; this {kind.title} one is {there}")


def read_conditions(
    config: SubjectConfig, sampler: ImageSampler, run: Path, trained_on: TrainedOn, plan: Plan
) -> Conditions:
    """Return the prepared conditions, which images use in turn, on the CPU; maps have the canvas's grid."""
    prepare = sampler.token_sampler.prepare
    if sampler.condition == "none":
        return no_conditions(config.num_images)
    if config.text:
        _warn_of_words(config.text, trained_on)
        return prepare(config.text, "--text", strict=True)
    if config.map is not None:
        return _canvas_map(config.map, sampler, plan)
    if sampler.condition == "segmentation" and config.extend:
        raise ValueError("--extend needs the map of the whole image: give --map")
    if sampler.condition == "label" and config.data is None:
        labels = prepare(config.label or range(len(sampler.prior.label_names)), "--label")
        return labels.repeat(config.per_class or 1)
    batch, source = _validation(config, sampler, run, min(config.num_images, MOST_CONDITIONS))
    return prepare(conditions_of(batch, sampler.condition), source)


def read_edit(sampler: ImageSampler, path: Path, mask: Path | None) -> tuple[Tensor, Tensor]:
    """Return the tokens (1, h, w) of an image, and a mask of those to keep: all, or where the mask image is black."""
    size, device = sampler.tokenizer.image_size, sampler.precision.device
    pixels, image_size = _read_square("--edit", path, size)
    with torch.no_grad(), sampler.precision.autocast():
        tokens = sampler.tokenizer.tokenize(to_float(pixels[None].to(device)))
    if mask is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    white, mask_size = _read_square("--mask", mask, size)
    if image_size != mask_size:
        raise ValueError(f"--mask {mask} has {mask_size} pixels, --edit {path} {image_size}: make them alike")
    anew = F.adaptive_max_pool2d((white[:1] > 127)[None].float(), sampler.prior.token_shape)[:, 0] > 0
    return tokens, ~anew.to(device)


def _warn_of_words(captions: Sequence[str], trained_on: TrainedOn) -> None:
    """Warn of words that are in no training caption, so that the prior can't know them."""
    known = trained_on.words()
    words = dict.fromkeys(word for caption in captions for word in words_of(caption))
    if known and (unknown := [word for word in words if word not in known]):
        say(Console(), "warning", f"no training caption has {', '.join(map(repr, unknown))}: unknown to the prior")


def _canvas_map(path: Path, sampler: ImageSampler, plan: Plan) -> Tensor:
    """Return a semantic map, centrally cropped to the canvas's shape, on the canvas's grid (1, h, w) uint8."""
    ids = _read_ids(path, plan.height, plan.width)
    if ids.shape[1] >= plan.height and ids.shape[2] >= plan.width:
        ids = majority_vote(ids, (plan.height, plan.width))
    for window in plan.windows:
        sampler.token_sampler.prepare(plan.part(ids, "segmentation", window), f"--map {path}")
    return ids


def _validation(config: SubjectConfig, sampler: ImageSampler, run: Path, count: int) -> tuple[Any, str]:
    """Return at most ``count`` validation samples of --data or of the prior's data set, and their source's name."""
    data, seed, fields = config.data, 0, fields_of(sampler.condition)
    if data is None and not is_embedded(run):
        trained = read_config(run, sampler.entry.config)
        tokens, seed = trained.tokens, trained.run.seed
        if tokens.cache is not None:
            return _cached(tokens.cache, sampler, run, count), f"the cache {tokens.cache}"
        data = tokens.data
    size = sampler.tokenizer.image_size
    dataset = build_dataset(data, split="val", image_size=size, length=count, seed=seed, fields=fields)
    sampler.check_labels(dataset)
    return read_samples(dataset, range(min(count, len(dataset)))), str(data or dataset.title)


def _cached(folder: Path, sampler: ImageSampler, run: Path, count: int) -> Any:
    """Return at most ``count`` validation samples of the prior's token cache."""
    lack = "is not there"
    if folder.exists():
        cached = TokenDataset(folder, "val", tokenizer_hash=weights_hash(sampler.tokenizer))
        if sampler.condition in cached.info.fields:
            return cached.__getitems__(list(range(min(count, len(cached)))))
        lack = f"has no {sampler.condition} any more"
    flag = CONDITION_FLAGS[sampler.condition]
    raise ValueError(f"the token cache {folder} that {run} was trained on {lack}: give --data, or {flag}")


def _read_square(flag: str, path: Path, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the central square of an image file, (3, size, size) uint8, and the file's width and height."""
    with _opened(flag, path) as image:
        width, height = upright_size(image)
        square = crop_rgb(image, center_box(width, height), size, size, OVERSAMPLING["val"])
    return image_to_tensor(square), (width, height)


def _read_ids(path: Path, height: int, width: int) -> Tensor:
    """Return the class ids of a semantic map, centrally cropped to an aspect ratio, (1, H, W) uint8."""
    with _opened("--map", path) as image:
        scale = min(image.width / width, image.height / height)
        box_width, box_height = scale * width, scale * height
        left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
        box = Box(left, top, left + box_width, top + box_height)
        labels = crop_labels(image, box, image.size, round(box_width), round(box_height))
    return torch.from_numpy(np.array(labels, dtype=np.uint8))[None]


def _opened(flag: str, path: Path) -> AbstractContextManager[Image.Image]:
    """Open the image file that a flag names."""
    return opened_image(path, f"{flag} {path}", lambda why: f"{flag} {path}: {why}")
