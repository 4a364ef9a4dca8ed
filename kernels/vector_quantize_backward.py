"""Regularized vector quantization, backward: the straight-through softmax's gradients in one sweep over the codes.

Reg-VQ (Zhang et al., CVPR 2023), Algorithm 1. With u = (s + mask g) / t the scores over their temperature and lse
their log-sum-exp, both from the forward's formulas, dQ and dA the gradients of the quantized rows and of the posterior,
R rows in a group, f the factor of the product (2 scale or scale) and k the logit weights (codes or weight):

    p[m,n]  = exp(u[m,n] - lse[m])
    dP[m,n] = dQ_m . z_n + dA[group(m), n] / R         (invalid rows: dQ_m . z_n; R counts the valid rows)
    r[m]    = sum_n p dP / sum_n p          (sum_n p is 1 up to the rounding of lse, which matters for large scores)
    dS[m,n] = p (dP - r) / t
    dx = f dS k,   dk = f dS^T x,   dbias = sum_m dS,   lookup = p^T dQ ("soft"; "hard": the sum by selected code)
    distance:  dZ = lookup + dk - f diag(dbias) z          linear:  dZ = lookup,  dW = dk,  db = dbias

r is known only after the sweep, but the selected code gives a guess: r0 = dQ . z[index] + dA[index] / R. The sweep
writes p and w = p (dP - r0) and sums both over the codes. Then, for any guess,

    delta = sum_n w / sum_n p               r = r0 + delta,   dS = (w - delta p) / t
    dx    = f / t (w k - delta p k)
    dk + lookup = w^T (f x / t) + p^T (dQ - f delta x / t)

and f dbias is one more column of the last product. That is 6 products of 2 M N D operations, two of them in the sweep.
A good guess keeps delta small; without it, dS of a sharp softmax would be the small difference of two large terms.

p and w are stored in the type of x, to which a tensor-core product would round them anyway. fp16 can't hold
probabilities under 6e-8 or gradients times a large loss scale: there p is multiplied by 2^15, and w is scaled by a
bound on its magnitude.

Deterministic: every element has one writer, every sum a fixed order. Memory: O((M + N) D) and two buffers of a chunk of
rows in the type of x. ``fused``: a buffer has 4096 rows or 512 MiB, whichever is less, but at least 2^25 scores and
2 KiB per code. ``chunked``: it has max(2^25, 512 N) scores, and there are two more in fp32.
"""

import math

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
    equal_chunks,
    fused_backward_rows,
    is_chunked,
    pinned_tile,
)
from regvq_fast.kernels.noise import first_noise_code, gumbel_tile
from regvq_fast.kernels.segment_sum import segment_sum
from regvq_fast.kernels.utils import FP16_SCALE, load_noise_rows, load_rows, multiply, product
from regvq_fast.kernels.vector_quantize import by_head, contiguous, prepare_logits, valid_rows
from regvq_fast.matmul import product_fp32, without_tf32

# Fewest codes of a split: a split costs little, since it only adds its partial sums of p and w.
MIN_SPLIT_CODES = 256


@triton.jit
def _posterior_gradient(
    grad_posterior_ptr,  # (., N) fp32
    groups,  # [BM] int64: rows of grad_posterior
    row_mask,  # [BM]
    code,  # [1, BN] or [BM, 1]
    num_codes,
    row_weight,  # 1 / R, or [BM, 1] where it differs
    ONE_GROUP: tl.constexpr,
):
    """Load dA / R of some rows and codes, in a shape that broadcasts to [BM, BN] or [BM, 1]."""
    if ONE_GROUP:
        return tl.load(grad_posterior_ptr + code, mask=code < num_codes, other=0.0) * row_weight
    else:
        address = grad_posterior_ptr + groups[:, None] * num_codes + code
        return tl.load(address, mask=row_mask[:, None] & (code < num_codes), other=0.0) * row_weight


