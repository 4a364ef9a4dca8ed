"""Nearest code of every row: ``argmin_n |x_m - z_n|^2``, the look-up of VQ-VAE (van den Oord et al., 2017)."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regvq_fast.dispatch import Impl, on_device_of, resolve_impl
from regvq_fast.matmul import compute_dtype, without_tf32
from regvq_fast.ops.row_passes import select
from regvq_fast.ops.tiling import rows_per_tile
from regvq_fast.ops.validation import check_codebook, check_finite, check_overflow


def assign_codes(x: Tensor, codebook: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return the index of the nearest code, without a gradient. Equivalent to ``torch.cdist(x, codebook).argmin(-1)``.

    Args:
        x: (..., D) fp16, bf16, fp32 or fp64.
        codebook: (N, D), type and device of ``x``; or (H, N, D), a codebook for each head of ``x`` (..., H, D).
        impl: "auto" | "triton" | "eager". "auto": the Triton kernel on CUDA except for fp64, else eager PyTorch.

    Returns:
        int64, the leading shape of ``x``; the smallest code wins an exact tie. Deterministic. Autocast: inputs are
        cast to fp32.

    Memory beyond inputs and output, where M and N count the rows and codes of all heads. Triton: 4 N bytes, 24 M for
    each split of the codes, and below sm_80 a buffer of max(2^25, 512 N) fp32 scores. Eager: O((M + N) * D) and one
    tile of about 2^20 scores (2^24 on CUDA; at least 64 rows).

    Raises:
        ValueError: shapes or devices that don't fit; on a CPU also nan or inf in an input, or scores that may overflow.
        TypeError: types that don't fit.
    """
    check_codebook(x, codebook)
    chosen = resolve_impl(impl, x.device, x.dtype)
    indices = _assign_codes_op(x.detach().reshape(-1, *x.shape[1 - codebook.ndim :]), codebook.detach(), chosen)
    return indices.reshape(x.shape[:-1])


def _assign_codes_eager(x: Tensor, codebook: Tensor) -> Tensor:
    if codebook.ndim == 3:
        return torch.stack([_assign_codes_eager(x[:, head], codes) for head, codes in enumerate(codebook)], 1)
    dtype = compute_dtype(x)
    codes = codebook.to(dtype)
    code_bias = codes.square().sum(1).mul_(-0.5)  # argmin |x - z|^2 = argmax x.z - |z|^2 / 2
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    step = rows_per_tile(len(codes), x.device)
    buffer = codes.new_empty(min(step, len(x)), len(codes))
    for start in range(0, len(x), step):
        tile = x[start : start + step].to(dtype)
        with without_tf32(x.device):
            scores = torch.mm(tile, codes.t(), out=buffer[: len(tile)])
        indices[start : start + step], _ = select(scores, code_bias)
    return indices


@torch.library.custom_op("regvq::assign_codes", mutates_args=())
def _assign_codes_op(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    rows, codes = check_finite("x", x), check_finite("codebook", codebook)
    check_overflow(x.shape[-1] * codes * (rows + codes), compute_dtype(x), "x or the codes")
    if impl == "triton":
        from regvq_fast.kernels.assign_codes import assign_codes_forward

        with on_device_of(x):
            return assign_codes_forward(x, codebook)
    return _assign_codes_eager(x, codebook)


@_assign_codes_op.register_fake
def _(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


for _device_type in ("cpu", "cuda"):
    _assign_codes_op.register_autocast(_device_type, torch.float32)

# -------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.regvq.assign_codes)
def _(x: torch.Size, codebook: torch.Size, *_: object, **__: object) -> int:
    return 2 * x.numel() * codebook[-2]
