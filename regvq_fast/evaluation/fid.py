"""The Fréchet distance between two sets of images: FID, where its features are Inception's.

FID: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
Local Nash Equilibrium", NeurIPS 2017. With means m and covariances C of the features of both sets,

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

Features are float32, sums over images float64: neither the size of batches nor the number of ranks that share the
images moves the sums beyond 1e-12 of themselves. What the convolutions of a network make of another batch size is not
in anyone's hand: their last bits. Features are not kept, only K and K x K sums.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.image_dataset import ImageDataset, Provenance
from regvq_fast.data.samples import Sample
from regvq_fast.evaluation.feature_nets import FeatureNet
from regvq_fast.evaluation.shares import rank_batches, rank_share, unreadable_images
from regvq_fast.files import atomic_path, user_cache
from regvq_fast.ranks import any_rank, rank, sum_over_ranks

logger = logging.getLogger("regvq_fast")

_FORMAT = 1  # of cached statistics, and of the meaning of what identifies them


@dataclass
class FeatureStatistics:
    """Sums over the features of images, from which mean and covariance follow."""

    count: int
    """Images."""
    total: Tensor
    """(K,) float64."""
    products: Tensor
    """(K, K) float64, sum of the outer products."""

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | str = "cpu") -> Self:
        """Return the statistics of no image."""
        zeros = torch.zeros(num_features + 1, num_features, dtype=torch.float64, device=device)
        return cls(0, zeros[0], zeros[1:])

    def add(self, features: Tensor) -> None:
        """Add those of some images, (B, K)."""
        rows = features.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def over_ranks(self) -> "FeatureStatistics":
        """Those of the images of all ranks."""
        count = sum_over_ranks(torch.tensor(self.count, device=self.total.device))
        return FeatureStatistics(int(count), sum_over_ranks(self.total), sum_over_ranks(self.products))

    @property
    def mean(self) -> Tensor:
        """(K,) float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(K, K) float64, over ``count - 1``."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


class Moments(NamedTuple):
    """Published mean and covariance of features, of a number of images that they don't say."""

    mean: Tensor
    """(K,) float64."""
    covariance: Tensor
    """(K, K) float64."""


class TooFewImagesWarning(UserWarning):
    """A Fréchet distance was taken of fewer images than features."""


def too_few_images(images: int, features: int) -> str | None:
    """Return a caveat on a Fréchet distance between sets of which the smaller has so many images, if any."""
    if images > features:
        return None
    return (
        f"{images} images are too few for {features} features: at least {features + 1} are needed for covariances of "
        "full rank, and the distance falls as their number grows; compare it with others of the same number only"
    )


def frechet_distance(a: FeatureStatistics | Moments, b: FeatureStatistics | Moments) -> float:
    """Squared Fréchet distance of the normal distributions with these means and covariances.

    Computed on the CPU in float64: the same for statistics from any device. tr((C_1 C_2)^(1/2)) is taken as the trace
    of (R C_2 R)^(1/2) with R = C_1^(1/2), which is symmetric: its eigenvalues are real and not negative, where those
    of C_1 C_2 come out complex once a covariance is singular.

    Warns (``TooFewImagesWarning``) of no more images than features.

    Raises:
        ValueError: statistics of different numbers of features, or of a single image.
    """
    if (sizes := (len(a.mean), len(b.mean)))[0] != sizes[1]:
        raise ValueError(f"the statistics are of {sizes[0]} and {sizes[1]} features: use the same network for both")
    for side in (a, b):
        if isinstance(side, FeatureStatistics):
            if side.count < 2:
                raise ValueError(f"a covariance needs at least 2 images, got {side.count}")
            if note := too_few_images(side.count, sizes[0]):
                warnings.warn(note, TooFewImagesWarning, stacklevel=2)
    values, vectors = torch.linalg.eigh(a.covariance.cpu())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    other = b.covariance.cpu()
    inner = root @ other @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).cpu().square().sum() + values.sum() + other.trace() - 2 * overlap
    return max(float(distance), 0.0)  # of equal sets, rounding can leave less than nothing


