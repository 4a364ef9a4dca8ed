"""One sweep over the codes for every row: scores, Gumbel noise, both argmaxes, log-sum-exp; then what a choice brings.

Shared by ``vector_quantize``, whose file has the formulas, and ``assign_codes``, which needs the best code alone. A
program sweeps the codes for BM rows: no score leaves its registers. Rows are ordered by the mask, so that only tiles
with a stochastic row draw noise. Where rows alone don't fill the GPU the codes are split in parts, and a second kernel
joins the parts in their order.

Deterministic: no reduction depends on the order in which programs run (the selections' counts are integers). Memory:
no M x N tensor; per row the order and, where the codes are split, six numbers a part. The ``chunked`` schedule has a
buffer of scores for each chunk of rows.
"""

import torch
import triton
import triton.language as tl

from regvq_fast.kernels import schedules
from regvq_fast.kernels.noise import gumbel_tile
from regvq_fast.kernels.products import product_fp32, without_tf32
from regvq_fast.kernels.tiles import load_rows, multiply, order_rows, product, running_argmax

# Codes of a part at least: every part loads its rows, and joining parts costs a kernel. With noise, tiles that draw it
# take several times as long as the others: smaller parts let the others fill in.
MIN_PART_CODES = 2048
MIN_NOISY_PART_CODES = 256


