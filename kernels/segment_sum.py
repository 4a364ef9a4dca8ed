"""Sums of rows by code, in the order of the rows: the hard codebook gradient and the EMA codebook.

    out[n] = sum over m with indices[m] = n of values[m]

Row numbers are sorted by code. One program adds up the rows of one code in their order and writes the result, so the
sums are deterministic. Memory beyond the result: O(M + N), for the sort; contiguous rows are not copied.

The fixed order has a price: if most rows have one code, a single program adds nearly all of them.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _segment_sum_kernel(
    values_ptr,  # (M, D)
    order_ptr,  # (M,) int64: row numbers sorted by code, in their order within a code
    ends_ptr,  # (N,) int64: where a code's rows end in that order
    out_ptr,  # (N, D) fp32
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    code = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    end = tl.load(ends_ptr + code)
    start = tl.load(ends_ptr + code - 1, mask=code > 0, other=0)
    total = tl.zeros([BD], tl.float32)
    for first in range(start, end, BM):
        position = first + tl.arange(0, BM)
        row_mask = position < end
        rows = tl.load(order_ptr + position, mask=row_mask, other=0)
        both = row_mask[:, None] & (channel < D)[None, :]
        values = tl.load(values_ptr + rows[:, None] * D + channel[None, :], mask=both, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=0)
    tl.store(out_ptr + code * D + channel, total, mask=channel < D)


def segment_sum(values: torch.Tensor, indices: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Return the sums by code in fp32.

    Args:
        values: (M, D) fp16, bf16 or fp32.
        indices: (M,) int64 in [0, N).
        num_segments: N.

    Returns:
        (N, D) fp32.
    """
    width = values.shape[1]
    out = torch.empty(num_segments, width, dtype=torch.float32, device=values.device)
    if out.numel() == 0:
        return out
    codes, order = indices.sort(stable=True)
    ends = torch.searchsorted(codes, torch.arange(num_segments, device=codes.device), right=True)
    block = min(64, triton.next_power_of_2(width))
    _segment_sum_kernel[(num_segments, triton.cdiv(width, block))](
        values.contiguous(), order, ends, out, D=width, BM=16, BD=block, num_warps=4, enable_fp_fusion=True
    )
    return out
