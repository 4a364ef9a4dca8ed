"""Device code shared by the kernels: tiles of rows and their products, row order, per-code bias, running argmax.

Matrices are contiguous and addressed with 64 bits. Rows, codes and channels out of range are loaded as zeros, so any
M, N and D work.
"""

import math

import torch
import triton
import triton.language as tl

# Kernels keep scores in units of log 2, where exp and log are one instruction each.
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

# Factor of probabilities stored in fp16, whose smallest positive number is 6e-8.
FP16_SCALE = 2.0**15

# Triton's interpreter has no inline assembly, and treats a bfloat16 operand of tl.dot as an integer.
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
    """Load channels first_channel + (0 .. BK - 1) of some rows -> [BM, BK]; zeros out of range."""
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
    """Return the rows [BM] int64 at some positions of the order, whether each is stochastic, and its 1 / t."""
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
    """Multiply some rows of a with some rows of b -> [BM, BN] fp32, accumulated in fp32."""
    total = tl.zeros([BM, BN], tl.float32)
    for first_channel in range(0, D, BK):
        a = load_rows(a_ptr, a_rows, a_mask, first_channel, D, BK)
        b = load_rows(b_ptr, b_rows, b_mask, first_channel, D, BK)
        total = multiply(a, b, total, PRECISION)
    return total


@triton.jit
def running_argmax(row_max, row_index, tile_max, scores, first_code, BN: tl.constexpr):
    """Update maxima and indices [BM] with scores [BM, BN] of codes first_code + (0 .. BN - 1), their maxima [BM].

    Tiles come in ascending order of their codes; the smallest code wins a tie, in whatever order the hardware reduces.
    Each element costs a comparison, a selection and a minimum.
    """
    column = tl.arange(0, BN)[None, :]
    tile_index = first_code + tl.min(tl.where(scores == tile_max[:, None], column, BN), axis=1)
    better = tile_max > row_max
    return tl.where(better, tile_max, row_max), tl.where(better, tile_index, row_index)


@triton.jit
def _order_rows(mask_ptr, order_ptr, num_rows, window, program, BLOCK: tl.constexpr):
    """Write the positions of BLOCK rows of a window in its order: stochastic rows forward, the others from its end."""
    blocks = tl.cdiv(window, BLOCK)
    block = program % blocks * BLOCK  # the first row of this program, within its window
    first = (program // blocks).to(tl.int64) * window
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


@triton.jit(do_not_specialize=["counts_size", "num_rows", "window", "num_order_programs", "num_bias_programs"])
def _prepare_kernel(
    codes_ptr,  # (N, D)
    bias_ptr,  # (N,), where HAS_BIAS
    scale_ptr,  # () floating point, where SCALED
    code_bias_ptr,  # (N,) fp32
    counts_ptr,  # (counts_size,) int32, set to 0, where COUNTS
    mask_ptr,  # (M,) bool, where NOISE
    order_ptr,  # (M,) int32, where NOISE
    num_codes,
    counts_size,
    num_rows,
    window,
    num_order_programs,
    num_bias_programs,
    factor,
    D: tl.constexpr,
    DISTANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    NOISE: tl.constexpr,
    COUNTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Order rows, compute the per-code bias or clear counts: each program does one of the three."""
    program = tl.program_id(0)
    if program < num_order_programs:
        if NOISE:
            _order_rows(mask_ptr, order_ptr, num_rows, window, program, BLOCK)
    elif program < num_order_programs + num_bias_programs:
        code = (program - num_order_programs) * BN + tl.arange(0, BN)
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
    elif COUNTS:
        element = (program - num_order_programs - num_bias_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(counts_ptr + element, tl.zeros([BLOCK], tl.int32), mask=element < counts_size)


def prepare(
    codebook: torch.Tensor,
    factor: float,
    scale: torch.Tensor | None = None,
    *,
    linear: bool = False,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    window: int = 1,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the per-code bias and the row order, and clear the counts, in one launch.

    Args:
        codebook: (N, D).
        factor, scale: factors of the bias; scale is a () tensor on the device, or None for 1.
        linear, bias: linear logits, and their (N,) bias or None for 0.
        mask: (M,) bool; None if no row is stochastic.
        window: number of consecutive rows that are ordered together.
        counts: int32 of any shape, set to 0.

    Returns:
        The per-code bias, (N,) fp32: ``factor * scale * |z_n|^2``, or ``factor * b_n`` for linear logits. The row
        numbers (M,) int32, in each window the stochastic rows first, so that few tiles compute noise.
    """
    (num_codes, width), device = codebook.shape, codebook.device
    code_bias = torch.empty(num_codes, dtype=torch.float32, device=device)
    num_rows = 0 if mask is None else mask.shape[0]
    order = None if mask is None else torch.empty(num_rows, dtype=torch.int32, device=device)
    block, codes_of_a_program = 1024, 32
    window = max(1, min(window, num_rows))
    counts_size = 0 if counts is None else counts.numel()
    num_order = triton.cdiv(num_rows, window) * triton.cdiv(window, block) if num_rows else 0
    num_bias = triton.cdiv(num_codes, codes_of_a_program)
    _prepare_kernel[(num_order + num_bias + triton.cdiv(counts_size, block),)](
        codebook, bias, None if linear else scale, code_bias, counts, mask, order,
        num_codes, counts_size, num_rows, window, num_order, num_bias, factor,
        D=width, DISTANCE=not linear, HAS_BIAS=bias is not None, SCALED=scale is not None and not linear,
        NOISE=order is not None, COUNTS=counts is not None, BN=codes_of_a_program,
        BK=min(128, triton.next_power_of_2(width)), BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return code_bias, order
