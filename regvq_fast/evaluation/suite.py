"""The protocol of ADM's evaluation suite: FID, sFID, Inception Score, precision and recall against a reference file.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021; its files and its evaluator are in
openai/guided-diffusion. sFID: Nash, Menick, Dieleman, Battaglia, "Generating Images with Sparse Representations", ICML
2021. Features of Inception are kept for precision and recall, 4 bytes x 2048 an image (400 MB for 50,000).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regvq_fast.data.image_arrays import KEY, ImageArray, open_npz
from regvq_fast.data.reading import is_of_the_machine, why_unreadable
from regvq_fast.evaluation.feature_nets import FeatureNet
from regvq_fast.evaluation.fid import FeatureStatistics, Moments, frechet_distance
from regvq_fast.evaluation.metrics import SampledImages
from regvq_fast.evaluation.sample_metrics import NEIGHBORS, inception_score, precision_and_recall
from regvq_fast.evaluation.shares import rank_batches, rank_share
from regvq_fast.ranks import sum_over_ranks

Progress = Callable[[int], None]


class ReferenceBatch:
    """A reference file of the suite, such as VIRTUAL_imagenet256_labeled.npz.

    It has images in ``arr_0``, statistics of Inception's features, usually of more images (``mu``, ``sigma``; ``mu_s``,
    ``sigma_s`` of the spatial features), or both. The statistics are used only for Inception with the published
    weights; another network needs the images.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has neither images nor statistics, or they are damaged; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_npz(path) as arrays:
            try:
                self.pooled, self.spatial = _moments(arrays, "mu", "sigma"), _moments(arrays, "mu_s", "sigma_s")
            except Exception as error:  # a damaged file can make the reader raise anything, MemoryError among it
                if isinstance(error, OSError) and is_of_the_machine(error):
                    raise
                raise ValueError(f"{path} is damaged, or no reference: {why_unreadable(error)}") from None
            self.images = ImageArray(path) if KEY in arrays else None
        if self.images is None and self.pooled is None:
            raise ValueError(f"{path} has neither images ({KEY}) nor statistics (mu, sigma): it is no reference")

    def check(self, samples: SampledImages | ImageArray, net: FeatureNet) -> None:
        """Raise ValueError if images can't be compared with this reference through the network."""
        if self.images is None and not net.standard:
            raise ValueError(
                f"{self.path} has statistics of Inception's features and no images: {net.name} needs images in {KEY}"
            )
        for moments, features in ((self.pooled, net.num_features), (self.spatial, net.num_spatial)):
            if net.standard and moments is not None and len(moments.mean) != features:
                raise ValueError(
                    f"{self.path} has statistics of {len(moments.mean)} features, Inception {features}: it is no "
                    "reference of this suite"
                )
        for images, name in ((samples, "sampled"), (self.images, "reference")):
            if images is not None and len(images) <= NEIGHBORS:
                raise ValueError(
                    f"precision and recall need at least {NEIGHBORS + 1} {name} images, there are {len(images)}"
                )
        if self.images is not None and self.images.image_size != samples.image_size:
            theirs, ours = (" x ".join(map(str, size)) for size in (self.images.image_size, samples.image_size))
            raise ValueError(f"{self.path} has images of {theirs} pixels, the samples have {ours}: resize the samples")


def _moments(arrays: Any, mean: str, covariance: str) -> Moments | None:
    if (mean in arrays) != (covariance in arrays):
        raise ValueError(f"it has one of {mean} and {covariance} only, statistics are both")
    if mean not in arrays:
        return None
    found = [arrays[name] for name in (mean, covariance)]
    if found[0].ndim != 1 or found[1].shape != (len(found[0]),) * 2:
        raise ValueError(f"{mean} is {found[0].shape} and {covariance} {found[1].shape}, not (K) and (K, K)")
    for name, array in zip((mean, covariance), found, strict=True):
        if array.dtype.kind != "f" or not (np.abs(array) <= np.finfo(np.float32).max).all():
            raise ValueError(f"{name} ({array.dtype}) has values that are not finite float32 numbers")
    if (found[1].diagonal() < 0).any() or not np.allclose(found[1], found[1].T):
        raise ValueError(f"{covariance} is no covariance: it is not symmetric, or has a negative variance")
    return Moments(*(torch.from_numpy(array.astype(np.float64)) for array in found))


class SuiteMetrics(NamedTuple):
    """Metrics of images against a reference."""

    values: dict[str, float]
    """By key: fid_g, and where available sfid, inception_score, precision and recall."""
    left_out: dict[str, str]
    """Reasons why the others are not available, by key."""


def evaluate_samples(
    samples: SampledImages | ImageArray,
    reference: ReferenceBatch,
    net: FeatureNet,
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int], Progress] | None = None,
) -> SuiteMetrics:
    """Measure sampled images as ADM's evaluation suite does; several ranks divide the images.

    One difference: precision and recall use float64 distances here, half precision in the suite.

    Args:
        samples: the images, in order: the Inception Score is a mean over consecutive 5000.
        reference: checked with `ReferenceBatch.check`.
        net: on ``device``.
        batch_size, workers: of the loader.
        progress: takes a name and a number of images; returns a function that is called after each batch with the
            number of this rank's images done.
    """

    def features_of(name: str, images: SampledImages | ImageArray) -> _Features:
        tick = None if progress is None else progress(name, len(images))
        return _features(images, net, batch_size, workers, device, tick)

    ours = features_of("samples", samples)
    theirs = None if reference.images is None else features_of("reference images", reference.images)
    pooled: FeatureStatistics | Moments
    spatial: FeatureStatistics | Moments | None
    if net.standard and reference.pooled is not None:
        pooled, spatial = reference.pooled, reference.spatial
    else:
        assert theirs is not None  # checked
        pooled, spatial = theirs.statistics, theirs.spatial
    values, left_out = {"fid_g": frechet_distance(ours.statistics, pooled)}, {}
    if not net.num_spatial:
        left_out["sfid"] = f"{net.name} has no spatial features"
    elif spatial is None:
        left_out["sfid"] = f"{reference.path} has no mu_s and sigma_s"
    else:
        values["sfid"] = frechet_distance(ours.spatial, spatial)
    if net.classifier is None:
        left_out["inception_score"] = f"{net.name} has no classifier"
    else:
        values["inception_score"] = inception_score(ours.pooled, net.classifier)
    if theirs is None:
        left_out["precision, recall"] = f"{reference.path} has no images"
    else:
        values["precision"], values["recall"] = precision_and_recall(theirs.pooled, ours.pooled)
    return SuiteMetrics(values, left_out)


class _Features(NamedTuple):
    pooled: Tensor
    """(N, K) float32 of the images of all ranks, in order, on the network's device."""
    statistics: FeatureStatistics
    spatial: FeatureStatistics


def _features(
    images: SampledImages | ImageArray,
    net: FeatureNet,
    batch_size: int,
    workers: int,
    device: torch.device | str,
    progress: Progress | None,
) -> _Features:
    features = torch.zeros(len(images), net.num_features, device=device)
    statistics, spatial = (FeatureStatistics.zeros(k, device) for k in (net.num_features, net.num_spatial))
    first = rank_share(len(images)).start
    for batch in rank_batches(images, batch_size, workers, device):
        of_batch, spatial_of_batch = net.with_spatial(batch["image"].to(device, non_blocking=True))
        features[first + statistics.count :][: len(of_batch)] = of_batch
        statistics.add(of_batch)
        spatial.add(spatial_of_batch)
        if progress is not None:
            progress(statistics.count)
    return _Features(sum_over_ranks(features), statistics.over_ranks(), spatial.over_ranks())
