"""Regularized vector quantization, forward: distances, Gumbel noise, both argmaxes and the look-up in one sweep.

Reg-VQ (Zhang et al., CVPR 2023), section 3.2 and Algorithm 1. Per row m, over the codes n,

    s[m,n] = factor * x_m . k_n + column[n]        k the codes, factor 2 scale, column -scale |z_n|^2   (distance)
                                                   k the weight, factor scale, column b_n               (linear)
    best_index = argmax s,    index = argmax (s + g) on stochastic rows,    lse = log sum exp ((s + g) / t)

with everything in units of log 2. The posterior is the counts of the selections over the rows of a group. How the sweep
goes, and that it is deterministic, is in ``sweep.py``. Memory beyond that sweep's: a number a code, the counts (G, N).
"""

import torch
import triton
import triton.language as tl

from regvq_fast.kernels.constants import LOG2_E
from regvq_fast.kernels.sweep import run_sweep
from regvq_fast.kernels.tiles import column_term


@triton.jit
def _posterior_kernel(
    counts_ptr,  # (G, N) int32
    posterior_ptr,  # (G, N) fp32
    size,  # G N
    group_rows,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    counts = tl.load(counts_ptr + place, mask=inside, other=0).to(tl.float32)
    # A correctly rounded quotient; PyTorch multiplies with a number's rounded inverse.
    share = tl.div_rn(counts, tl.full([BLOCK], group_rows, tl.float32))
    tl.store(posterior_ptr + place, share, mask=inside)


def vector_quantize_forward(
    x: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    tau: torch.Tensor,
    scale: torch.Tensor,
    row_offset: torch.Tensor,
    groups: int,
    needs_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(quantized, posterior, indices, best_indices, perturbation, lse) of checked arguments, as the public op's.

    lse (M,) fp32 is the log-sum-exp of a row's scores over their temperature, in log 2, which backward needs; empty
    unless ``needs_lse``.
    """
    x, codebook = x.contiguous(), codebook.contiguous()
    keys = codebook if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    num_rows, num_codes = x.shape[0], codebook.shape[0]
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    best_indices, perturbation = torch.empty_like(indices), x.new_empty(num_rows, dtype=torch.float32)
    quantized, lse = torch.empty_like(x), perturbation.new_empty(num_rows if needs_lse else 0)
    counts = torch.empty(groups, num_codes, dtype=torch.int32, device=x.device)
    group_rows = max(1, num_rows // groups)
    run_sweep(
        "vector_quantize",
        x,
        keys,
        codebook,
        column_term(codebook, weight is not None, bias, LOG2_E * (1.0 if weight is not None else -1.0), scale),
        LOG2_E * (1.0 if weight is not None else 2.0),
        scale,
        (mask, seed, row_offset, tau),
        (quantized, indices, best_indices, perturbation, lse, counts),
        group_rows,
    )
    posterior = torch.empty_like(counts, dtype=torch.float32)
    _posterior_kernel[(triton.cdiv(counts.numel(), 1024),)](
        counts, posterior, counts.numel(), group_rows, BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )
    return quantized, posterior, indices, best_indices, perturbation, lse