def statistics_of(
    images: Iterable[Tensor],
    net: FeatureNet,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """Statistics of batches of images (B, 3, H, W) uint8, over those of all ranks.

    Args:
        images: on any device.
        net: on ``device``.
        progress: called after each batch with the number of this rank's images done.
    """
    statistics = FeatureStatistics.zeros(net.num_features, device)
    for batch in images:
        statistics.add(net(batch.to(device, non_blocking=True)))
        if progress is not None:
            progress(statistics.count)
    return statistics.over_ranks()


@dataclass(frozen=True)
class Reference:
    """Reference of Fréchet distances: features of a data set's images by a network."""

    net: FeatureNet
    statistics: FeatureStatistics
    data: dict[str, Any]
    """Description of the images: :func:`describe_data`."""
    device: torch.device | str = "cpu"
    """Device of the network."""
    unreadable: int = 0
    """Images that couldn't be read when they were seen; the next ones of the list took their places."""

    def distance(self, other: FeatureStatistics) -> float:
        """Measure the distance of a set of images whose statistics :func:`statistics_of` made with the same network."""
        return frechet_distance(self.statistics, other)

    def title(self, letter: str) -> str:
        """Return the name of that distance: FID[R] of reconstructions, FID[G] of sampled images."""
        return f"FID[{letter}]" if self.net.standard else f"Fréchet distance[{letter}] ({self.net.name})"


def make_reference(
    dataset: Dataset[Sample],
    net: FeatureNet,
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    data: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """The statistics of a validation split: from the cache, or computed by all ranks and put there.

    Args:
        dataset: with ``len``; all its images are used.
        net: on ``device``.
        batch_size, workers: of the loader.
        cache: folder of statistics (:func:`default_cache`), each known by the files or scenes that it is of, by size,
            crop and number of the images, and by the hash of the network. None: none is read or written.
        data: what :func:`describe_data` said of the data set; None: it is asked, which looks at all files.
        progress: called after each batch with the number of this rank's images done.

    Raises:
        ValueError: there is no image; or what the data set raises.
    """
    data = describe_data(dataset) if data is None else data
    identity = {"format": _FORMAT, **data, "features": net.name, "weights": net.hash}
    file = None if cache is None else _cache_file(cache, identity)
    found = None if file is None else _load(file, identity, net.num_features, device)
    if any_rank(int(found is None)):  # of one mind: a rank on another machine may not see the file
        images = (batch["image"] for batch in rank_batches(dataset, batch_size, workers, device))
        found = statistics_of(images, net, device, progress), unreadable_images(dataset)
        if file is not None and rank() == 0:
            _save(file, identity, *found)
    elif progress is not None:
        progress(len(rank_share(len(dataset))))  # type: ignore[arg-type]
    assert found is not None
    statistics, unreadable = found
    return Reference(net, statistics, data, device, unreadable)


def describe_data(dataset: Any) -> dict[str, Any]:
    """Describe the images of a validation split as plain values, for protocols and to distinguish splits.

    The fingerprint is of names, sizes and modification times of all files, of the pixels of the first and the last
    image, and of what else distinguishes the split (:class:`~regvq_fast.data.image_dataset.Provenance`).

    Raises:
        ValueError: there is no image in it.
    """
    if not len(dataset):
        raise ValueError("the split is empty: no image to evaluate")
    origin = dataset.provenance() if isinstance(dataset, ImageDataset) else Provenance(type(dataset).__name__)
    digest = hashlib.sha256()
    for file in origin.files:
        status = os.stat(file)
        name = os.path.relpath(file, origin.root)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    first, last = dataset[0]["image"], dataset[len(dataset) - 1]["image"]
    for image in (first, last):
        digest.update(image.numpy().tobytes())
    digest.update(origin.variant.encode())
    return {
        "data": origin.data,
        "crop": origin.crop,
        "resize": origin.resize,
        "split": getattr(dataset, "split", "unknown"),
        "images": len(dataset),
        "image_size": first.shape[-1],
        "fingerprint": digest.hexdigest()[:12],
    }


# --------------------------------------------------------------------------------------------------------------- cache


def default_cache() -> Path:
    """Return the default folder of the statistics of data sets. Raises OSError: as `user_cache`."""
    return user_cache("fid")


def _cache_file(folder: Path, identity: dict[str, Any]) -> Path:
    return folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.safetensors"


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _load(
    file: Path, identity: dict[str, Any], num_features: int, device: torch.device | str
) -> tuple[FeatureStatistics, int] | None:
    """The statistics in a file of the cache and the number of unreadable images; None where it isn't just of that."""
    try:
        with safe_open(file, "pt") as content:
            told = content.metadata() or {}
            if told.get("identity") != _text(identity):
                return None
            total, products = content.get_tensor("total").to(device), content.get_tensor("products").to(device)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("the statistics in %s are damaged (%s) and will be recomputed", file, error)
        return None
    if total.shape != (num_features,) or products.shape != (num_features, num_features):
        return None
    return FeatureStatistics(identity["images"], total, products), int(told.get("unreadable", 0))


def _save(file: Path, identity: dict[str, Any], statistics: FeatureStatistics, unreadable: int) -> None:
    tensors = {"total": statistics.total.cpu().contiguous(), "products": statistics.products.cpu().contiguous()}
    try:
        with atomic_path(file) as temporary:
            told = {"identity": _text(identity), "unreadable": str(unreadable)}
            safetensors.torch.save_file(tensors, temporary, metadata=told)
    except OSError as error:
        logger.warning("the statistics of %s can't be kept, and are computed each time (%s)", identity["data"], error)
