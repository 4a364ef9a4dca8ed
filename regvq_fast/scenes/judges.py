"""Region accuracy: a measure of whether images of the scenes match their maps, without a network.

Each class of the scenes is a photograph with its own colours and textures. A region, all pixels of one class in a map,
is described by statistics of colour and texture (:mod:`regvq_fast.scenes.regions`) and classified by quadratic
discriminant analysis: normal distributions fitted to training scenes, with covariances shrunk towards their mean over
classes. Each class has several distributions: of its regions unchanged, blurred, noisy, compressed and tinted, so that
lost detail does not decide. The agreement is the fraction of the regions classified as their class in the map. Chance
is 1/16; compare samples with real validation images and with their reconstructions.
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
from regvq_fast.scenes.regions import Regions, check_images, member_statistics, region_members, region_statistics

_SHRINKAGE = 0.2
"""Weight of the common covariance in each class's covariance."""
_RIDGE = 1e-2
"""Added to variances, after normalization to variance 1 over all regions."""
_CHUNK = 32
"""Images at a time. Statistics of 128 images take 0.12 s in chunks of 32, which fit into caches, and 0.26 s at once."""


class RegionAgreement(NamedTuple):
    """Regions classified as the class of the map."""

    accuracy: float
    """Fraction of all regions, 0..1; NaN if there are none."""
    per_class: Tensor
    """(C,) float64, the fraction for each class of the map; NaN for a class without a region."""
    confusion: Tensor
    """(C, C) int64 on the CPU: regions by class of the map (row) and class found (column)."""


class RegionClassifier(nn.Module):
    """Classifies regions by colours and textures; made by :meth:`fit`.

    Textures depend on the resolution: fit a classifier for each image size. It has Q distributions of K statistics;
    distribution q belongs to class q % C.
    """

    mean: Tensor
    """(K,) float64, means over all regions."""
    std: Tensor
    """(K,) float64, standard deviations over all regions. The buffers below are for normalized statistics."""
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

        Deterministic, if ``reconstruct`` is. 2048 scenes of 64 pixels take 10 s on one core.

        Args:
            dataset: training split.
            samples: number of samples.
            num_classes: C.
            reconstruct: maps images (B, 3, H, W) uint8 to a tokenizer's reconstructions, uint8 on any device. Each
                class gets a distribution of these, too, so that the tokenizer's losses don't count against samples.
            progress: called with the number of samples done and ``samples``.

        Raises:
            ValueError: a class has fewer than two regions in these samples; or as
                :func:`~regvq_fast.scenes.regions.region_statistics`.
        """
        moments: list[_Moments] = []
        generator = torch.Generator().manual_seed(0)
        for first in range(0, samples, _CHUNK):
            batch = read_samples(dataset, range(first, min(first + _CHUNK, samples)))
            check_images(batch["image"], batch["segmentation"], num_classes)
            member = region_members(batch["segmentation"], num_classes)
            versions = list(_versions(batch["image"], generator))
            if reconstruct is not None:
                versions.append(reconstruct(batch["image"]).cpu())
            for k, images in enumerate(versions):
                if k == len(moments):
                    moments.append(_Moments(num_classes))
                moments[k].add(member_statistics(images, member))
            if progress is not None:
                progress(first + len(batch["image"]), samples)
        few = torch.nonzero(moments[0].count < 2)[:, 0].tolist()
        if few:
            raise ValueError(f"classes {few} have fewer than two regions in {samples} samples: give more of them")

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
            (C, C) int64 on the images' device; counts of several batches can be added.

        Raises:
            TypeError, ValueError: as :func:`~regvq_fast.scenes.regions.region_statistics`.
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
        """Return squared Mahalanobis distances (R, Q) of values (R, K) from each distribution, in the values' type."""
        values = (values - self.mean.to(values.dtype)) / self.std.to(values.dtype)
        centers, whitening = self.centers.to(values.dtype), self.whitening.to(values.dtype)
        # One distribution at a time, to avoid Q times the memory of the values.
        squares = [((values - c) @ w.T).square().sum(1) for c, w in zip(centers, whitening, strict=True)]
        return torch.stack(squares, dim=1)


class _Moments:
    """Sums of the statistics over the regions of each class."""

    def __init__(self, num_classes: int) -> None:
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, regions: Regions) -> None:
        member, values = F.one_hot(regions.labels, len(self.count)).double(), regions.values.double()
        self.count = self.count + member.sum(0)
        self.total = self.total + member.T @ values
        self.products = self.products + torch.einsum("rc,rk,rl->ckl", member, values, values)

    def sums(self) -> tuple[Tensor, ...]:
        """Return counts (C,), sums (C, K) and sums of products (C, K, K)."""
        return tuple(map(torch.as_tensor, (self.count, self.total, self.products)))


def _versions(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield images (B, 3, H, W) uint8 unchanged, and with degradations typical of models and files."""
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
        TypeError, ValueError: as :func:`~regvq_fast.scenes.regions.region_statistics`.
    """
    confusion = classifier.confusion(images, maps).cpu()
    correct, regions = confusion.diagonal().double(), confusion.sum(1).double()
    return RegionAgreement(float(correct.sum() / regions.sum()), correct / regions, confusion)
