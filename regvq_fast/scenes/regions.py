"""Statistics of colour and texture of the regions of images, which describe the class that a region shows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_FRACTION = 1 / 128
"""Smallest region, as a fraction of an image's pixels; smaller ones don't identify their class."""
_MIN_INSIDE = 8
"""Smallest number of inner pixels, without a neighbour of another class, to use these only."""
_LEVELS = 3
"""Number of scales of the texture statistics, each half of the one before."""
_NOISE = 4e-4
"""Variance added to every texture, for pixels in 0..1: 5 levels of 255, which is invisible."""


class Regions(NamedTuple):
    """Regions of a batch of images, ordered by image and then by class."""

    labels: Tensor
    """(R,) int64, classes in the map."""
    values: Tensor
    """(R, K) float32, statistics."""


def region_statistics(images: Tensor, maps: Tensor, num_classes: int) -> Regions:
    """Describe each region of at least 1/128 of its image by statistics of colour and texture.

    Colours are luminance and two colour differences. The statistics are means, standard deviations, correlations and
    histograms of a region's pixels; and at each of three scales energy, skewness and kurtosis of the residual of a
    3 x 3 mean, and size, direction and sparseness of gradients. The outermost pixels of a region, which mix with their
    neighbours, are used only if there are too few others.

    Args:
        images: (B, 3, H, W) uint8.
        maps: (B, H, W) uint8, class ids below ``num_classes``.
        num_classes: C.

    Raises:
        TypeError: not uint8. ValueError: sizes that don't match, or a class id of ``num_classes`` or more.
    """
    check_images(images, maps, num_classes)
    return member_statistics(images, region_members(maps, num_classes))


def check_images(images: Tensor, maps: Tensor, num_classes: int) -> None:
    """Raise TypeError or ValueError as :func:`region_statistics`."""
    if images.dtype != torch.uint8 or maps.dtype != torch.uint8:
        raise TypeError(f"images and maps must be uint8, got {images.dtype} and {maps.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or maps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"images must be (B, 3, H, W) and maps (B, H, W), got {tuple(images.shape)} and {tuple(maps.shape)}"
        )
    if maps.numel() and maps.max() >= num_classes:
        raise ValueError(f"maps have the class {int(maps.max())}, but the classifier has {num_classes} classes")


def member_statistics(images: Tensor, member: "Members") -> Regions:
    """Return :func:`region_statistics` of images whose regions are known."""
    large = member.any.mean(dim=(2, 3)) >= _MIN_FRACTION
    return Regions(large.nonzero()[:, 1], describe(images, member.sure)[large])


class Members(NamedTuple):
    """Pixels of each class, 0 or 1."""

    any: Tensor
    """(B, C, H, W) float32, all pixels."""
    sure: Tensor
    """(B, C, H, W) float32, without the outermost pixels, unless there are too few others."""


def region_members(maps: Tensor, num_classes: int) -> Members:
    """Return the pixels of each class in maps (B, H, W) uint8."""
    member = (maps[:, None] == torch.arange(num_classes, device=maps.device).view(-1, 1, 1)).float()
    ids = maps[:, None].float()
    inside = member * (F.max_pool2d(ids, 3, stride=1, padding=1) == -F.max_pool2d(-ids, 3, stride=1, padding=1))
    return Members(member, torch.where(inside.sum(dim=(2, 3), keepdim=True) >= _MIN_INSIDE, inside, member))


def describe(images: Tensor, member: Tensor) -> Tensor:
    """Return the statistics of :func:`region_statistics` for arbitrary sets of pixels.

    Args:
        images: (B, 3, H, W) uint8.
        member: (B, R, H, W) float32, 0..1; or (1, R, H, W), the same sets of pixels in all images.

    Returns:
        (B, R, K) float32.
    """
    red, green, blue = images.float().div(255).unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    colors = torch.stack([luminance, blue - luminance, red - luminance], dim=1)

    statistics = [_color_statistics(colors, member)]
    for _ in range(_LEVELS):
        statistics.append(_texture_statistics(colors, member))
        colors, member = F.avg_pool2d(colors, 2), F.avg_pool2d(member, 2)
    return torch.cat(statistics, dim=2)


def _mean(values: Tensor, member: Tensor) -> Tensor:
    """Return means (B, R, K) over regions, of values (B, K, H, W) with pixel weights (B or 1, R, H, W)."""
    weights = member.flatten(2)
    return weights @ values.flatten(2).transpose(1, 2) / weights.sum(2, keepdim=True).clamp(min=1e-6)


def _color_statistics(colors: Tensor, member: Tensor) -> Tensor:
    first, second = torch.triu_indices(3, 3, device=colors.device)
    mean = _mean(colors, member)
    covariance = _mean(colors[:, first] * colors[:, second], member) - mean[..., first] * mean[..., second]
    variance = covariance[..., first == second].clamp(min=0)
    std = (variance + _NOISE).sqrt()
    mixed = first != second
    correlation = covariance[..., mixed] / (std[..., first[mixed]] * std[..., second[mixed]])
    histograms = [
        _histogram(colors[:, :1], 0.0, 1.0, 8),
        *(_histogram(colors[:, k : k + 1], -0.3, 0.3, 5) for k in (1, 2)),
    ]
    frequencies = _mean(torch.cat(histograms, dim=1), member).clamp(min=0).sqrt()
    return torch.cat([mean, std.log(), correlation, frequencies], dim=2)


def _histogram(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Return soft histograms (B, bins, H, W) of (B, 1, H, W): a pixel counts linearly in its two nearest bins."""
    centers = torch.linspace(low, high, bins, device=values.device).view(-1, 1, 1)
    return (1 - (values - centers).abs() * ((bins - 1) / (high - low))).clamp(min=0)


def _texture_statistics(colors: Tensor, member: Tensor) -> Tensor:
    band = colors - F.avg_pool2d(colors, 3, stride=1, padding=1, count_include_pad=False)
    detail = band[:, :1]
    right, down = (colors[:, :1].diff(dim=d, append=colors[:, :1].narrow(d, -1, 1)) for d in (3, 2))
    parts = [band**2, detail**3, detail**4, right**2, down**2, right * down, right.abs() + down.abs()]
    mean = _mean(torch.cat(parts, dim=1), member)
    energy, third, fourth, across, along, mixed, total = mean.split([3, 1, 1, 1, 1, 1, 1], dim=2)
    variance, gradient = energy[..., :1] + _NOISE, across + along + _NOISE
    statistics = [
        (energy + _NOISE).log(),
        third / variance**1.5,
        (fourth / variance**2 + 0.1).log(),
        gradient.log(),
        (across - along) / gradient,
        mixed.abs() / gradient,
        total / gradient.sqrt(),
    ]
    return torch.cat(statistics, dim=2)
