"""Products of matrices outside the kernels: fp32 results of 16-bit inputs, fp32 without TF32, chunks of images."""

import contextlib
import threading
from collections.abc import Iterator

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type that scores are computed in: fp64 for fp64, fp32 for every other type."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def score_dtype(x: torch.Tensor, codebook: torch.Tensor, fp32: bool = False) -> torch.dtype:
    """Return the type in which rows from ``x`` are multiplied with codes; sums have at least fp32.

    On a GPU this is the type of ``x`` if it has 16 bits, for the tensor cores, unless ``fp32``. A CPU gains nothing
    from 16 bits.
    """
    takes_16_bits = x.is_cuda and x.dtype.itemsize == 2 and codebook.dtype != torch.float64 and not fp32
    return x.dtype if takes_16_bits else compute_dtype(codebook)


def product_fp32(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``a @ b`` of (., K) and (K, .), or of batches of them, accumulated and returned in fp32.

    ``total``, fp32 of the result's shape, is added in place.
    """
    if total is not None:
        add = torch.baddbmm if a.ndim == 3 else torch.addmm
        if a.dtype != torch.float32 and a.device.type == "cuda":
            return add(total, a, b, out_dtype=torch.float32, out=total)
        return add(total, a.float(), b.float(), out=total)
    multiply = torch.bmm if a.ndim == 3 else torch.mm
    if a.dtype == torch.float32:
        return multiply(a, b)
    if a.device.type == "cuda":
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())  # of Triton's interpreter, on a CPU


def image_chunks(num_images: int, length: int, rows: int) -> list[tuple[slice, slice]]:
    """Return (images, rows) of chunks of at most ``rows`` rows: some rows of one image, or all of several images."""
    images = max(1, rows // max(1, length))
    return [
        (slice(image, min(image + images, num_images)), slice(start, min(start + rows, length)))
        for image in range(0, num_images, images)
        for start in range(0, length, rows)
    ]


class _Exact:
    """Number of threads that multiply without TF32, and the precision of the process before the first of them."""

    lock = threading.Lock()
    threads = 0
    chosen = "none"


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever precision the process has set: TF32 would change indices."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _Exact.lock:
        if _Exact.threads == 0:
            _Exact.chosen = matmul.fp32_precision
            if _Exact.chosen not in ("none", "ieee"):
                matmul.fp32_precision = "ieee"
        _Exact.threads += 1
    try:
        yield
    finally:
        with _Exact.lock:
            _Exact.threads -= 1
            if _Exact.threads == 0 and _Exact.chosen not in ("none", "ieee"):
                matmul.fp32_precision = "none"  # "none" reads as the wider setting, which may be where it was chosen
                if matmul.fp32_precision != _Exact.chosen:
                    matmul.fp32_precision = _Exact.chosen
