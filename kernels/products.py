"""Products on the host's side: cuBLAS, fp32 results of 16-bit matrices, and fp32 matrices without TF32."""

import contextlib
from collections.abc import Iterator

import torch


def product_fp32(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b`` of (., K) and (K, .), or of batches of them, accumulated and returned in fp32; a new tensor.

    ``total``, a fp32 matrix of the result's shape, is added; its memory may be the result's.
    """
    if total is not None:
        if a.dtype != torch.float32 and a.device.type == "cuda":
            return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total.addmm_(a.float(), b.float())
    multiply = torch.bmm if a.ndim == 3 else torch.mm
    if a.dtype == torch.float32:
        return multiply(a, b)
    if a.device.type == "cuda":
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())  # the interpreter's


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices in fp32, whatever precision the process has chosen: TF32 would change indices."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or matmul.fp32_precision in ("none", "ieee"):
        yield
        return
    chosen = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen
