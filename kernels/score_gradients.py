"""The two sweeps of ``vector_quantize``'s backward over a chunk of rows: probabilities, then gradients of the scores.

The formulas and how the sweeps are used are in ``vector_quantize_backward.py``:

    p = exp(u - lse),    sum p dP and sum p of every row            probabilities_kernel
    f dS = f p (dP - r) / t,    its sums over the rows              grad_scores_kernel

Scores and dP = dQ z^T + dA / R are multiplied in the tiles, or read where GIVEN. Deterministic: every element has one
writer. Memory: what the arguments are.
"""

import triton
import triton.language as tl

from regvq_fast.kernels.noise import gumbel_tile
from regvq_fast.kernels.tiles import load_rows, multiply, product


@triton.jit
def _tile_rows(order_ptr, mask_ptr, first_row, end_row, block, NOISE: tl.constexpr, BM: tl.constexpr):
    """Row numbers [BM] int64 of a tile, which of them there are, and which are stochastic."""
    place = first_row + block.to(tl.int64) * BM + tl.arange(0, BM)
    inside = place < end_row
    if NOISE:
        rows = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64)
        stochastic = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
    else:
        rows, stochastic = place, inside
    return rows, inside, stochastic


@triton.jit
def _grad_probabilities(
    products,  # [BM, BN] fp32, dQ z^T
    grad_posterior_ptr,  # (G, N) fp32, over R
    rows,
    inside,
    code,
    valid,
    num_codes,
    group_rows,
    POSTERIOR: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """dP of a tile; zero beyond the last code."""
    if POSTERIOR:
        if ONE_GROUP:
            return products + tl.load(grad_posterior_ptr + code, mask=valid, other=0.0)[None, :]
        else:
            place = grad_posterior_ptr + (rows // group_rows)[:, None] * num_codes + code[None, :]
            return products + tl.load(place, mask=inside[:, None] & valid[None, :], other=0.0)
    else:
        return products


@triton.jit
def probabilities_kernel(
    x_ptr,  # (M, D)
    keys_ptr,  # (N, D): the codes, or the weight where LINEAR
    codes_ptr,  # (N, D)
    column_ptr,  # (N,) fp32, in log 2
    grad_quantized_ptr,  # (M, D)
    grad_posterior_ptr,  # (G, N) fp32, where POSTERIOR
    scores_ptr,  # (rows of the chunk, N) fp32: x k^T where GIVEN
    products_ptr,  # (rows of the chunk, N) fp32: dQ z^T where GIVEN
    lse_ptr,  # (M,) fp32, in log 2
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    seed_ptr,  # () int64, where NOISE
    row_offset_ptr,  # () int64, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    p_ptr,  # (rows of the chunk, N)
    shares_ptr,  # (rows of the chunk, 2, parts) fp32: shares of sum p dP and of sum p
    first_row,
    end_row,
    num_codes,
    part_codes,  # codes of a part, a multiple of BN
    num_parts,
    group_rows,
    factor,
    p_scale,
    D: tl.constexpr,
    LINEAR: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # All parts of a tile of rows are neighbours: stochastic tiles, the first and the longest, begin first.
    block, part = tl.program_id(0) // num_parts, tl.program_id(0) % num_parts
    rows, inside, stochastic = _tile_rows(order_ptr, mask_ptr, first_row, end_row, block, NOISE, BM)
    buffer_row = (rows - first_row)[:, None] * num_codes  # [BM, 1]
    if NOISE:
        any_noise = tl.max(stochastic.to(tl.int32)) != 0
        noise_rows, seed = rows + tl.load(row_offset_ptr), tl.load(seed_ptr)
        inverse_t = tl.where(stochastic, 1.0 / tl.load(tau_ptr).to(tl.float32), 1.0)
    if D <= BK and not GIVEN:  # tiles that stay
        x = load_rows(x_ptr, rows, inside, 0, D, BK)
        grad_quantized = load_rows(grad_quantized_ptr, rows, inside, 0, D, BK)
    factor *= tl.load(scale_ptr).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    share = tl.zeros([BM], tl.float32)
    p_sum = tl.zeros([BM], tl.float32)
    first_code = part * part_codes
    for first in range(first_code, tl.minimum(first_code + part_codes, num_codes), BN):
        code = first + tl.arange(0, BN)
        valid = code < num_codes
        both = inside[:, None] & valid[None, :]
        wide_code = code.to(tl.int64)
        if GIVEN:
            scores = tl.load(scores_ptr + buffer_row + code[None, :], mask=both, other=0.0)
            products = tl.load(products_ptr + buffer_row + code[None, :], mask=both, other=0.0)
        elif D <= BK:
            z = load_rows(codes_ptr, wide_code, valid, 0, D, BK)
            key = load_rows(keys_ptr, wide_code, valid, 0, D, BK) if LINEAR else z
            scores = multiply(x, key, tl.zeros([BM, BN], tl.float32), PRECISION)
            products = multiply(grad_quantized, z, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            scores = product(x_ptr, rows, inside, keys_ptr, wide_code, valid, D, BM, BN, BK, PRECISION)
            products = product(grad_quantized_ptr, rows, inside, codes_ptr, wide_code, valid, D, BM, BN, BK, PRECISION)
        scores = scores * factor + tl.load(column_ptr + code, mask=valid, other=float("-inf"))[None, :]
        if NOISE:
            if any_noise:
                noise = gumbel_tile(first, noise_rows, seed, BN)
                scores = tl.where(stochastic[:, None], scores + noise, scores) * inverse_t[:, None]
        p = tl.exp2(scores - lse[:, None])
        tl.store(p_ptr + buffer_row + code[None, :], (p * p_scale).to(p_ptr.dtype.element_ty), mask=both)
        grad = _grad_probabilities(
            products, grad_posterior_ptr, rows, inside, code, valid, num_codes, group_rows, POSTERIOR, ONE_GROUP
        )
        share += tl.sum(p * grad, axis=1)
        p_sum += tl.sum(p, axis=1)
    place = shares_ptr + (rows - first_row) * 2 * num_parts + part
    tl.store(place, share, mask=inside)
    tl.store(place + num_parts, p_sum, mask=inside)


@triton.jit
def grad_scores_kernel(
    codes_ptr,  # (N, D)
    grad_quantized_ptr,  # (M, D)
    grad_posterior_ptr,  # (G, N) fp32, where POSTERIOR
    products_ptr,  # (rows of the chunk, N) fp32: dQ z^T where GIVEN
    row_sums_ptr,  # (rows of the chunk, 2) fp32: sum p dP and sum p
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    magnitude_ptr,  # () fp32, where SCALED
    p_ptr,  # (rows of the chunk, N)
    grad_scores_ptr,  # (rows of the chunk, N): f dS, over the magnitude where SCALED
    column_shares_ptr,  # (tiles of rows, N) fp32, where COLUMN: sums over a tile's rows
    first_row,
    end_row,
    num_codes,
    part_codes,  # codes of a part, a multiple of BN
    group_rows,
    p_scale,
    factor,
    D: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    SCALED: tl.constexpr,
    COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rows, inside, stochastic = _tile_rows(order_ptr, mask_ptr, first_row, end_row, tl.program_id(0), NOISE, BM)
    buffer_row = (rows - first_row)[:, None] * num_codes  # [BM, 1]
    row_factor = tl.full([BM], 1.0, tl.float32) * (factor * tl.load(scale_ptr).to(tl.float32) / p_scale)
    if NOISE:
        row_factor = tl.where(stochastic, row_factor / tl.load(tau_ptr).to(tl.float32), row_factor)
    if SCALED:
        row_factor /= tl.load(magnitude_ptr)
    if D <= BK and not GIVEN:  # a tile that stays
        grad_quantized = load_rows(grad_quantized_ptr, rows, inside, 0, D, BK)
    place = row_sums_ptr + (rows - first_row) * 2
    row_sum = tl.load(place, mask=inside, other=0.0) / tl.load(place + 1, mask=inside, other=1.0)
    first_code = tl.program_id(1) * part_codes
    for first in range(first_code, tl.minimum(first_code + part_codes, num_codes), BN):
        code = first + tl.arange(0, BN)
        valid = code < num_codes
        both = inside[:, None] & valid[None, :]
        wide_code = code.to(tl.int64)
        # Ahead of the product, which then hides the way to memory.
        p = tl.load(p_ptr + buffer_row + code[None, :], mask=both, other=0.0)
        if GIVEN:
            products = tl.load(products_ptr + buffer_row + code[None, :], mask=both, other=0.0)
        elif D <= BK:
            z = load_rows(codes_ptr, wide_code, valid, 0, D, BK)
            products = multiply(grad_quantized, z, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            products = product(grad_quantized_ptr, rows, inside, codes_ptr, wide_code, valid, D, BM, BN, BK, PRECISION)
        grad = _grad_probabilities(
            products, grad_posterior_ptr, rows, inside, code, valid, num_codes, group_rows, POSTERIOR, ONE_GROUP
        )
        grad = p.to(tl.float32) * (grad - row_sum[:, None]) * row_factor[:, None]
        tl.store(grad_scores_ptr + buffer_row + code[None, :], grad.to(grad_scores_ptr.dtype.element_ty), mask=both)
        if COLUMN:
            share = tl.sum(tl.where(inside[:, None], grad, 0.0), axis=0)
            tl.store(column_shares_ptr + tl.program_id(0).to(tl.int64) * num_codes + code, share, mask=valid)
