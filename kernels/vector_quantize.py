"""Regularized vector quantization, forward: distances, Gumbel noise, both argmaxes and the look-up in one sweep.

Reg-VQ (Zhang et al., CVPR 2023), section 3.2 and Algorithm 1. Per row m, over the codes n,

    s[m,n] = factor * scale * x_m . k_n + bias[n]      distance:  k the codes,  factor 2, bias -scale |z_n|^2
                                                       linear:    k the weight, factor 1, bias b_n
    best_index = argmax s,    index = argmax (s + g) on stochastic rows,    lse = log sum exp ((s + g) / t)

with everything in units of log 2. The posterior counts the selections over the (valid) rows of a group.

A program sweeps the codes for BM rows and keeps their scores in registers. Rows are ordered by the mask, so that only
tiles with a stochastic row compute noise. If the rows alone do not fill the GPU, the codes are split, and a second
kernel combines the splits in their order. Each head has its own programs; its rows lie H D elements apart.
``assign_codes`` is the same sweep without noise, softmax and look-up.

Deterministic: no reduction depends on the order in which programs run (atomics add integers only). Memory: no M x N
tensor; the per-code bias; the counts (G, H, N); the order of the rows; six numbers per row, head and split if the codes
are split. The ``chunked`` schedule adds a buffer of scores of one chunk of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from regvq_fast.dispatch import (
    NOISY_WAVES,
    ORDER_WINDOW,
    Inputs,
    chunk_rows,
    codes_per_split,
    dot_precision,
    is_chunked,
    pinned_tile,
)
from regvq_fast.kernels.noise import first_noise_code, gumbel_tile
from regvq_fast.kernels.utils import (
    LOG2_E,
    load_noise_rows,
    load_rows,
    multiply,
    prepare,
    product,
    running_argmax,
)
from regvq_fast.matmul import product_fp32, without_tf32

# Fewest codes of a split: every split loads its rows again, and combining the splits costs a kernel. Tiles with noise
# take several times as long as the others; smaller splits balance the load.
MIN_SPLIT_CODES = 2048
MIN_NOISY_SPLIT_CODES = 256


@triton.jit
def _write_rows(
    vectors,  # [BM] int64: row * H + head
    row_mask,  # [BM]
    index,  # [BM] int32
    best_index,  # [BM] int32
    codes_ptr,
    quantized_ptr,
    indices_ptr,
    best_indices_ptr,
    perturbation_ptr,
    counts_ptr,
    valid_ptr,
    num_codes,
    group_rows,
    D: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    ASSIGN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Write selected codes, indices and perturbation of BM vectors, and count the selections."""
    tl.store(indices_ptr + vectors, index.to(tl.int64), mask=row_mask)
    if not ASSIGN:
        tl.store(best_indices_ptr + vectors, best_index.to(tl.int64), mask=row_mask)
        counted = row_mask
        if HAS_VALID:
            counted &= tl.load(valid_ptr + vectors // H, mask=row_mask, other=0) != 0
        heads = vectors // H // group_rows * H + vectors % H  # rows of (G H, N)
        tl.atomic_add(counts_ptr + heads * num_codes + index, 1, mask=counted, sem="relaxed")
        perturbation = tl.zeros(vectors.shape, tl.float32)
        first_code = vectors % H * num_codes
        BD: tl.constexpr = 64 if D > 32 else 32
        for first_channel in range(0, D, BD):
            channel = first_channel + tl.arange(0, BD)
            z = load_rows(codes_ptr, first_code + index.to(tl.int64), row_mask, first_channel, D, BD)
            address = quantized_ptr + vectors[:, None] * D + channel[None, :]
            tl.store(address, z, mask=row_mask[:, None] & (channel < D)[None, :])
            if NOISE:
                best = load_rows(codes_ptr, first_code + best_index.to(tl.int64), row_mask, first_channel, D, BD)
                difference = z.to(tl.float32) - best.to(tl.float32)
                perturbation += tl.sum(difference * difference, axis=1)
        tl.store(perturbation_ptr + vectors, perturbation, mask=row_mask)


@triton.jit(do_not_specialize=["first_row", "end_row", "num_vectors", "num_splits", "group_rows"])
def _vector_quantize_fwd_kernel(
    x_ptr,  # (M, H, D)
    logit_weight_ptr,  # (H, N, D): the codes, or the weight of linear logits
    codes_ptr,  # (H, N, D)
    code_bias_ptr,  # (H, N) fp32, in log 2
    scores_ptr,  # (H, rows of the chunk, N) fp32: x k^T, where HAS_SCORES
    order_ptr,  # (M,) int32 row numbers, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    seed_ptr,  # () int64, where NOISE
    row_offset_ptr,  # () int64, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point, unless ASSIGN
    quantized_ptr,  # (M, H, D)
    indices_ptr,  # (M, H) int64
    best_indices_ptr,  # (M, H) int64
    perturbation_ptr,  # (M, H) fp32
    lse_ptr,  # (M, H) fp32, in log 2
    counts_ptr,  # (G, H, N) int32
    valid_ptr,  # (M,) bool, where HAS_VALID
    split_values_ptr,  # (splits, 4, M H) fp32, where SPLIT
    split_indices_ptr,  # (splits, 2, M H) int32, where SPLIT
    first_row,
    end_row,
    num_vectors,  # M H
    num_codes,
    split_codes,  # codes of a split, a multiple of BN
    num_splits,
    group_rows,
    factor,
    D: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    LSE: tl.constexpr,
    ASSIGN: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Splits of a tile of rows are adjacent programs: stochastic tiles come first and take longest, so they start first.
    split = tl.program_id(0) % num_splits
    rows = first_row + (tl.program_id(0) // num_splits).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    row_mask = rows < end_row
    if NOISE:
        rows, stochastic, inverse_t = load_noise_rows(order_ptr, mask_ptr, tau_ptr, rows, row_mask)
        any_noise = tl.max(stochastic.to(tl.int32)) != 0
        noise_rows, seed = rows + tl.load(row_offset_ptr), tl.load(seed_ptr)
    else:
        inverse_t = tl.full([BM], 1.0, tl.float32)
    vectors, noise_code = rows, 0
    if H > 1:
        head = tl.program_id(1).to(tl.int64)
        vectors = rows * H + head
        noise_code = first_noise_code(tl.program_id(1), num_codes)
        logit_weight_ptr += head * num_codes * D
        code_bias_ptr += head * num_codes
        if HAS_SCORES:
            scores_ptr += head * (end_row - first_row) * num_codes
    if not ASSIGN:
        factor *= tl.load(scale_ptr).to(tl.float32)
    if D <= BK and not HAS_SCORES:
        x = load_rows(x_ptr, vectors, row_mask, 0, D, BK)  # loaded once, for all codes

    best_max = tl.full([BM], float("-inf"), tl.float32)
    best_index = tl.zeros([BM], tl.int32)
    noisy_max, noisy_index = best_max, best_index
    lse_max = best_max
    lse_sum = tl.zeros([BM], tl.float32)
    first_code = split * split_codes
    for first in range(first_code, tl.minimum(first_code + split_codes, num_codes), BN):
        code = first + tl.arange(0, BN)
        col_mask = code < num_codes
        if HAS_SCORES:
            address = scores_ptr + (rows - first_row)[:, None] * num_codes + code[None, :]
            scores = tl.load(address, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        elif D <= BK:
            k = load_rows(logit_weight_ptr, code.to(tl.int64), col_mask, 0, D, BK)
            scores = multiply(x, k, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            scores = product(
                x_ptr, vectors, row_mask, logit_weight_ptr, code.to(tl.int64), col_mask, D, BM, BN, BK, PRECISION
            )  # [BM, BN]
        bias = tl.load(code_bias_ptr + code, mask=col_mask, other=float("-inf"))
        scores = scores * factor + bias[None, :]
        tile_max = tl.max(scores, axis=1)
        best_max, best_index = running_argmax(best_max, best_index, tile_max, scores, first, BN)
        if NOISE:
            if any_noise:
                noise = gumbel_tile(noise_code + first, noise_rows, seed, BN)
                scores = tl.where(stochastic[:, None], scores + noise, scores)
                tile_max = tl.max(scores, axis=1)
                noisy_max, noisy_index = running_argmax(noisy_max, noisy_index, tile_max, scores, first, BN)
        if LSE:
            new_max = tl.maximum(lse_max, tile_max * inverse_t)
            terms = tl.exp2(scores * inverse_t[:, None] - new_max[:, None])
            lse_sum = lse_sum * tl.exp2(lse_max - new_max) + tl.sum(terms, axis=1)
            lse_max = new_max
    if NOISE:
        noisy_max = tl.where(stochastic, noisy_max, best_max)
        noisy_index = tl.where(stochastic, noisy_index, best_index)
    else:
        noisy_index = best_index

    if SPLIT:
        values = split_values_ptr + split.to(tl.int64) * 4 * num_vectors + vectors
        indices = split_indices_ptr + split.to(tl.int64) * 2 * num_vectors + vectors
        tl.store(values, best_max, mask=row_mask)
        tl.store(indices, best_index, mask=row_mask)
        if NOISE:
            tl.store(values + num_vectors, noisy_max, mask=row_mask)
            tl.store(indices + num_vectors, noisy_index, mask=row_mask)
        if LSE:
            tl.store(values + 2 * num_vectors, lse_max, mask=row_mask)
            tl.store(values + 3 * num_vectors, lse_sum, mask=row_mask)
    else:
        _write_rows(
            vectors, row_mask, noisy_index, best_index, codes_ptr, quantized_ptr, indices_ptr, best_indices_ptr,
            perturbation_ptr, counts_ptr, valid_ptr, num_codes, group_rows, D, H, NOISE, ASSIGN, HAS_VALID,
        )  # fmt: skip
        if LSE:
            tl.store(lse_ptr + vectors, lse_max + tl.log2(lse_sum), mask=row_mask)


@triton.jit(do_not_specialize=["num_vectors", "num_splits", "group_rows"])
def _combine_splits_kernel(
    codes_ptr,
    quantized_ptr,
    indices_ptr,
    best_indices_ptr,
    perturbation_ptr,
    lse_ptr,
    counts_ptr,
    valid_ptr,
    split_values_ptr,  # (splits, 4, M H) fp32
    split_indices_ptr,  # (splits, 2, M H) int32
    num_vectors,
    num_codes,
    num_splits,
    group_rows,
    D: tl.constexpr,
    H: tl.constexpr,
    NOISE: tl.constexpr,
    LSE: tl.constexpr,
    ASSIGN: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BM: tl.constexpr,
):
    vectors = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_mask = vectors < num_vectors
    best_max = tl.full([BM], float("-inf"), tl.float32)
    best_index = tl.zeros([BM], tl.int32)
    noisy_max, noisy_index = best_max, best_index
    lse_max = best_max
    lse_sum = tl.zeros([BM], tl.float32)
    values, indices = split_values_ptr + vectors, split_indices_ptr + vectors
    for _ in range(num_splits):
        value = tl.load(values, mask=row_mask, other=0.0)
        # Strictly better: among equals the earlier split has the smaller code.
        best_index = tl.where(value > best_max, tl.load(indices, mask=row_mask, other=0), best_index)
        best_max = tl.where(value > best_max, value, best_max)
        if NOISE:
            value = tl.load(values + num_vectors, mask=row_mask, other=0.0)
            index = tl.load(indices + num_vectors, mask=row_mask, other=0)
            noisy_index = tl.where(value > noisy_max, index, noisy_index)
            noisy_max = tl.where(value > noisy_max, value, noisy_max)
        if LSE:
            split_max = tl.load(values + 2 * num_vectors, mask=row_mask, other=0.0)
            split_sum = tl.load(values + 3 * num_vectors, mask=row_mask, other=1.0)
            new_max = tl.maximum(lse_max, split_max)
            lse_sum = lse_sum * tl.exp2(lse_max - new_max) + split_sum * tl.exp2(split_max - new_max)
            lse_max = new_max
        values += 4 * num_vectors
        indices += 2 * num_vectors
    if not NOISE:
        noisy_index = best_index
    _write_rows(
        vectors, row_mask, noisy_index, best_index, codes_ptr, quantized_ptr, indices_ptr, best_indices_ptr,
        perturbation_ptr, counts_ptr, valid_ptr, num_codes, group_rows, D, H, NOISE, ASSIGN, HAS_VALID,
    )  # fmt: skip
    if LSE:
        tl.store(lse_ptr + vectors, lse_max + tl.log2(lse_sum), mask=row_mask)


@triton.jit(do_not_specialize=["group_rows"])
def _posterior_kernel(
    counts_ptr,  # (G, H, N) int32
    posterior_ptr,  # (G, H, N) fp32
    valid_rows_ptr,  # (G,) int64: valid rows of a group, where HAS_VALID
    size,  # G H N
    codes_of_all_heads,  # H N
    group_rows,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + element, mask=element < size, other=0).to(tl.float32)
    rows = tl.full([BLOCK], group_rows, tl.float32)
    if HAS_VALID:
        rows = tl.load(valid_rows_ptr + element // codes_of_all_heads, mask=element < size, other=1).to(tl.float32)
        rows = tl.maximum(rows, 1.0)
    # Correctly rounded; PyTorch would multiply by the rounded inverse.
    fraction = tl.div_rn(counts, rows)
    tl.store(posterior_ptr + element, fraction, mask=element < size)


class Outputs(NamedTuple):
    """Outputs of a sweep; ``assign_codes`` has indices only."""

    quantized: torch.Tensor | None
    indices: torch.Tensor
    best_indices: torch.Tensor | None
    perturbation: torch.Tensor | None
    lse: torch.Tensor | None
    counts: torch.Tensor | None


def sweep_codes(
    x: torch.Tensor, codebook: torch.Tensor, outputs: Outputs, a: Inputs | None = None, group_rows: int = 1
) -> None:
    """Launch the sweep for contiguous arguments, one launch per chunk of rows if cuBLAS computes the products.

    ``a`` holds the arguments of ``vector_quantize``; None for ``assign_codes``.
    """
    num_rows, num_codes, width, device = len(x), codebook.shape[-2], x.shape[-1], x.device
    heads = codebook.numel() // (num_codes * width)
    chunked = is_chunked(device)
    step = max(1, min(num_rows, chunk_rows(heads * num_codes) if chunked else num_rows))
    if a is None:
        mask = seed = row_offset = tau = scale = valid = order = None
        logit_weight, factor = codebook, 1.0
        bias, _ = prepare(codebook.flatten(0, -2), -0.5)
    else:
        mask, seed, row_offset, tau, scale, valid = a.mask, a.seed, a.row_offset, a.tau, a.scale, a.valid
        logit_weight, factor, bias, order = prepare_logits(a, min(step, ORDER_WINDOW), outputs.counts)
    if num_rows == 0:
        return
    tile = pinned_tile("assign_codes" if a is None else "vector_quantize", x.dtype, width, device)
    least = MIN_SPLIT_CODES if order is None or chunked else MIN_NOISY_SPLIT_CODES
    split_codes = codes_per_split(heads * step, num_codes, tile, least, device, 1 if order is None else NOISY_WAVES)
    num_splits = triton.cdiv(num_codes, split_codes)
    split_values = split_indices = None
    if num_splits > 1:
        split_values = x.new_empty(num_splits, 4, num_rows * heads, dtype=torch.float32)
        split_indices = x.new_empty(num_splits, 2, num_rows * heads, dtype=torch.int32)
    flags = {"D": width, "H": heads, "NOISE": order is not None, "LSE": outputs.lse is not None, "ASSIGN": a is None}
    flags["HAS_VALID"] = valid is not None
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        scores = None
        if chunked:
            with without_tf32(device):
                scores = product_fp32(by_head(x[start:end]), logit_weight.mT)
        _vector_quantize_fwd_kernel[(triton.cdiv(end - start, tile.BM) * num_splits, heads)](
            x, logit_weight, codebook, bias, scores, order, mask, seed, row_offset, tau, scale,
            *outputs, valid, split_values, split_indices,
            start, end, num_rows * heads, num_codes, split_codes, num_splits, group_rows, factor,
            HAS_SCORES=chunked, SPLIT=num_splits > 1, PRECISION=dot_precision(x.dtype), **flags, **tile.options(),
        )  # fmt: skip
    if num_splits > 1:
        _combine_splits_kernel[(triton.cdiv(num_rows * heads, 32),)](
            codebook, *outputs, valid, split_values, split_indices, num_rows * heads, num_codes, num_splits, group_rows,
            BM=32, num_warps=4, enable_fp_fusion=True, **flags,
        )  # fmt: skip


def prepare_logits(
    a: Inputs, window: int, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, float, torch.Tensor, torch.Tensor | None]:
    """Return k ([H], N, D), the factor of scale * x . k, per-code bias (H N,) and row order (M,); set ``counts`` to 0.

    Factor and bias are in log 2. Forward and backward use the same.
    """
    linear = a.weight is not None
    bias, order = prepare(
        a.codebook.flatten(0, -2), LOG2_E if linear else -LOG2_E, a.scale, linear=linear,
        bias=None if a.bias is None else a.bias.contiguous(), mask=a.mask, window=window, counts=counts,
    )  # fmt: skip
    return a.codebook if a.weight is None else a.weight.contiguous(), LOG2_E * (1 if linear else 2), bias, order


def vector_quantize_forward(a: Inputs, needs_lse: bool) -> tuple[torch.Tensor, ...]:
    """Return (quantized, posterior, indices, best_indices, perturbation, lse) of checked arguments.

    lse (M, [H]) fp32 is the log-sum-exp of a row's scores over its temperature, in log 2, for the backward; empty
    unless ``needs_lse``.
    """
    a = contiguous(a)
    num_rows, codes = len(a.x), a.codebook.shape[:-1]
    indices = torch.empty(a.x.shape[:-1], dtype=torch.int64, device=a.x.device)
    perturbation = torch.empty_like(indices, dtype=torch.float32)
    lse = torch.empty_like(perturbation) if needs_lse else None
    counts = torch.empty(a.groups, *codes, dtype=torch.int32, device=a.x.device)
    quantized, best_indices = torch.empty_like(a.x), torch.empty_like(indices)
    group_rows = max(1, num_rows // a.groups)
    outputs = Outputs(quantized, indices, best_indices, perturbation, lse, counts)
    sweep_codes(a.x, a.codebook, outputs, a, group_rows)
    posterior = torch.empty_like(counts, dtype=torch.float32)
    _posterior_kernel[(triton.cdiv(counts.numel(), 1024),)](
        counts, posterior, valid_rows(a), counts.numel(), codes.numel(), group_rows,
        HAS_VALID=a.valid is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    lse = torch.empty_like(perturbation[:0]) if lse is None else lse
    return quantized, posterior, indices, best_indices, perturbation, lse


def contiguous(a: Inputs) -> Inputs:
    """Return the arguments with contiguous rows, codes and masks."""
    mask, valid = (None if value is None else value.contiguous() for value in (a.mask, a.valid))
    return a._replace(x=a.x.contiguous(), codebook=a.codebook.contiguous(), mask=mask, valid=valid)


def by_head(rows: torch.Tensor) -> torch.Tensor:
    """Return (M, H, D) as a batch of matrices, (H, M, D); leave a matrix (M, D) as it is."""
    return rows.transpose(0, 1) if rows.ndim == 3 else rows


def valid_rows(a: Inputs) -> torch.Tensor | None:
    """Return the number of valid rows of each group, (G,) int64; None without a mask of valid rows."""
    return None if a.valid is None else a.valid.view(a.groups, len(a.valid) // a.groups).sum(1)
