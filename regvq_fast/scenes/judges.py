"""Region accuracy: a measure of whether images of the scenes show the classes of their maps, without a network.

Each class of the scenes is a photograph with its own colours and textures. A region of an image, all pixels of one
class in its map, is described by statistics of colour and texture, and classified by the distributions of these
statistics fitted to training scenes. That is quadratic discriminant analysis: normal distributions, their covariances
shrunk towards the mean over classes. Each class has several distributions, of its regions unchanged, blurred, noisy,
coarsely compressed and tinted, so that an image is judged by its content, not by lost detail. The agreement is the
fraction of the regions whose class is that of the map. Chance is 1/16; compare samples with real validation images and
with their reconstructions.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from regvq_fast.data.loading import read_samples
from regvq_fast.data.samples import Sample

_MIN_FRACTION = 1 / 128
"""Smallest region, as a fraction of an image's pixels; smaller ones don't identify their class."""
_MIN_INSIDE = 8
"""Number of inner pixels, without a neighbour of another class, from which on only these are used."""
_LEVELS = 3
"""Number of scales of the texture statistics, each half of the one before."""
_NOISE = 4e-4
"""Variance added to every texture, of pixels in 0..1: 5 levels of 255, which is invisible."""
_SHRINKAGE = 0.2
"""Weight of the common covariance in that of each class."""
_RIDGE = 1e-2
"""Added to variances, where those of all regions are 1."""
_CHUNK = 32
"""Images at a time: the statistics of 128 take 0.12 s in chunks of 32, which fit into caches, 0.26 s in one."""


class RegionAgreement(NamedTuple):
    """Regions classified as the class of the map."""

    accuracy: float
    """Fraction of all regions, 0..1; nan if there are none."""
    per_class: Tensor
    """(C,) float64, the fraction for each class of the map; nan if it has no region."""
    confusion: Tensor
    """(C, C) int64 on the CPU: regions by class of the map (row) and class found (column)."""


class RegionClassifier(nn.Module):
    """Classifies regions by colours and textures; made by :meth:`fit`.

    Textures are compared pixel by pixel: fit one for each size of images. Q distributions of K statistics, of which
    number q is of class q % C.
    """

    mean: Tensor
    """(K,) float64, of all regions, ..."""
    std: Tensor
    """(K,) float64, ... and their standard deviations; what follows is of statistics with mean 0 and variance 1."""
    centers: Tensor
    """(Q, K) float64, means of the distributions."""
    whitening: Tensor
    """(Q, K, K) float64, whitening matrices of the distributions."""
    log_volumes: Tensor
    """(Q,) float64, logarithms of the determinants of the covariances."""

    def __init__(self, num_classes: int, num_distributions: int, num_statistics: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        shapes = {"mean": (), "std": (), "centers": (num_distributions,), "log_volumes": (num_distributions,)}
        for name, shape in (shapes | {"whitening": (num_distributions, num_statistics)}).items():
            shape = shape if name == "log_volumes" else (*shape, num_statistics)
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def fit(
        cls,
        dataset: Dataset[Sample],
        samples: int = 2048,
        num_classes: int = 16,
        reconstruct: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Fit the classifier to samples 0 to ``samples - 1`` of a data set with ``segmentation``, on the CPU.

        Deterministic, if ``reconstruct`` is. 2048 scenes of 64 pixels take 10 seconds on one core.

        Args:
            dataset: of images, training split.
            samples: their number.
            num_classes: C.
            reconstruct: images (B, 3, H, W) uint8 to their reconstructions by a tokenizer, uint8 on any device: each
                class has a distribution of these, too, so that samples are judged by what the tokenizer can show.
            progress: called with the number of samples done and ``samples``.

        Raises:
            ValueError: a class has fewer than two regions in these samples; or as :func:`region_statistics`.
        """
        moments: list[_Moments] = []
        generator = torch.Generator().manual_seed(0)
        for first in range(0, samples, _CHUNK):
            batch = read_samples(dataset, range(first, min(first + _CHUNK, samples)))
            _check(batch["image"], batch["segmentation"], num_classes)
            member = region_members(batch["segmentation"], num_classes)
            versions = list(_versions(batch["image"], generator))
            if reconstruct is not None:
                versions.append(reconstruct(batch["image"]).cpu())
            for k, images in enumerate(versions):
                if k == len(moments):
                    moments.append(_Moments(num_classes))
                moments[k].add(_statistics(images, member))
            if progress is not None:
                progress(first + len(batch["image"]), samples)
        few = torch.nonzero(moments[0].count < 2)[:, 0].tolist()
        if few:
            raise ValueError(f"classes {few} have fewer than two regions in {samples} samples: give more samples")

        count, total, products = (torch.cat(parts) for parts in zip(*(m.sums() for m in moments), strict=True))
        mean = total.sum(0) / count.sum()
        std = (products.sum(0).diagonal() / count.sum() - mean**2).clamp(min=1e-12).sqrt()
        centers = total / count[:, None]
        covariances = (products / count[:, None, None] - centers[:, :, None] * centers[:, None, :]) / torch.outer(
            std, std
        )
        common = (covariances * count[:, None, None]).sum(0) / count.sum()
        ridge = _RIDGE * torch.eye(len(mean), dtype=torch.float64)
        factors = torch.linalg.cholesky((1 - _SHRINKAGE) * covariances + _SHRINKAGE * common + ridge)
        classifier = cls(num_classes, *centers.shape)
        classifier.load_state_dict(
            {
                "mean": mean,
                "std": std,
                "centers": (centers - mean) / std,
                "whitening": torch.linalg.inv(factors),
                "log_volumes": 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1),
            }
        )
        return classifier

    @torch.no_grad()
    def confusion(self, images: Tensor, maps: Tensor) -> Tensor:
        """Count the regions of images by class of the map (row) and class found (column).

        Args:
            images: (B, 3, H, W) uint8, on the classifier's device.
            maps: (B, H, W) uint8, class ids below ``num_classes``.

        Returns:
            (C, C) int64 on their device; those of several batches add up.

        Raises:
            TypeError, ValueError: as :func:`region_statistics`.
        """
        counts = torch.zeros(self.num_classes**2, dtype=torch.int64, device=images.device)
        for start in range(0, max(len(images), len(maps)), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            regions = region_statistics(images[chunk], maps[chunk], self.num_classes)
            distribution = (self.distances(regions.values.double()) + self.log_volumes).argmin(1)
            pairs = regions.labels * self.num_classes + distribution % self.num_classes
            counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        return counts.view(self.num_classes, self.num_classes)

    def distances(self, values: Tensor) -> Tensor:
        """Squared Mahalanobis distances of regions from each distribution, in the values' type: (R, K) -> (R, Q)."""
        values = (values - self.mean.to(values.dtype)) / self.std.to(values.dtype)
        centers, whitening = self.centers.to(values.dtype), self.whitening.to(values.dtype)
        # One distribution at a time: all at once would take Q times the memory of the values.
        squares = [((values - c) @ w.T).square().sum(1) for c, w in zip(centers, whitening, strict=True)]
        return torch.stack(squares, dim=1)


class _Moments:
    """Sums of the statistics over the regions of each class."""

    def __init__(self, num_classes: int) -> None:
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, regions: "Regions") -> None:
        member, values = F.one_hot(regions.labels, len(self.count)).double(), regions.values.double()
        self.count = self.count + member.sum(0)
        self.total = self.total + member.T @ values
        self.products = self.products + torch.einsum("rc,rk,rl->ckl", member, values, values)

    def sums(self) -> tuple[Tensor, ...]:
        """(C,), (C, K), (C, K, K)"""
        return tuple(map(torch.as_tensor, (self.count, self.total, self.products)))


