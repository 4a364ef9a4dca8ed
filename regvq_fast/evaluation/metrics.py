"""Metrics of a trained tokenizer, and of images sampled by a prior, over a whole split."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.finding import EXTENSIONS, find_files, is_image
from regvq_fast.data.image_arrays import ImageArray
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.reading import opened_image
from regvq_fast.data.samples import Batch, Sample
from regvq_fast.data.transforms import Box, crop_rgb, image_to_tensor, upright_size
from regvq_fast.evaluation.fid import FeatureStatistics, Reference, statistics_of
from regvq_fast.evaluation.reconstruction_metrics import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.evaluation.shares import rank_batches, rank_share
from regvq_fast.models.vqgan import VQGAN

_NO_SAMPLES = ("grid.png", "strip.png")
"""Files that regvq sample saves beside the sampled images."""


@dataclass(frozen=True)
class TokenizerMetrics:
    """Quality of a tokenizer's reconstructions of a split."""

    reconstruction: ReconstructionMetrics
    """PSNR, SSIM, perceptual distance, codes."""
    frechet: float | None
    """Fréchet distance between images and reconstructions, FID[R] with Inception's features; None without a
    reference."""


def evaluate_tokenizer(
    model: VQGAN,
    dataset: Dataset[Sample],
    *,
    reference: Reference | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager[object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenizerMetrics:
    """Reconstruct every image of a split, in one pass for all metrics; several ranks divide the images.

    Args:
        model: in evaluation mode, on ``device``.
        dataset: the split, with ``len``.
        reference: of the same images (:func:`~regvq_fast.evaluation.fid.make_reference`), for the Fréchet distance.
        perceptual: as in :func:`evaluate_reconstruction`; ``PerceptualDistance`` is one.
        batch_size, workers: of the loader.
        device: of the model, the reference's network and ``perceptual``.
        autocast: entered around the model.
        progress: called after each batch with the number of this rank's images done.

    Raises:
        ValueError: the model is in training mode, the split is empty, or its images are too small.
    """
    seen = None if reference is None else FeatureStatistics.zeros(reference.net.num_features, device)

    def observe(images: Tensor) -> None:
        if reference is not None and seen is not None:
            seen.add(reference.net(images))

    metrics = evaluate_reconstruction(
        model,
        rank_batches(dataset, batch_size, workers, device),
        num_codes=model.quantize.num_codes,
        device=device,
        autocast=autocast,
        perceptual=perceptual,
        observe=observe,
        progress=progress,
    )
    distance = None if reference is None or seen is None else reference.distance(seen.over_ranks())
    return TokenizerMetrics(metrics, distance)


class BatchSampler(Protocol):
    """Anything that samples images under the conditions of a batch, such as `regvq_fast.priors.images.ImageSampler`."""

    def sample(self, batch: Batch, first_image: int) -> Tensor:
        """Return images (B, 3, H, W) uint8, one for each sample of a batch, numbered from ``first_image`` on."""
        ...


def fid_of_samples(
    sampler: BatchSampler,
    dataset: Dataset[Sample],
    reference: Reference,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Return the Fréchet distance of one sampled image per condition; FID[G] with Inception's features.

    Sample k of the data set is the condition of image number k, on any rank and in any batch.

    Args:
        sampler: on the reference's device.
        dataset: a split with the sampler's conditions.
        reference: of the images of this split.
        batch_size: images sampled at once.
        workers: of the loader.
        progress: called after each batch with the number of this rank's images done.

    Raises:
        ValueError: conditions that the prior can't take.
    """

    def samples() -> Iterator[Tensor]:
        first, done = rank_share(len(dataset)).start, 0  # type: ignore[arg-type]
        for batch in rank_batches(dataset, batch_size, workers, reference.device):
            yield sampler.sample(batch, first + done)
            done += len(batch["image"])

    return reference.distance(statistics_of(samples(), reference.net, reference.device, progress))


def open_samples(path: Path, image_size: int | None = None) -> "SampledImages | ImageArray":
    """Open sampled images: a folder, or an .npz file (:class:`~regvq_fast.data.image_arrays.ImageArray`).

    Args:
        path: of either.
        image_size: required side in pixels. None: any, but the same for all.

    Raises:
        FileNotFoundError: no such path, or no image in it.
        ValueError: an image that can't be read, or of another size.
    """
    if path.suffix != ".npz":
        return SampledImages(path, image_size)
    images = ImageArray(path)
    height, width = images.image_size
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(_other_size(path, width, height, (image_size, image_size)))
    return images


def _other_size(path: Path, width: int, height: int, wanted: tuple[int, int]) -> str:
    return (
        f"{path} has {width} x {height} pixels, others {wanted[0]} x {wanted[1]}: a distance needs images of one size"
    )


class SampledImages(Dataset[Sample]):
    """Sampled images in a folder, all of one size and sorted by name, without the grid of regvq sample.

    The constructor checks every file: the checksums of a PNG, whose pixels are decoded later; other files are decoded.

    Args:
        folder: of the images.
        image_size: side in pixels. None: that of the first image.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image that can't be read, or of another size.
    """

    split = "samples"

    def __init__(self, folder: Path, image_size: int | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder of images: {folder}; give one, or an .npz file")
        found = [Path(file) for file in find_files(folder, EXTENSIONS)]
        self.files = [file for file in found if is_image(file.name) and file.name not in _NO_SAMPLES]
        if not self.files:
            raise FileNotFoundError(f"no images in {folder}; give the folder of sampled images")
        with _opened(self.files[0]) as image:
            wanted = image.size if image_size is None else (image_size, image_size)
        self.image_size = wanted[::-1]
        """Height and width."""
        for file in self.files:
            with _opened(file) as image:
                width, height = image.size
                if image.format == "PNG":
                    image.verify()
                else:
                    image.load()
            if (width, height) != wanted:
                raise ValueError(_other_size(file, width, height, wanted))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        with _opened(self.files[index]) as image:
            whole = Box(0, 0, *upright_size(image))
            return Sample(image=image_to_tensor(crop_rgb(image, whole, *image.size, OVERSAMPLING["val"])))


def _opened(file: Path) -> AbstractContextManager[Image.Image]:
    return opened_image(file, str(file), lambda why: f"{file} can't be read ({why}): regenerate or delete it")