@triton.jit(do_not_specialize=["first_row", "end_row", "num_splits", "group_rows"])
def _vector_quantize_bwd_kernel(
    x_ptr,  # (M, H, D)
    logit_weight_ptr,  # (H, N, D): the codes, or the weight where LINEAR
    codes_ptr,  # (H, N, D)
    code_bias_ptr,  # (H, N) fp32, in log 2
    grad_quantized_ptr,  # (M, H, D)
    grad_posterior_ptr,  # (G, H, N) fp32, where POSTERIOR
    indices_ptr,  # (M, H) int64
    lse_ptr,  # (M, H) fp32, in log 2
    scores_ptr,  # (H, rows of the chunk, N) fp32: x k^T, where HAS_SCORES
    products_ptr,  # (H, rows of the chunk, N) fp32: dQ z^T, where HAS_SCORES
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    seed_ptr,  # () int64, where NOISE
    row_offset_ptr,  # () int64, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    scales_ptr,  # (5,) fp32 of _fp16_scales, where SCALED
    valid_ptr,  # (M,) bool, where HAS_VALID
    valid_rows_ptr,  # (G,) int64: valid rows of a group, where HAS_VALID
    p_ptr,  # (H, 2, rows of the chunk, N): p and w, in the order of the rows
    w_ptr,  # the first w in the same memory
    sums_ptr,  # (H, rows of the chunk, 2, splits) fp32: partial sums of p and of w
    first_row,
    end_row,
    num_codes,
    split_codes,  # codes of a split, a multiple of BN
    num_splits,
    group_rows,
    factor,
    D: tl.constexpr,
    H: tl.constexpr,
    LINEAR: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Splits of a tile of rows are adjacent programs: stochastic tiles come first and take longest, so they start first.
    split = tl.program_id(0) % num_splits
    position = (tl.program_id(0) // num_splits).to(tl.int64) * BM + tl.arange(0, BM)  # [BM], in the chunk
    row_mask = position < end_row - first_row
    rows = first_row + position
    if NOISE:
        rows, stochastic, inverse_t = load_noise_rows(order_ptr, mask_ptr, tau_ptr, rows, row_mask)
        any_noise = tl.max(stochastic.to(tl.int32)) != 0
        noise_rows, seed = rows + tl.load(row_offset_ptr), tl.load(seed_ptr)
    vectors, noise_code = rows, 0
    if H > 1:
        head = tl.program_id(1).to(tl.int64)
        vectors = rows * H + head
        noise_code = first_noise_code(tl.program_id(1), num_codes)
        logit_weight_ptr += head * num_codes * D
        codes_ptr += head * num_codes * D
        code_bias_ptr += head * num_codes
        rows_before = head * (end_row - first_row)
        p_ptr += 2 * rows_before * num_codes
        w_ptr += 2 * rows_before * num_codes
        sums_ptr += 2 * rows_before * num_splits
        if POSTERIOR:
            grad_posterior_ptr += head * num_codes
        if HAS_SCORES:
            scores_ptr += rows_before * num_codes
            products_ptr += rows_before * num_codes
    if SCALED:
        p_scale, w_scale = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    else:
        p_scale, w_scale = 1.0, 1.0
    factor *= tl.load(scale_ptr).to(tl.float32)
    lse = tl.load(lse_ptr + vectors, mask=row_mask, other=0.0)
    groups = rows // group_rows
    row_weight = 1.0 / group_rows
    if HAS_VALID:
        valid = tl.load(valid_ptr + rows, mask=row_mask, other=0) != 0
        group_size = tl.load(valid_rows_ptr + groups, mask=valid, other=1)
        row_weight = tl.where(valid, 1.0 / group_size, 0.0)[:, None]
    groups *= H

    index = tl.load(indices_ptr + vectors, mask=row_mask, other=0)
    guess = tl.zeros([BM], tl.float32)
    for first_channel in range(0, D, BK):
        grad = load_rows(grad_quantized_ptr, vectors, row_mask, first_channel, D, BK).to(tl.float32)
        guess += tl.sum(grad * load_rows(codes_ptr, index, row_mask, first_channel, D, BK).to(tl.float32), axis=1)
    if POSTERIOR:
        guess += tl.sum(
            _posterior_gradient(grad_posterior_ptr, groups, row_mask, index[:, None], num_codes, row_weight, ONE_GROUP),
            axis=1,
        )

    if D <= BK and not HAS_SCORES:  # loaded once, for all codes
        x = load_rows(x_ptr, vectors, row_mask, 0, D, BK)
        grad_quantized = load_rows(grad_quantized_ptr, vectors, row_mask, 0, D, BK)
    p_sum = tl.zeros([BM], tl.float32)
    w_sum = tl.zeros([BM], tl.float32)
    first_code = split * split_codes
    for first in range(first_code, tl.minimum(first_code + split_codes, num_codes), BN):
        code = first + tl.arange(0, BN)
        col_mask = code < num_codes
        both = row_mask[:, None] & col_mask[None, :]
        wide_code = code.to(tl.int64)
        if HAS_SCORES:
            offset = (rows - first_row)[:, None] * num_codes + code[None, :]
            scores = tl.load(scores_ptr + offset, mask=both, other=0.0)
            grad = tl.load(products_ptr + offset, mask=both, other=0.0)
        elif D <= BK:
            z = load_rows(codes_ptr, wide_code, col_mask, 0, D, BK)
            k = load_rows(logit_weight_ptr, wide_code, col_mask, 0, D, BK) if LINEAR else z
            scores = multiply(x, k, tl.zeros([BM, BN], tl.float32), PRECISION)
            grad = multiply(grad_quantized, z, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            scores = product(x_ptr, vectors, row_mask, logit_weight_ptr, wide_code, col_mask, D, BM, BN, BK, PRECISION)
            grad = product(
                grad_quantized_ptr, vectors, row_mask, codes_ptr, wide_code, col_mask, D, BM, BN, BK, PRECISION
            )
        scores = scores * factor + tl.load(code_bias_ptr + code, mask=col_mask, other=float("-inf"))[None, :]
        if NOISE:
            if any_noise:
                noise = gumbel_tile(noise_code + first, noise_rows, seed, BN)
                scores = tl.where(stochastic[:, None], scores + noise, scores) * inverse_t[:, None]
        p = tl.exp2(scores - lse[:, None])
        if POSTERIOR:
            grad += _posterior_gradient(
                grad_posterior_ptr, groups, row_mask, code[None, :], num_codes, row_weight, ONE_GROUP
            )
        w = p * (grad - guess[:, None])
        offset = position[:, None] * num_codes + code[None, :]
        tl.store(p_ptr + offset, (p * p_scale).to(p_ptr.dtype.element_ty), mask=both)
        tl.store(w_ptr + offset, (w * w_scale).to(w_ptr.dtype.element_ty), mask=both)
        p_sum += tl.sum(p, axis=1)
        w_sum += tl.sum(w, axis=1)
    sums = sums_ptr + position * 2 * num_splits + split
    tl.store(sums, p_sum, mask=row_mask)
    tl.store(sums + num_splits, w_sum, mask=row_mask)


@triton.jit(do_not_specialize=["first_row", "end_row", "num_splits"])
def _row_gradients_kernel(
    x_ptr,  # (M, H, D)
    grad_quantized_ptr,  # (M, H, D), where SOFT
    sums_of_k_ptr,  # (H, 2, rows of the chunk, D) fp32: p k and w k, where NEEDS_X
    sums_ptr,  # (H, rows of the chunk, 2, splits) fp32: partial sums of p and of w
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    scales_ptr,  # (5,) fp32 of _fp16_scales, where SCALED
    grad_x_ptr,  # (M, H, D), where NEEDS_X
    right_ptr,  # (H, 2, rows of the chunk, W), where NEEDS_CODES
    first_row,
    end_row,
    num_splits,
    factor,
    D: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    NOISE: tl.constexpr,
    SOFT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_CODES: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute delta of each row from the partial sums, then dx and the right sides of the codes' gradients."""
    position = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    num_rows = (end_row - first_row).to(tl.int64)
    row_mask = position < num_rows
    rows = first_row + position
    row_factor = tl.full([BM], 1.0, tl.float32) * (factor * tl.load(scale_ptr).to(tl.float32))
    if NOISE:
        rows, _, inverse_t = load_noise_rows(order_ptr, mask_ptr, tau_ptr, rows, row_mask)
        row_factor *= inverse_t
    vectors = rows
    if H > 1:
        head = tl.program_id(2).to(tl.int64)
        vectors = rows * H + head
        sums_ptr += 2 * head * num_rows * num_splits
        if NEEDS_X:
            sums_of_k_ptr += 2 * head * num_rows * D
        if NEEDS_CODES:
            right_ptr += 2 * head * num_rows * W
    p_sum = tl.zeros([BM], tl.float32)
    w_sum = tl.zeros([BM], tl.float32)
    for split in range(num_splits):
        sums = sums_ptr + position * 2 * num_splits + split
        p_sum += tl.load(sums, mask=row_mask, other=1.0)
        w_sum += tl.load(sums + num_splits, mask=row_mask, other=0.0)
    delta = w_sum / p_sum
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    both = row_mask[:, None] & (channel < D)[None, :]
    offset = vectors[:, None] * D + channel[None, :]
    if NEEDS_X:
        in_chunk = position[:, None] * D + channel[None, :]
        p_k = tl.load(sums_of_k_ptr + in_chunk, mask=both, other=0.0)
        w_k = tl.load(sums_of_k_ptr + num_rows * D + in_chunk, mask=both, other=0.0)
        if SCALED:
            p_k /= tl.load(scales_ptr)
            w_k /= tl.load(scales_ptr + 1)
        grad_x = row_factor[:, None] * (w_k - delta[:, None] * p_k)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=both)
    if NEEDS_CODES:
        # Channel D is 1 in every row: it sums f dS.
        x = tl.load(x_ptr + offset, mask=both, other=0.0).to(tl.float32)
        for_w = row_factor[:, None] * tl.where((channel == D)[None, :], 1.0, x)
        for_p = -delta[:, None] * for_w
        if SOFT:
            for_p += tl.load(grad_quantized_ptr + offset, mask=both, other=0.0).to(tl.float32)
        if SCALED:
            for_p *= tl.load(scales_ptr + 2)
            for_w *= tl.load(scales_ptr + 3)
        in_chunk = position[:, None] * W + channel[None, :]
        both = row_mask[:, None] & (channel < W)[None, :]
        tl.store(right_ptr + in_chunk, for_p.to(right_ptr.dtype.element_ty), mask=both)
        tl.store(right_ptr + num_rows * W + in_chunk, for_w.to(right_ptr.dtype.element_ty), mask=both)


@triton.jit
def _code_gradients_kernel(
    sums_ptr,  # (N, W) fp32: dk (and the look-up's gradient), and f dbias in column D
    lookup_ptr,  # (N, D) fp32, where LOOKUP
    codes_ptr,  # (N, D)
    scales_ptr,  # (5,) fp32 of _fp16_scales, where SCALED
    grad_codes_ptr,  # (N, D)
    size,  # N D
    D: tl.constexpr,
    W: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute dZ of distance logits: dk + lookup - f diag(dbias) z."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = element < size
    start = element // D * W
    z = tl.load(codes_ptr + element, mask=in_range, other=0.0).to(tl.float32)
    grad = tl.load(sums_ptr + start + element % D, mask=in_range, other=0.0)
    grad -= tl.load(sums_ptr + start + D, mask=in_range, other=0.0) * z
    if SCALED:
        grad *= tl.load(scales_ptr + 4)
    if LOOKUP:
        grad += tl.load(lookup_ptr + element, mask=in_range, other=0.0)
    tl.store(grad_codes_ptr + element, grad.to(grad_codes_ptr.dtype.element_ty), mask=in_range)


def vector_quantize_backward(
    a: Inputs,
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    indices: torch.Tensor,
    lse: torch.Tensor,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return gradients of (x, codebook, weight, bias) in their types; None for those not needed.

    ``indices`` and ``lse`` are the forward's.

    Raises:
        RuntimeError: the forward kept no lse.
    """
    if len(lse) != len(a.x):
        raise RuntimeError(
            "vector_quantize kept nothing for its backward, since no input required a gradient when it was called: "
            "use impl='eager' for gradients under torch.func.vmap"
        )
    a = contiguous(a)
    grad_quantized = grad_quantized.contiguous()
    *lead, num_codes, width = a.codebook.shape  # lead: [H] or nothing
    num_rows, dtype, device = len(a.x), a.x.dtype, a.x.device
    heads = math.prod(lead)
    linear, soft = a.weight is not None, a.codebook_grad == "soft"
    factor = 1.0 if linear else 2.0
    group_rows = max(1, num_rows // a.groups)
    if grad_posterior is not None:
        grad_posterior = grad_posterior.to(torch.float32).contiguous()
    several_groups = grad_posterior is not None and a.groups > 1
    has_valid = grad_posterior is not None and a.valid is not None
    sizes = valid_rows(a) if has_valid else None
    scales = None
    if dtype == torch.float16:
        scales = _fp16_scales(a, grad_quantized, grad_posterior, factor, group_rows if sizes is None else sizes)

    chunked = is_chunked(device)
    # Linear logits need another tile, of weights; several posteriors or valid rows need a tile of the posterior's
    # gradients; heads need more addresses. On sm_100 the usual tile would spill.
    heavy = "_heavy" if linear or several_groups or has_valid or heads > 1 else ""
    tile = pinned_tile(f"vector_quantize_backward{heavy}", dtype, width, device)
    all_codes = heads * num_codes
    most = chunk_rows(all_codes) if chunked else fused_backward_rows(all_codes, dtype.itemsize)
    chunk = max(1, min(num_rows, equal_chunks(num_rows, most)))
    logit_weight, log2_factor, bias, order = prepare_logits(a, min(chunk, ORDER_WINDOW))
    waves = 1 if order is None else NOISY_WAVES
    flags = {"D": width, "H": heads, "NOISE": order is not None, "SCALED": scales is not None}
    # The right side has one more column for the bias, rounded up to keep rows aligned.
    wide = width if linear and a.bias is None else triton.cdiv(width + 1, 8) * 8

    grad_x = torch.empty_like(a.x) if needs_x else None
    grad_codes = grad_lookup = None
    memory = a.x.new_empty(2 * chunk * all_codes)
    for start in range(0, num_rows, chunk):
        end = min(start + chunk, num_rows)
        rows = end - start
        p_and_w = memory[: 2 * rows * all_codes].view(*lead, 2, rows, num_codes)
        p, w = p_and_w.unbind(-3)
        left = p_and_w.flatten(-3, -2)
        scores = products = None
        if chunked:
            with without_tf32(device):
                scores = product_fp32(by_head(a.x[start:end]), logit_weight.mT)
                products = product_fp32(by_head(grad_quantized[start:end]), a.codebook.mT)
        split_codes = codes_per_split(heads * rows, num_codes, tile, MIN_SPLIT_CODES, device, waves)
        num_splits = triton.cdiv(num_codes, split_codes)
        sums = lse.new_empty(heads, rows, 2, num_splits)
        _vector_quantize_bwd_kernel[(triton.cdiv(rows, tile.BM) * num_splits, heads)](
            a.x, logit_weight, a.codebook, bias, grad_quantized, grad_posterior, indices, lse, scores, products,
            order, a.mask, a.seed, a.row_offset, a.tau, a.scale, scales, a.valid, sizes, p, w, sums,
            start, end, num_codes, split_codes, num_splits, group_rows, log2_factor,
            LINEAR=linear, POSTERIOR=grad_posterior is not None, ONE_GROUP=not several_groups, HAS_VALID=has_valid,
            HAS_SCORES=chunked, PRECISION=dot_precision(dtype), **flags, **tile.options(),
        )  # fmt: skip
        sums_of_k = product_fp32(left, logit_weight) if needs_x else None
        right = a.x.new_empty(*lead, 2 * rows, wide) if needs_codes else None
        _row_gradients_kernel[(triton.cdiv(rows, 32), triton.cdiv(wide if needs_codes else width, 64), heads)](
            a.x, grad_quantized, sums_of_k, sums, order, a.mask, a.tau, a.scale, scales, grad_x, right,
            start, end, num_splits, factor, W=wide, SOFT=soft and not linear, NEEDS_X=needs_x,
            NEEDS_CODES=needs_codes, BM=32, BD=64, num_warps=4, enable_fp_fusion=True, **flags,
        )  # fmt: skip
        if right is not None:
            grad_codes = product_fp32(left.mT, right, grad_codes)
            if linear and soft:  # the codes differ from the logit weights, so the look-up has its own sum
                grads = grad_quantized[start:end] if order is None else grad_quantized[order[start:end]]
                grad_lookup = product_fp32(p.mT, by_head(grads), grad_lookup)

    if not needs_codes:
        return grad_x, None, None, None
    if grad_codes is None:  # no rows
        grad_weight, grad_bias = (None if leaf is None else torch.zeros_like(leaf) for leaf in (a.weight, a.bias))
        return grad_x, torch.zeros_like(a.codebook), grad_weight, grad_bias
    if a.codebook_grad == "hard":
        if lead:  # the heads' codes follow each other
            indices = indices + num_codes * torch.arange(heads, device=device)
        grad_lookup = segment_sum(grad_quantized.flatten(0, -2), indices.flatten(), all_codes).view_as(a.codebook)
    if not linear:
        grad_codebook = torch.empty_like(a.codebook)
        _code_gradients_kernel[(triton.cdiv(a.codebook.numel(), 1024),)](
            grad_codes, grad_lookup, a.codebook, scales, grad_codebook, a.codebook.numel(),
            D=width, W=wide, LOOKUP=grad_lookup is not None, SCALED=scales is not None,
            BLOCK=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return grad_x, grad_codebook, None, None
    if scales is not None:
        grad_codes *= scales[4]
        if soft:
            assert grad_lookup is not None
            grad_lookup /= scales[0]
    grad_codebook = torch.zeros_like(a.codebook) if grad_lookup is None else grad_lookup.to(dtype)
    grad_bias = None if a.bias is None else (grad_codes[..., width] / (factor * a.scale)).to(dtype)
    return grad_x, grad_codebook, grad_codes[..., :width].to(dtype).contiguous(), grad_bias


def _fp16_scales(
    a: Inputs,
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    factor: float,
    group_rows: int | torch.Tensor,
) -> torch.Tensor:
    """Return the factors, (5,) fp32, that bring fp16 copies into the range of fp16.

    They are of p, of w, of the right sides for p and for w, and of the codes' gradients, which undoes the others. Norms
    bound |dP|, and |w| <= 2 max |dP|; then |delta| <= 2 max |dP| bounds |f x / t| and |dQ - f delta x / t|.
    ``group_rows`` is R, or (G,) the R of each group.
    """

    def largest_norm(matrix: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32)
        return norms.max() if len(norms) else norms.new_zeros(())

    grad_norm = largest_norm(grad_quantized)
    most = 2 * grad_norm * largest_norm(a.codebook)
    if grad_posterior is not None:
        if isinstance(group_rows, torch.Tensor):
            most = most + 2 * (grad_posterior.abs().flatten(1).amax(1) / group_rows.clamp(min=1)).max()
        else:
            most = most + 2 * grad_posterior.abs().max() / group_rows
    most = most.clamp(min=1e-20)
    by_temperature = (factor * a.scale).to(torch.float32) / a.tau.to(torch.float32).clamp(max=1.0)
    right = (grad_norm + most * by_temperature * largest_norm(a.x).clamp(min=1.0)).clamp(min=1e-20)
    p_scale = torch.full_like(most, FP16_SCALE)
    return torch.stack(
        [p_scale, FP16_SCALE / most, FP16_SCALE / right, FP16_SCALE * most / right, right / FP16_SCALE**2]
    )
