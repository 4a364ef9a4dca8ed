"""The Fréchet distance between two sets of images: FID, where its features are Inception's.

FID: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
Local Nash Equilibrium", NeurIPS 2017. With means m and covariances C of the features of both sets,

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

Features are float32, sums over images float64: batch size and number of ranks change the sums by less than 1e-12,
relatively, apart from the last bits of features, which a network's convolutions may round differently for another
batch size. Features are not kept, only K and K x K sums.
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
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.image_dataset import ImageDataset, Provenance
from regvq_fast.data.loading import fingerprint
from regvq_fast.data.samples import Sample
from regvq_fast.evaluation.feature_nets import FeatureNet
from regvq_fast.evaluation.shares import rank_batches, rank_share, unreadable_images
from regvq_fast.files import atomic_path, user_cache
from regvq_fast.ranks import any_rank, rank, sum_over_ranks

logger = logging.getLogger("regvq_fast")

_FORMAT = 2  # of cached statistics, and of the meaning of what identifies them


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
        """Add the features (B, K) of some images."""
        rows = features.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def over_ranks(self) -> "FeatureStatistics":
        """Return the sums over the images of all ranks."""
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
    """Published mean and covariance of features, over an unknown number of images."""

    mean: Tensor
    """(K,) float64."""
    covariance: Tensor
    """(K, K) float64."""


class TooFewImagesWarning(UserWarning):
    """A Fréchet distance was computed from fewer images than features."""


def too_few_images(images: int, features: int) -> str | None:
    """Return a caveat on a Fréchet distance, given the images of the smaller set; None if there are enough."""
    if images > features:
        return None
    return (
        f"{images} images are too few for {features} features: at least {features + 1} are needed for covariances of "
        "full rank, and the distance falls as their number grows; compare it with others of the same number only"
    )


def frechet_distance(a: FeatureStatistics | Moments, b: FeatureStatistics | Moments) -> float:
    """Return the squared Fréchet distance of the normal distributions with these means and covariances.

    Computed on the CPU in float64, so that it does not depend on the device. tr((C_1 C_2)^(1/2)) is computed as the
    trace of (R C_2 R)^(1/2) with R = C_1^(1/2). That matrix is symmetric with real eigenvalues >= 0, whereas the
    computed eigenvalues of C_1 C_2 become complex if a covariance is singular.

    Warns (``TooFewImagesWarning``) if there are no more images than features.

    Raises:
        ValueError: statistics with different numbers of features, or of a single image.
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
    distance = (a.mean.cpu() - b.mean.cpu()).square().sum() + values.sum() + other.trace() - 2 * overlap
    return max(float(distance), 0.0)  # rounding can make it negative for equal sets


def statistics_of(
    images: Iterable[Tensor],
    net: FeatureNet,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """Return the statistics of batches of images (B, 3, H, W) uint8, over all ranks.

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
    """Number of unreadable images, each replaced by the next image of the list."""

    def distance(self, other: FeatureStatistics) -> float:
        """Return the distance of images, given their statistics by the same network (:func:`statistics_of`)."""
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
    """Return the statistics of a validation split: from the cache, or computed by all ranks and cached.

    Args:
        dataset: with ``len``; all its images are used.
        net: on ``device``.
        batch_size, workers: of the loader.
        cache: folder of statistics (:func:`default_cache`), each identified by its files or scenes, by size, crop and
            number of the images, and by the network's hash. None: no cache.
        data: result of :func:`describe_data`; None: call it, which visits all files.
        progress: called after each batch with the number of this rank's images done.

    Raises:
        ValueError: the split is empty; or what the data set raises.
    """
    data = describe_data(dataset) if data is None else data
    identity = {"format": _FORMAT, **data, "features": net.name, "weights": net.hash}
    file = None if cache is None else _cache_file(cache, identity)
    found = None if file is None else _load(file, identity, net.num_features, device)
    if any_rank(int(found is None)):  # a rank on another machine may not see the file: all ranks decide alike
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

    The fingerprint covers names, sizes and modification times of all files, the pixels of the first and the last
    image, and the split's variant (:class:`~regvq_fast.data.image_dataset.Provenance`).

    Raises:
        ValueError: the split is empty.
    """
    if not len(dataset):
        raise ValueError("the split is empty, with no image to evaluate: give data with two or more")
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
    """Return the default cache folder; raises OSError as `user_cache`."""
    return user_cache("fid")


def _cache_file(folder: Path, identity: dict[str, Any]) -> Path:
    return folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.safetensors"


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _load(
    file: Path, identity: dict[str, Any], num_features: int, device: torch.device | str
) -> tuple[FeatureStatistics, int] | None:
    """Return cached statistics and the number of unreadable images; None if the file has another identity."""
    try:
        content = file.read_bytes()  # safetensors opens no path that is not UTF-8
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        if metadata.get("identity") != _text(identity):
            return None
        total, products, unreadable = tensors["total"], tensors["products"], metadata.get("unreadable", "")
        if metadata.get("sha256") != _digest(total, products, unreadable):
            raise ValueError("its checksum is not that of its contents")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("the statistics in %s are damaged (%s) and will be recomputed", file, error)
        return None
    if total.shape != (num_features,) or products.shape != (num_features, num_features):
        return None
    return FeatureStatistics(identity["images"], total.to(device), products.to(device)), int(unreadable)


def _digest(total: Tensor, products: Tensor, unreadable: str) -> str:
    return hashlib.sha256(f"{fingerprint(total, products)} {unreadable}".encode()).hexdigest()


def _save(file: Path, identity: dict[str, Any], statistics: FeatureStatistics, unreadable: int) -> None:
    tensors = {"total": statistics.total.cpu().contiguous(), "products": statistics.products.cpu().contiguous()}
    try:
        with atomic_path(file) as temporary:
            digest = _digest(tensors["total"], tensors["products"], str(unreadable))
            metadata = {"identity": _text(identity), "unreadable": str(unreadable), "sha256": digest}
            temporary.write_bytes(safetensors.torch.save(tensors, metadata))
    except OSError as error:
        logger.warning("the statistics of %s can't be cached, and are computed each time (%s)", identity["data"], error)