@triton.jit
def _sweep(
    x,  # [BM, BK] where D <= BK and not GIVEN
    x_ptr,
    keys_ptr,
    column_ptr,
    scores_ptr,
    rows,  # [BM] int64
    inside,  # [BM]
    first_row,
    noise_rows,  # [BM] int64, global row numbers
    stochastic,  # [BM]
    inverse_t,  # [BM] fp32
    seed,
    any_noise,
    first_code,
    end_code,
    num_codes,
    factor,
    D: tl.constexpr,
    NOISE: tl.constexpr,
    LSE: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Best scores and codes of BM rows, without and with noise, and their running maximum and sum of exponentials."""
    best = tl.full([BM], float("-inf"), tl.float32)
    best_code = tl.zeros([BM], tl.int32)
    top, top_code = best, best_code
    lse_max = best
    lse_sum = tl.zeros([BM], tl.float32)
    for first in range(first_code, end_code, BN):
        code = first + tl.arange(0, BN)
        valid = code < num_codes
        if GIVEN:
            place = scores_ptr + (rows - first_row)[:, None] * num_codes + code[None, :]
            scores = tl.load(place, mask=inside[:, None] & valid[None, :], other=0.0)
        elif D <= BK:
            key = load_rows(keys_ptr, code.to(tl.int64), valid, 0, D, BK)
            scores = multiply(x, key, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            scores = product(
                x_ptr, rows, inside, keys_ptr, code.to(tl.int64), valid, D, BM, BN, BK, PRECISION
            )  # [BM, BN]
        column = tl.load(column_ptr + code, mask=valid, other=float("-inf"))
        scores = scores * factor + column[None, :]
        tile_best = tl.max(scores, axis=1)
        best, best_code = running_argmax(best, best_code, tile_best, scores, first, BN)
        if NOISE:
            if any_noise:
                noise = gumbel_tile(first, noise_rows, seed, BN)
                scores = tl.where(stochastic[:, None], scores + noise, scores)
                tile_best = tl.max(scores, axis=1)
                top, top_code = running_argmax(top, top_code, tile_best, scores, first, BN)
        if LSE:
            new_max = tl.maximum(lse_max, tile_best * inverse_t)
            terms = tl.exp2(scores * inverse_t[:, None] - new_max[:, None])
            lse_sum = lse_sum * tl.exp2(lse_max - new_max) + tl.sum(terms, axis=1)
            lse_max = new_max
    top_code = tl.where(stochastic, top_code, best_code)
    top = tl.where(stochastic, top, best)
    return best, best_code, top, top_code, lse_max, lse_sum


@triton.jit
def _write_rows(
    rows,
    inside,
    code,
    best_code,
    codes_ptr,
    quantized_ptr,
    indices_ptr,
    best_indices_ptr,
    perturbation_ptr,
    counts_ptr,
    num_codes,
    group_rows,
    D: tl.constexpr,
    NOISE: tl.constexpr,
    ASSIGN: tl.constexpr,
    BM: tl.constexpr,
):
    """Write what belongs to the chosen codes of BM rows: the codes themselves, their distance, a count each."""
    tl.store(indices_ptr + rows, code.to(tl.int64), mask=inside)
    if not ASSIGN:
        tl.store(best_indices_ptr + rows, best_code.to(tl.int64), mask=inside)
        tl.atomic_add(counts_ptr + (rows // group_rows) * num_codes + code, 1, mask=inside, sem="relaxed")
        distance = tl.zeros([BM], tl.float32)
        BD: tl.constexpr = 64 if D > 32 else 32
        for first_column in range(0, D, BD):
            column = first_column + tl.arange(0, BD)
            z = load_rows(codes_ptr, code.to(tl.int64), inside, first_column, D, BD)
            place = quantized_ptr + rows[:, None] * D + column[None, :]
            tl.store(place, z, mask=inside[:, None] & (column < D)[None, :])
            if NOISE:
                best = load_rows(codes_ptr, best_code.to(tl.int64), inside, first_column, D, BD)
                difference = z.to(tl.float32) - best.to(tl.float32)
                distance += tl.sum(difference * difference, axis=1)
        tl.store(perturbation_ptr + rows, distance, mask=inside)


@triton.jit
def _vector_quantize_fwd_kernel(
    x_ptr,  # (M, D)
    keys_ptr,  # (N, D): the codes, or the weight of linear logits
    codes_ptr,  # (N, D)
    column_ptr,  # (N,) fp32, in log 2
    scores_ptr,  # (rows of the chunk, N) fp32: x k^T where GIVEN
    order_ptr,  # (M,) int32 row numbers, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    seed_ptr,  # () int64, where NOISE
    row_offset_ptr,  # () int64, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point, unless ASSIGN
    quantized_ptr,  # (M, D)
    indices_ptr,  # (M,) int64
    best_indices_ptr,  # (M,) int64
    perturbation_ptr,  # (M,) fp32
    lse_ptr,  # (M,) fp32, in log 2
    counts_ptr,  # (G, N) int32
    part_values_ptr,  # (parts, 4, M) fp32, where SPLIT
    part_codes_ptr,  # (parts, 2, M) int32, where SPLIT
    first_row,
    end_row,
    num_rows,
    num_codes,
    part_codes,  # codes of a part, a multiple of BN
    num_parts,
    group_rows,
    factor,
    D: tl.constexpr,
    NOISE: tl.constexpr,
    LSE: tl.constexpr,
    ASSIGN: tl.constexpr,
    GIVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # All parts of a tile of rows are neighbours: stochastic tiles, the first and the longest, begin first.
    part = tl.program_id(0) % num_parts
    place = first_row + (tl.program_id(0) // num_parts).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    inside = place < end_row
    first_code = part * part_codes
    end_code = tl.minimum(first_code + part_codes, num_codes)
    if NOISE:
        rows = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64)
        stochastic = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
        seed = tl.load(seed_ptr)
        noise_rows = rows + tl.load(row_offset_ptr)
        inverse_t = tl.where(stochastic, 1.0 / tl.load(tau_ptr).to(tl.float32), 1.0)
        any_noise = tl.max(stochastic.to(tl.int32)) != 0
    else:
        rows = place
        stochastic = tl.zeros([BM], tl.int1)
        seed = tl.program_id(0)  # any number: nothing draws noise
        noise_rows = rows
        inverse_t = tl.full([BM], 1.0, tl.float32)
        any_noise = False
    if not ASSIGN:
        factor *= tl.load(scale_ptr).to(tl.float32)
    # A tile that stays is loaded here, once for both sweeps.
    x = load_rows(x_ptr, rows, inside, 0, D, BK) if D <= BK and not GIVEN else inside
    best, best_code, top, top_code, lse_max, lse_sum = _sweep(
        x, x_ptr, keys_ptr, column_ptr, scores_ptr, rows, inside, first_row, noise_rows, stochastic, inverse_t,
        seed, any_noise, first_code, end_code, num_codes, factor, D, NOISE, LSE, GIVEN, PRECISION, BM, BN, BK,
    )  # fmt: skip
    if SPLIT:
        values = part_values_ptr + part.to(tl.int64) * 4 * num_rows + rows
        codes = part_codes_ptr + part.to(tl.int64) * 2 * num_rows + rows
        tl.store(values, best, mask=inside)
        tl.store(codes, best_code, mask=inside)
        if NOISE:
            tl.store(values + num_rows, top, mask=inside)
            tl.store(codes + num_rows, top_code, mask=inside)
        if LSE:
            tl.store(values + 2 * num_rows, lse_max, mask=inside)
            tl.store(values + 3 * num_rows, lse_sum, mask=inside)
    else:
        _write_rows(
            rows, inside, top_code, best_code, codes_ptr, quantized_ptr, indices_ptr, best_indices_ptr,
            perturbation_ptr, counts_ptr, num_codes, group_rows, D, NOISE, ASSIGN, BM,
        )  # fmt: skip
        if LSE:
            tl.store(lse_ptr + rows, lse_max + tl.log2(lse_sum), mask=inside)


@triton.jit
def _join_parts_kernel(
    codes_ptr,
    quantized_ptr,
    indices_ptr,
    best_indices_ptr,
    perturbation_ptr,
    lse_ptr,
    counts_ptr,
    part_values_ptr,  # (parts, 4, M) fp32
    part_codes_ptr,  # (parts, 2, M) int32
    num_rows,
    num_codes,
    num_parts,
    group_rows,
    D: tl.constexpr,
    NOISE: tl.constexpr,
    LSE: tl.constexpr,
    ASSIGN: tl.constexpr,
    BM: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < num_rows
    best = tl.full([BM], float("-inf"), tl.float32)
    best_code = tl.zeros([BM], tl.int32)
    top, top_code = best, best_code
    lse_max = best
    lse_sum = tl.zeros([BM], tl.float32)
    values, codes = part_values_ptr + rows, part_codes_ptr + rows
    for _ in range(num_parts):
        value = tl.load(values, mask=inside, other=0.0)
        # Strictly better: the earlier part has the smaller codes.
        best_code = tl.where(value > best, tl.load(codes, mask=inside, other=0), best_code)
        best = tl.where(value > best, value, best)
        if NOISE:
            value = tl.load(values + num_rows, mask=inside, other=0.0)
            top_code = tl.where(value > top, tl.load(codes + num_rows, mask=inside, other=0), top_code)
            top = tl.where(value > top, value, top)
        if LSE:
            part_max = tl.load(values + 2 * num_rows, mask=inside, other=0.0)
            part_sum = tl.load(values + 3 * num_rows, mask=inside, other=1.0)
            new_max = tl.maximum(lse_max, part_max)
            lse_sum = lse_sum * tl.exp2(lse_max - new_max) + part_sum * tl.exp2(part_max - new_max)
            lse_max = new_max
        values += 4 * num_rows
        codes += 2 * num_rows
    if not NOISE:
        top_code = best_code
    _write_rows(
        rows, inside, top_code, best_code, codes_ptr, quantized_ptr, indices_ptr, best_indices_ptr,
        perturbation_ptr, counts_ptr, num_codes, group_rows, D, NOISE, ASSIGN, BM,
    )  # fmt: skip
    if LSE:
        tl.store(lse_ptr + rows, lse_max + tl.log2(lse_sum), mask=inside)


def run_sweep(
    kernel: str,
    x: torch.Tensor,
    keys: torch.Tensor,
    codebook: torch.Tensor,
    column: torch.Tensor,
    factor: float,
    scale: torch.Tensor | None,  # (), None for 1
    noise: tuple[torch.Tensor | None, ...],  # mask, seed, row_offset, tau
    outputs: tuple[torch.Tensor | None, ...],  # quantized, indices, best_indices, perturbation, lse, counts
    group_rows: int,
) -> None:
    """Sweep all rows, chunk by chunk where the products come from cuBLAS, and join the parts of the codes."""
    (num_rows, width), num_codes = x.shape, codebook.shape[0]
    if num_rows == 0:
        if outputs[5] is not None:
            outputs[5].zero_()
        return
    how = schedules.schedule(x.device)
    given, chunk = how == "chunked", schedules.chunk_rows(num_codes)
    step = chunk if given else num_rows
    order = None if noise[0] is None else order_rows(noise[0], min(step, schedules.ORDER_WINDOW))
    lse, counts = outputs[4:]
    flags = {
        "D": width,
        "NOISE": order is not None,
        "LSE": lse is not None and lse.numel() > 0,
        "ASSIGN": kernel == "assign_codes",
    }

    def sweep(tile: schedules.Tile) -> None:
        least = MIN_PART_CODES if order is None or given else MIN_NOISY_PART_CODES
        waves = 1 if order is None else schedules.NOISY_WAVES
        part_codes = schedules.part_codes(min(step, num_rows), num_codes, tile, least, x.device, waves)
        num_parts = triton.cdiv(num_codes, part_codes)
        split = num_parts > 1
        part_values = x.new_empty(num_parts, 4, num_rows, dtype=torch.float32) if split else None
        part_indices = x.new_empty(num_parts, 2, num_rows, dtype=torch.int32) if split else None
        if counts is not None:
            counts.zero_()
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            scores = None
            if given:
                with without_tf32(x.device):
                    scores = product_fp32(x[start:end], keys.t())
            _vector_quantize_fwd_kernel[(triton.cdiv(end - start, tile.BM) * num_parts,)](
                x, keys, codebook, column, scores, order, *noise, scale, *outputs, part_values, part_indices,
                start, end, num_rows, num_codes, part_codes, num_parts, group_rows, factor,
                GIVEN=given, SPLIT=split, PRECISION=schedules.precision(x.dtype), **flags, **tile.options(),
            )  # fmt: skip
        if split:
            _join_parts_kernel[(triton.cdiv(num_rows, 32),)](
                codebook, *outputs, part_values, part_indices, num_rows, num_codes, num_parts, group_rows,
                BM=32, num_warps=4, enable_fp_fusion=True, **flags,
            )  # fmt: skip

    kind = (num_codes, triton.next_power_of_2(num_rows), *flags.values())
    schedules.run(kernel, how, x.dtype, width, kind, x.device, sweep)
