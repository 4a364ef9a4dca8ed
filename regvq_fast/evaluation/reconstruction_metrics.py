"""Quality of a tokenizer's reconstructions of validation images."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regvq_fast.data.samples import Batch
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.codebook import CodebookUsage, entropy_bits, perplexity, utilization
from regvq_fast.ranks import any_rank, sum_over_ranks

SSIM_WINDOW = 11
"""Smallest side in pixels for SSIM."""
_ROWS = 256  # rows of an image compared at once


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Means over images, of reconstructions clamped and rounded to 8 bits as a saved PNG would be."""

    psnr: float
    """dB, higher is better: the mean of the images' PSNRs, not the PSNR of the mean error; infinite if a
    reconstruction is exact."""
    ssim: float
    """Structural similarity, at most 1, as its authors define it and scikit-image computes it: Gaussian windows of
    11 pixels, sigma 1.5, that lie entirely in the image; mean over the three channels."""
    perceptual: float | None
    """Mean perceptual distance, lower is better; None if it was not computed."""
    utilization: float
    """Fraction of the codes used at least once over all images, 0..1."""
    perplexity: float
    """exp(entropy) of the code frequencies over all images, 1..N."""
    images: int
    """Number of images."""
    code_counts: Tensor
    """(N,) int64 on the CPU, selections of each code."""
    position_entropy: Tensor
    """(h, w) float64 on the CPU: entropy in bits of the codes at each position, at most log2 of the images."""

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name, for JSON or TensorBoard; ``perceptual`` only if it is not None."""
        values = {name: getattr(self, name) for name in ("psnr", "ssim", "perceptual", "utilization", "perplexity")}
        return {name: value for name, value in values.items() if value is not None} | {"images": self.images}


@torch.no_grad()
def evaluate_reconstruction(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_codes: int,
    device: torch.device | str,
    autocast: AbstractContextManager[object] | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    observe: Callable[[Tensor], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReconstructionMetrics:
    """Reconstruct every image of ``batches`` and compare it with the original.

    With several ranks, each has its own batches, and the result covers all of them. Codes are counted per position,
    which takes 8 h w N bytes.

    A non-finite reconstruction makes PSNR and SSIM NaN; it is not scored as the image it would be clamped to. The host
    waits for the device once, at the end.

    Args:
        model: a VQGAN in evaluation mode: float32 images (B, 3, H, W) in -1..1 to an output with ``reconstruction``
            (B, 3, H, W) in -1..1 and ``quantizer.indices`` (B, h, w) int64.
        batches: with uint8 ``image`` (B, 3, H, W), H and W at least 11.
        num_codes: N, the size of the codebook.
        device: of the model.
        autocast: entered around every call of the model; must be reusable, as torch.autocast is.
        perceptual: maps (reconstruction, original), both float32 (B, 3, H, W) in -1..1, the former rounded to 8 bits,
            to distances (B, ...), which are averaged over all but B. Called outside ``autocast``.
        observe: called with the reconstructions of each batch, (B, 3, H, W) uint8, for other metrics in the same pass.
        progress: called after each batch with the number of images done.

    Raises:
        ValueError: the model is in training mode, there is no image, or images have sides below 11 pixels.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before evaluating it")
    usage: CodebookUsage | None = None
    height = width = 0  # of the token maps
    psnr, ssim, distances = [], [], []
    images = 0
    for batch in batches:
        if min(size := batch["image"].shape[2:]) < SSIM_WINDOW:
            raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {size[0]} x {size[1]}")
        original_uint8 = batch["image"].to(device, non_blocking=True)
        original = to_float(original_uint8)
        with autocast or nullcontext():
            output = model(original)
        indices = output.quantizer.indices
        if usage is None:
            height, width = indices.shape[1:]
            usage = CodebookUsage(height * width * num_codes, device)
            offsets = torch.arange(0, len(usage.counts), num_codes, device=device).view(height, width)
        usage.update(indices + offsets)
        reconstruction_uint8 = to_uint8(output.reconstruction)
        finite = output.reconstruction.isfinite().flatten(1).all(dim=1)
        psnr.append(torch.where(finite, _psnr(reconstruction_uint8, original_uint8), torch.nan))
        ssim.append(torch.where(finite, _ssim(reconstruction_uint8, original_uint8), torch.nan))
        if perceptual is not None:
            distance = perceptual(to_float(reconstruction_uint8), original)
            distances.append(distance.reshape(len(original), -1).float().mean(dim=1))
        if observe is not None:
            observe(reconstruction_uint8)
        images += len(original)
        if progress is not None:
            progress(images)
    zero = torch.zeros(1, device=device)
    sums = [torch.cat([zero, *values]).double().sum() for values in (psnr, ssim, distances)]
    *totals, images = sum_over_ranks(torch.stack([*sums, zero.double().squeeze() + images])).tolist()
    if not images:
        raise ValueError("there is no image to evaluate on")
    height, width = any_rank(height), any_rank(width)  # a rank may have no image
    by_position = torch.zeros(height * width * num_codes, dtype=torch.int64, device=device)
    by_position = sum_over_ranks(by_position if usage is None else usage.counts).view(height, width, num_codes)
    counts = by_position.sum((0, 1))
    psnr_mean, ssim_mean, perceptual_mean = (total / images for total in totals)
    return ReconstructionMetrics(
        psnr=psnr_mean,
        ssim=ssim_mean,
        perceptual=None if perceptual is None else perceptual_mean,
        utilization=float(utilization(counts)),
        perplexity=float(perplexity(counts)),
        images=int(images),
        code_counts=counts.cpu(),
        position_entropy=entropy_bits(by_position).cpu(),
    )


def image_psnr(image: Tensor, original: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two images (3, H, W) uint8 in dB; infinite if they are equal."""
    rows = zip(image.split(_ROWS, 1), original.split(_ROWS, 1), strict=True)
    error = sum(float((a.float() - b.float()).square().sum(dtype=torch.float64)) for a, b in rows) / image.numel()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the PSNR (B,) in dB of images (B, 3, H, W) uint8."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here, since its import takes seconds

    images, originals = images.float() / 255, originals.float() / 255
    return peak_signal_noise_ratio(images, originals, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the SSIM (B,) of images (B, 3, H, W) uint8."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, originals = images.float() / 255, originals.float() / 255
    _, similarity = structural_similarity_index_measure(images, originals, data_range=1.0, return_full_image=True)
    border = SSIM_WINDOW // 2  # torchmetrics' mean includes reflected windows across the border
    return similarity[:, :, border:-border, border:-border].flatten(1).mean(dim=1)