def _versions(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield images (B, 3, H, W) uint8 unchanged and with degradations typical of models and files."""
    pixels = images.float()
    blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    coarse = F.interpolate(F.avg_pool2d(pixels, 4), size=images.shape[2:], mode="bilinear")
    contrast = 1 + 0.1 * torch.randn(len(images), 1, 1, 1, generator=generator)
    tint = 8 * torch.randn(len(images), 3, 1, 1, generator=generator)
    noise = 8 * torch.randn(pixels.shape, generator=generator)
    for version in (pixels, blurred, coarse, blurred * contrast + tint, pixels + noise):
        yield version.round().clamp(0, 255).to(torch.uint8)
    yield torch.stack([_compressed(image) for image in images])


def _compressed(image: Tensor) -> Tensor:
    """Return an image (3, H, W) uint8 after JPEG compression at low quality."""
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def region_accuracy(classifier: RegionClassifier, images: Tensor, maps: Tensor) -> RegionAgreement:
    """Measure the fraction of the regions of images that are classified as the class of their maps.

    Args:
        classifier: on the device of the images.
        images: (B, 3, H, W) uint8: real, reconstructed or sampled.
        maps: (B, H, W) uint8, class ids.

    Raises:
        TypeError, ValueError: images or maps of another form.
    """
    confusion = classifier.confusion(images, maps).cpu()
    correct, regions = confusion.diagonal().double(), confusion.sum(1).double()
    return RegionAgreement(float(correct.sum() / regions.sum()), correct / regions, confusion)


class Regions(NamedTuple):
    """The regions of a batch of images, by image and then by class."""

    labels: Tensor
    """(R,) int64, classes of the map."""
    values: Tensor
    """(R, K) float32, statistics."""


def region_statistics(images: Tensor, maps: Tensor, num_classes: int) -> Regions:
    """Describe each region of at least 1/128 of its image by statistics of colour and texture.

    Colours are luminance and two colour differences from it. The statistics of a region are means, standard deviations,
    correlations and histograms of its pixels; and, at each of three scales, energy, skewness, kurtosis of the residual
    of a 3 x 3 mean, and size, direction and sparseness of gradients. The outermost pixels of a region, which are mixed
    with their neighbours, are used only if there are too few others.

    Args:
        images: (B, 3, H, W) uint8.
        maps: (B, H, W) uint8, class ids below ``num_classes``.
        num_classes: C.

    Raises:
        TypeError: not uint8. ValueError: sizes that don't belong together, or a class id of ``num_classes`` or more.
    """
    _check(images, maps, num_classes)
    return _statistics(images, region_members(maps, num_classes))


def _check(images: Tensor, maps: Tensor, num_classes: int) -> None:
    if images.dtype != torch.uint8 or maps.dtype != torch.uint8:
        raise TypeError(f"images and maps must be uint8, got {images.dtype} and {maps.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or maps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"images must be (B, 3, H, W) and maps (B, H, W), got {tuple(images.shape)} and {tuple(maps.shape)}"
        )
    if maps.numel() and maps.max() >= num_classes:
        raise ValueError(f"maps hold the class {int(maps.max())}, the classifier knows {num_classes}")


def _statistics(images: Tensor, member: "Members") -> Regions:
    large = member.any.mean(dim=(2, 3)) >= _MIN_FRACTION
    return Regions(large.nonzero()[:, 1], describe(images, member.sure)[large])


class Members(NamedTuple):
    """Pixels of the region of each class, 0 or 1."""

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
    """Return the statistics of :func:`region_statistics` for any sets of pixels.

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
    """Return means over regions: values (B, K, H, W), pixel weights of each (B or 1, R, H, W) -> (B, R, K)."""
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
    """Soft histogram, (B, 1, H, W) -> (B, bins, H, W): each pixel counts in the two nearest bins, weighted linearly."""
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
