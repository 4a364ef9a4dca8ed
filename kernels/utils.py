"""Device code that the kernels share: tiles of rows and their products, row order, per-code bias, running argmax.

Every matrix is contiguous in its last dimension and addressed with 64 bits. Rows, codes and channels that overrun are
loaded as zeros, so that any M, N and D will do.
"""

import math

import torch
import triton
import triton.language as tl

# Kernels keep scores in units of log 2, where exp and log are one instruction each.
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

# In fp16 probabilities are kept times this: fp16 has no room for those under 1e-7.
FP16_SCALE = 2.0**15

# Triton's interpreter knows no inline assembly, and takes a bfloat16 operand of tl.dot for an integer.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    row_mask,  # [BM] bool
    first_channel,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Channels first_channel + (0 .. BK - 1) of some rows -> [BM, BK]; zeros outside."""
    channel = first_channel + tl.arange(0, BK)
    address = matrix_ptr + rows[:, None] * D + channel[None, :]
    if D % BK == 0:
        return tl.load(address, mask=row_mask[:, None], other=0.0)
    else:
        return tl.load(address, mask=row_mask[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def load_noise_rows(
    order_ptr,  # (M,) int32
    mask_ptr,  # (M,) bool
    tau_ptr,  # () floating point
    positions,  # [BM] int64
    row_mask,  # [BM] bool
):
    """Rows [BM] int64 at some positions of the order, the stochastic ones among them, and 1 / t of each."""
    rows = tl.load(order_ptr + positions, mask=row_mask, other=0).to(tl.int64)
    stochastic = tl.load(mask_ptr + rows, mask=row_mask, other=0) != 0
    return rows, stochastic, tl.where(stochastic, 1.0 / tl.load(tau_ptr).to(tl.float32), 1.0)


@triton.jit
def product(
    a_ptr,  # (., D)
    a_rows,  # [BM] int64
    a_mask,  # [BM] bool
    b_ptr,  # (., D)
    b_rows,  # [BN] int64
    b_mask,  # [BN] bool
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of a times some rows of b -> [BM, BN] fp32, accumulated in fp32."""
    total = tl.zeros([BM, BN], tl.float32)
    for first_channel in range(0, D, BK):
        a = load_rows(a_ptr, a_rows, a_mask, first_channel, D, BK)
        b = load_rows(b_ptr, b_rows, b_mask, first_channel, D, BK)
        total = multiply(a, b, total, PRECISION)
    return total


@triton.jit
def running_argmax(row_max, row_index, tile_max, scores, first_code, BN: tl.constexpr):
    """Update maxima and indices [BM] with scores [BM, BN] of codes first_code + (0 .. BN - 1), their maxima [BM].

    Tiles come in ascending order of their codes; the smallest code wins a tie. In this form an element costs a
    comparison, a selection and a minimum, whatever the order in which the hardware reduces.
    """
    column = tl.arange(0, BN)[None, :]
    tile_index = first_code + tl.min(tl.where(scores == tile_max[:, None], column, BN), axis=1)
    better = tile_max > row_max
    return tl.where(better, tile_max, row_max), tl.where(better, tile_index, row_index)


@triton.jit(do_not_specialize=["num_rows", "window"])
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
    row_mask = row < length
    stochastic = tl.load(mask_ptr + first + row, mask=row_mask, other=0).to(tl.int32)
    rank = tl.sum(before) + tl.cumsum(stochastic) - stochastic  # stochastic rows ahead of each row
    position = tl.where(stochastic != 0, rank, length - 1 - (row - rank))
    tl.store(order_ptr + first + position, (first + row).to(tl.int32), mask=row_mask)


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
def _code_bias_kernel(
    codes_ptr,  # (N, D), the codes, where DISTANCE
    bias_ptr,  # (N,), where HAS_BIAS
    scale_ptr,  # () floating point, where SCALED
    code_bias_ptr,  # (N,) fp32
    num_codes,
    factor,
    D: tl.constexpr,
    DISTANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    code = tl.program_id(0) * BN + tl.arange(0, BN)
    col_mask = code < num_codes
    bias = tl.zeros([BN], tl.float32)
    if DISTANCE:
        for first_channel in range(0, D, BK):
            z = load_rows(codes_ptr, code.to(tl.int64), col_mask, first_channel, D, BK).to(tl.float32)
            bias += tl.sum(z * z, axis=1)
    elif HAS_BIAS:
        bias = tl.load(bias_ptr + code, mask=col_mask, other=0.0).to(tl.float32)
    if SCALED:
        factor *= tl.load(scale_ptr).to(tl.float32)
    tl.store(code_bias_ptr + code, bias * factor, mask=col_mask)


def code_bias(
    codebook: torch.Tensor,
    factor: float,
    scale: torch.Tensor | None = None,
    *,
    linear: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the per-code bias of the logits, (N,) fp32.

    Distance logits: ``factor * scale * |z_n|^2``, scale () on the device, None for 1. Linear logits: ``factor * b_n``.
    """
    num_codes, width = codebook.shape
    result = torch.empty(num_codes, dtype=torch.float32, device=codebook.device)
    _code_bias_kernel[(triton.cdiv(num_codes, 32),)](
        codebook, bias, None if linear else scale, result, num_codes, factor,
        D=width, DISTANCE=not linear, HAS_BIAS=bias is not None, SCALED=scale is not None and not linear,
        BN=32, BK=min(128, triton.next_power_of_2(width)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return result
