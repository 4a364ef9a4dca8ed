"""Products on the host's side: cuBLAS, fp32 results of 16-bit matrices, and fp32 matrices without TF32."""

import contextlib
from collections.abc import Iterator

import torch


def product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of (., K) and (K, .), or of batches of them, accumulated and returned in fp32; a new tensor."""
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
