"""The codes' gradient out of its parts, in one pass: the last kernel of ``vector_quantize``'s backward.

    distance logits:  dZ = lookup + dk - diag(dcolumn) z

with the look-up's gradient, dk = f dS^T x and f times dcolumn = sum_m dS, all of them sums over the chunks of rows.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _code_gradients_kernel(
    lookup_ptr,  # (N, D) fp32, over the factor, where LOOKUP
    keys_ptr,  # (N, D) fp32: f dS^T x, over the magnitude where SCALED
    column_ptr,  # (N,) fp32: f sum_m dS, over the magnitude where SCALED
    codes_ptr,  # (N, D)
    magnitude_ptr,  # () fp32, where SCALED
    grad_codes_ptr,  # (N, D)
    size,  # N D
    lookup_factor,
    D: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    column = tl.load(column_ptr + place // D, mask=inside, other=0.0)
    codes = tl.load(codes_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(keys_ptr + place, mask=inside, other=0.0) - column * codes
    if SCALED:
        grad *= tl.load(magnitude_ptr)
    if LOOKUP:
        grad += tl.load(lookup_ptr + place, mask=inside, other=0.0) * lookup_factor
    tl.store(grad_codes_ptr + place, grad.to(grad_codes_ptr.dtype.element_ty), mask=inside)


def code_gradients(
    lookup: torch.Tensor | None,
    lookup_factor: float,
    keys: torch.Tensor,
    column: torch.Tensor,
    magnitude: torch.Tensor | None,
    codebook: torch.Tensor,
) -> torch.Tensor:
    """``lookup_factor * lookup + magnitude * (keys - column z)``, (N, D) in the type of the codebook.

    lookup and keys (N, D) fp32, column (N,) fp32, magnitude () fp32 or None for 1. Nothing else is allocated.
    """
    grad_codes, block = torch.empty_like(codebook), 1024
    _code_gradients_kernel[(triton.cdiv(codebook.numel(), block),)](
        lookup,
        keys,
        column,
        codebook,
        magnitude,
        grad_codes,
        codebook.numel(),
        lookup_factor,
        D=codebook.shape[1],
        LOOKUP=lookup is not None,
        SCALED=magnitude is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_codes
