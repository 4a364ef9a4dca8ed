"""Caption accuracy: a measure of whether images of the scenes match their captions, without a network.

A caption states a layout and the class of each region. The layout and classes of an image are found by search: for
every layout, many random positions of its regions; for each of these, the most likely distinct classes of the regions,
by :class:`~regvq_fast.scenes.judges.RegionClassifier`. The likelihood of an image is the product over its regions, each
to the power of its fraction of the pixels, so that layouts with few and with many regions are comparable. Only the
classifier is fitted; the caption is not used.

The accuracy on real images is an upper bound for samples.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regvq_fast.scenes.judges import RegionClassifier
from regvq_fast.scenes.layouts import LAYOUTS, MIN_IMAGE_SIZE, PHOTOGRAPHS, parse_caption, region_map
from regvq_fast.scenes.regions import describe, region_members

_CANDIDATES = 48
"""Random region positions per layout. 8, 48 and 160 find 73 %, 80 % and 81 % of the layouts of 384 validation scenes;
time is proportional."""
_FREEDOM = 4
"""Degrees of freedom of Student's distribution. With the normal distribution, one region unlike the training data would
outweigh the rest of the image."""
_CHUNK = 32


class CaptionAccuracy(NamedTuple):
    """Fractions (0 to 1) of the captions' statements found in the images; nan if there are none."""

    layout: float
    """Fraction of the images whose layout is found: 1/10 by guessing, 1/4 by always answering "a picture of"."""
    classes: float
    """Fraction of the captions' regions whose class is found at their position, given the layout: 1/16 by guessing."""
    both: float
    """Fraction of the images whose whole caption is found: layout and all classes, given neither."""
    per_layout: dict[str, float]
    """``layout`` for the captions of each layout that occurs."""

    def scalars(self) -> dict[str, float]:
        """Return all fractions by name: "layout", "classes", "both", "layout of whole", and so on."""
        per_layout = {f"layout of {name}": fraction for name, fraction in self.per_layout.items()}
        return {"layout": self.layout, "classes": self.classes, "both": self.both} | per_layout


def caption_accuracy(classifier: RegionClassifier, images: Tensor, captions: Sequence[str]) -> CaptionAccuracy:
    """Measure how much of the scenes' captions is found in images; 128 images of 64 pixels take 4 s on one core.

    Args:
        classifier: fitted to scenes of the images' size; on the images' device.
        images: (B, 3, S, S) uint8: real, reconstructed or sampled.
        captions: B captions of scenes, see LAYOUTS.

    Raises:
        TypeError, ValueError: other images or captions.
    """
    if len(captions) != len(images):
        raise ValueError(f"each image needs its caption, got {len(images)} images and {len(captions)} captions")
    stated = [parse_caption(caption) for caption in captions]
    readings = _read(classifier, images)
    found = _most_likely(readings)
    right = [
        [a == b for a, b in zip(readings[caption.layout].classes[k].tolist(), caption.classes, strict=True)]
        for k, caption in enumerate(stated)
    ]
    same_layout = [name == caption.layout for name, caption in zip(found, stated, strict=True)]
    return CaptionAccuracy(
        layout=_fraction(same_layout),
        classes=_fraction([each for regions in right for each in regions]),
        both=_fraction([same and all(regions) for same, regions in zip(same_layout, right, strict=True)]),
        per_layout={
            name: _fraction([same for same, caption in zip(same_layout, stated, strict=True) if caption.layout == name])
            for name in LAYOUTS
            if any(caption.layout == name for caption in stated)
        },
    )


def read_captions(classifier: RegionClassifier, images: Tensor) -> list[str]:
    """Return the most likely caption of each image (B, 3, S, S); see :func:`caption_accuracy`."""
    readings = _read(classifier, images)
    return [
        LAYOUTS[name].caption.format(*(PHOTOGRAPHS[label].phrase for label in readings[name].classes[k].tolist()))
        for k, name in enumerate(_most_likely(readings))
    ]


class _Reading(NamedTuple):
    """The most likely classes of images, given a layout."""

    score: Tensor  # (B,) float32, logarithm of the likelihood
    classes: Tensor  # (B, R) int64, of the layout's R regions


@torch.no_grad()
def _read(classifier: RegionClassifier, images: Tensor) -> dict[str, _Reading]:
    """Return the reading of the images for each layout."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    size = images.shape[-1]
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != size or size < MIN_IMAGE_SIZE:
        raise ValueError(
            f"images must be (B, 3, S, S) with S of at least {MIN_IMAGE_SIZE}, as scenes are, got {tuple(images.shape)}"
        )
    if classifier.num_classes != len(PHOTOGRAPHS):
        raise ValueError(f"the classifier knows {classifier.num_classes} classes, scenes have {len(PHOTOGRAPHS)}")
    readings = {}
    for name, layout in LAYOUTS.items():
        rng = random.Random(0)
        candidates = [layout.regions(size, rng) for _ in range(1 if name == "whole" else _CANDIDATES)]
        maps = torch.stack([torch.from_numpy(region_map(regions, size)) for regions in candidates]).to(images.device)
        chunks = [_read_layout(classifier, chunk, maps, len(candidates[0])) for chunk in images.split(_CHUNK)]
        readings[name] = _Reading(*(torch.cat(each) for each in zip(*chunks, strict=True)))
    return readings


def _read_layout(classifier: RegionClassifier, images: Tensor, maps: Tensor, count: int) -> _Reading:
    """Read images (B, 3, S, S), given candidates of a layout: maps (G, S, S) of the indices of ``count`` regions."""
    member = region_members(maps, count)
    values = describe(images, member.sure.flatten(0, 1)[None])  # (B, G * count, K)
    distances = classifier.distances(values.flatten(0, 1))  # (B * G * count, Q)
    freedom = (_FREEDOM + values.shape[2]) / 2
    likelihood = -freedom * (distances / _FREEDOM).log1p() - classifier.log_volumes.to(distances.dtype) / 2
    classes = classifier.num_classes
    likelihood = likelihood.view(len(images), len(maps), count, distances.shape[1] // classes, classes).amax(3)
    return _choose(likelihood * member.any.mean(dim=(2, 3))[..., None])


def _choose(scores: Tensor) -> _Reading:
    """Return the best candidate and the best distinct classes of its regions: scores (B, G, R, C)."""
    count = scores.shape[2]
    # A region's R best classes suffice: the other regions take at most R - 1 of them.
    best = scores.topk(count, dim=3)
    ranks = torch.cartesian_prod(*[torch.arange(count, device=scores.device)] * count).view(-1, count)  # (R ** R, R)
    classes = torch.stack([best.indices[:, :, r, ranks[:, r]] for r in range(count)], dim=3)  # (B, G, R ** R, R)
    total = torch.stack([best.values[:, :, r, ranks[:, r]] for r in range(count)], dim=3).sum(3)
    repeated = (classes.sort(dim=3).values.diff(dim=3) == 0).any(3)
    score, choice = total.masked_fill(repeated, -torch.inf).flatten(1).max(1)
    return _Reading(score, classes.flatten(1, 2)[torch.arange(len(scores), device=scores.device), choice])


def _most_likely(readings: dict[str, _Reading]) -> list[str]:
    names, scores = list(readings), torch.stack([reading.score for reading in readings.values()], dim=1)
    return [names[k] for k in scores.argmax(1).tolist()]


def _fraction(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else float("nan")
