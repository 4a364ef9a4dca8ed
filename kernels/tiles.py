"""What the kernels share on the device: tiles of rows, their products, the order of rows, a running argmax.

Every matrix is contiguous in its last dimension and addressed with 64 bits. Rows, codes and channels that overrun are
loaded as zeros, so that any M, N and D will do.
"""

import torch
import triton
import triton.language as tl

from regvq_fast.kernels.constants import INTERPRETED


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total [BM, BN] fp32 + a [BM, BK] times the transpose of b [BN, BK]."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), total, input_precision=PRECISION)


@triton.jit
def load_rows(
    matrix_ptr,  # (., D)
    rows,  # [BM] int64
    inside,  # [BM] bool
    first_column,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Columns first_column + (0 .. BK - 1) of some rows -> [BM, BK]; zeros outside."""
    column = first_column + tl.arange(0, BK)
    place = matrix_ptr + rows[:, None] * D + column[None, :]
    if D % BK == 0:
        return tl.load(place, mask=inside[:, None], other=0.0)
    else:
        return tl.load(place, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def product(
    a_ptr,  # (., D)
    a_rows,  # [BM] int64
    a_inside,  # [BM] bool
    b_ptr,  # (., D)
    b_rows,  # [BN] int64
    b_inside,  # [BN] bool
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of a times some rows of b -> [BM, BN] fp32, accumulated in fp32."""
    total = tl.zeros([BM, BN], tl.float32)
    for first_column in range(0, D, BK):
        a = load_rows(a_ptr, a_rows, a_inside, first_column, D, BK)
        b = load_rows(b_ptr, b_rows, b_inside, first_column, D, BK)
        total = multiply(a, b, total, PRECISION)
    return total


@triton.jit
def running_argmax(best, best_code, tile_best, scores, first_code, BN: tl.constexpr):
    """Take the scores [BM, BN] of codes first_code + (0 .. BN - 1) with their maxima [BM] into the best ones so far.

    Tiles come in ascending order of their codes; the smallest code wins a tie. In this form an element costs a
    comparison, a selection and a minimum, whatever the order in which the hardware reduces.
    """
    column = tl.arange(0, BN)[None, :]
    tile_code = first_code + tl.min(tl.where(scores == tile_best[:, None], column, BN), axis=1)
    better = tile_best > best
    return tl.where(better, tile_best, best), tl.where(better, tile_code, best_code)


@triton.jit
def _order_rows_kernel(
    mask_ptr,  # (M,) bool
    order_ptr,  # (M,) int32
    num_rows,
    window,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(1) * BLOCK  # the first row of this program, within its window
    first = tl.program_id(0).to(tl.int64) * window
    length = tl.minimum(window, num_rows - first)
    offset = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)  # stochastic rows ahead of this block, by lane
    for start in range(0, block, BLOCK):
        before += tl.load(mask_ptr + first + start + offset, mask=start + offset < length, other=0).to(tl.int32)
    row = block + offset
    inside = row < length
    stochastic = tl.load(mask_ptr + first + row, mask=inside, other=0).to(tl.int32)
    rank = tl.sum(before) + tl.cumsum(stochastic) - stochastic  # stochastic rows ahead of each row
    place = tl.where(stochastic != 0, rank, length - 1 - (row - rank))
    tl.store(order_ptr + first + place, (first + row).to(tl.int32), mask=inside)


def order_rows(mask: torch.Tensor, window: int) -> torch.Tensor:
    """Row numbers ordered within windows of rows: the stochastic ones come first, so that few tiles pay for noise.

    Args:
        mask: (M,) bool.
        window: rows of a window.

    Returns:
        (M,) int32; a permutation of each window's rows. A function of the mask alone.
    """
    order = torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device)
    if mask.shape[0]:
        window, block = min(window, mask.shape[0]), 1024
        grid = (triton.cdiv(mask.shape[0], window), triton.cdiv(window, block))
        _order_rows_kernel[grid](mask, order, mask.shape[0], window, BLOCK=block, num_warps=4, enable_fp_fusion=True)
    return order


@triton.jit
def _column_kernel(
    codes_ptr,  # (N, D): the codes of distance logits
    bias_ptr,  # (N,): linear logits'; read where LINEAR and HAS_BIAS
    scale_ptr,  # () floating point, where SCALED
    column_ptr,  # (N,) fp32
    num_codes,
    factor,
    D: tl.constexpr,
    LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    code = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = code < num_codes
    column = tl.zeros([BN], tl.float32)
    if not LINEAR:
        for first_column in range(0, D, BK):
            z = load_rows(codes_ptr, code.to(tl.int64), inside, first_column, D, BK).to(tl.float32)
            column += tl.sum(z * z, axis=1)
    elif HAS_BIAS:
        column = tl.load(bias_ptr + code, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        factor *= tl.load(scale_ptr).to(tl.float32)
    tl.store(column_ptr + code, column * factor, mask=inside)


def column_term(
    codebook: torch.Tensor, linear: bool, bias: torch.Tensor | None, factor: float, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Per-code bias of the logits, (N,) fp32: ``factor * scale * |z_n|^2``, linear: ``factor * b_n``.

    scale () is a tensor on the device, or None for 1; linear logits have theirs in the product alone.
    """
    num_codes, width = codebook.shape
    column = torch.empty(num_codes, dtype=torch.float32, device=codebook.device)
    block = 32
    _column_kernel[(triton.cdiv(num_codes, block),)](
        codebook,
        codebook if bias is None else bias,
        scale,
        column,
        num_codes,
        factor,
        D=width,
        LINEAR=linear,
        HAS_BIAS=bias is not None,
        SCALED=scale is not None and not linear,
        BN=block,
        BK=min(128, triton.next_power_of_2(width)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return column
