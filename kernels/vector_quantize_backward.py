"""Regularized vector quantization, backward: the straight-through softmax's gradients in one sweep over the codes.

Reg-VQ (Zhang et al., CVPR 2023), Algorithm 1. With u = (s + mask g) / t the scores over their temperature and lse
their log-sum-exp, both from the forward's formulas, dQ and dA the gradients of the quantized rows and of the posterior,
R rows in a group, f the factor of the product (2 scale or scale) and k the logit weights (codes or weight):

    p[m,n]  = exp(u[m,n] - lse[m])
    dP[m,n] = dQ_m . z_n + dA[group(m), n] / R
    r[m]    = sum_n p dP / sum_n p          (sum_n p is 1 but for the rounding of lse, which large scores make felt)
    dS[m,n] = p (dP - r) / t
    dx = f dS k,   dk = f dS^T x,   dbias = sum_m dS,   lookup = p^T dQ ("soft"; "hard": the sum by selected code)
    distance:  dZ = lookup + dk - f diag(dbias) z          linear:  dZ = lookup,  dW = dk,  db = dbias

r is not known before the sweep ends, but the selected code gives a guess: r0 = dQ . z[index] + dA[index] / R. So the
sweep writes p and w = p (dP - r0), and sums both over the codes; then, for any guess,

    delta = sum_n w / sum_n p               r = r0 + delta,   dS = (w - delta p) / t
    dx    = f / t (w k - delta p k)
    dk + lookup = w^T (f x / t) + p^T (dQ - f delta x / t)

and f dbias is one column more of the last product. That is 6 products of 2 M N D operations, two of them in the sweep.
A good guess keeps delta small: where the softmax is sharp, dS is the small difference of two large terms without it.

p and w are kept in the type of x: a tensor-core product would round them to it anyway. In fp16 p is kept times 2^15 and
w relative to a bound on its magnitude: fp16 has no room for probabilities under 1e-7 and for gradients after a loss
scale.

Deterministic: every element has one writer, every sum a fixed order. Memory: two buffers of a chunk of rows, which has
max(2^25, 512 N) scores at most (``fused`` at 16 bits: max(2^25, 1024 N)), in the type of x (``chunked``: two more in
fp32), and O((M + N) D).
"""

from functools import partial

import torch
import triton
import triton.language as tl

from regvq_fast.kernels import schedules
from regvq_fast.kernels.constants import FP16_SCALE, LOG2_E
from regvq_fast.kernels.noise import gumbel_tile
from regvq_fast.kernels.products import product_fp32, without_tf32
from regvq_fast.kernels.segment_sum import segment_sum
from regvq_fast.kernels.tiles import column_term, load_rows, multiply, order_rows, product

# Codes of a split at least: splits only add up their partial sums of r.
MIN_SPLIT_CODES = 256


@triton.jit
def _posterior_gradient(
    grad_posterior_ptr,  # (G, N) fp32, over R
    groups,  # [BM] int64
    row_mask,  # [BM]
    code,  # [1, BN] or [BM, 1]
    num_codes,
    ONE_GROUP: tl.constexpr,
):
    """dA / R of some rows and codes, in a shape that broadcasts to theirs."""
    if ONE_GROUP:
        return tl.load(grad_posterior_ptr + code, mask=code < num_codes, other=0.0)
    else:
        place = grad_posterior_ptr + groups[:, None] * num_codes + code
        return tl.load(place, mask=row_mask[:, None] & (code < num_codes), other=0.0)


@triton.jit
def _vector_quantize_bwd_kernel(
    x_ptr,  # (M, D)
    keys_ptr,  # (N, D): the codes, or the weight where LINEAR
    codes_ptr,  # (N, D)
    column_ptr,  # (N,) fp32 per-code bias of the logits, in log 2
    grad_quantized_ptr,  # (M, D)
    grad_posterior_ptr,  # (G, N) fp32 over R, where POSTERIOR
    indices_ptr,  # (M,) int64
    lse_ptr,  # (M,) fp32, in log 2
    scores_ptr,  # (rows of the chunk, N) fp32: x k^T, where HAS_SCORES
    products_ptr,  # (rows of the chunk, N) fp32: dQ z^T, where HAS_SCORES
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    seed_ptr,  # () int64, where NOISE
    row_offset_ptr,  # () int64, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    scales_ptr,  # (2,) fp32: what p and w are kept times, where SCALED
    p_ptr,  # (rows of the chunk, N), in the order of the rows
    w_ptr,  # (rows of the chunk, N)
    sums_ptr,  # (rows of the chunk, 2, splits) fp32: partial sums of p and of w
    first_row,
    end_row,
    num_codes,
    split_codes,  # codes of a split, a multiple of BN
    num_splits,
    group_rows,
    factor,
    D: tl.constexpr,
    LINEAR: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # All splits of a tile of rows are neighbours: stochastic tiles, the first and the longest, begin first.
    split = tl.program_id(0) % num_splits
    position = (tl.program_id(0) // num_splits).to(tl.int64) * BM + tl.arange(0, BM)  # [BM], in the chunk
    row_mask = position < end_row - first_row
    rows = first_row + position
    if NOISE:
        rows = tl.load(order_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        stochastic = tl.load(mask_ptr + rows, mask=row_mask, other=0) != 0
        any_noise = tl.max(stochastic.to(tl.int32)) != 0
        noise_rows, seed = rows + tl.load(row_offset_ptr), tl.load(seed_ptr)
        inverse_t = tl.where(stochastic, 1.0 / tl.load(tau_ptr).to(tl.float32), 1.0)
    if SCALED:
        p_scale, w_scale = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    else:
        p_scale, w_scale = 1.0, 1.0
    factor *= tl.load(scale_ptr).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)
    groups = rows // group_rows

    index = tl.load(indices_ptr + rows, mask=row_mask, other=0)
    guess = tl.zeros([BM], tl.float32)
    for first_column in range(0, D, BK):
        grad = load_rows(grad_quantized_ptr, rows, row_mask, first_column, D, BK).to(tl.float32)
        guess += tl.sum(grad * load_rows(codes_ptr, index, row_mask, first_column, D, BK).to(tl.float32), axis=1)
    if POSTERIOR:
        guess += tl.sum(
            _posterior_gradient(grad_posterior_ptr, groups, row_mask, index[:, None], num_codes, ONE_GROUP), axis=1
        )

    if D <= BK and not HAS_SCORES:  # tiles that stay
        x = load_rows(x_ptr, rows, row_mask, 0, D, BK)
        grad_quantized = load_rows(grad_quantized_ptr, rows, row_mask, 0, D, BK)
    p_sum = tl.zeros([BM], tl.float32)
    w_sum = tl.zeros([BM], tl.float32)
    first_code = split * split_codes
    for first in range(first_code, tl.minimum(first_code + split_codes, num_codes), BN):
        code = first + tl.arange(0, BN)
        col_mask = code < num_codes
        both = row_mask[:, None] & col_mask[None, :]
        wide_code = code.to(tl.int64)
        if HAS_SCORES:
            place = (rows - first_row)[:, None] * num_codes + code[None, :]
            scores = tl.load(scores_ptr + place, mask=both, other=0.0)
            grad = tl.load(products_ptr + place, mask=both, other=0.0)
        elif D <= BK:
            z = load_rows(codes_ptr, wide_code, col_mask, 0, D, BK)
            key = load_rows(keys_ptr, wide_code, col_mask, 0, D, BK) if LINEAR else z
            scores = multiply(x, key, tl.zeros([BM, BN], tl.float32), PRECISION)
            grad = multiply(grad_quantized, z, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            scores = product(x_ptr, rows, row_mask, keys_ptr, wide_code, col_mask, D, BM, BN, BK, PRECISION)
            grad = product(grad_quantized_ptr, rows, row_mask, codes_ptr, wide_code, col_mask, D, BM, BN, BK, PRECISION)
        scores = scores * factor + tl.load(column_ptr + code, mask=col_mask, other=float("-inf"))[None, :]
        if NOISE:
            if any_noise:
                noise = gumbel_tile(first, noise_rows, seed, BN)
                scores = tl.where(stochastic[:, None], scores + noise, scores) * inverse_t[:, None]
        p = tl.exp2(scores - lse[:, None])
        if POSTERIOR:
            grad += _posterior_gradient(grad_posterior_ptr, groups, row_mask, code[None, :], num_codes, ONE_GROUP)
        w = p * (grad - guess[:, None])
        place = position[:, None] * num_codes + code[None, :]
        tl.store(p_ptr + place, (p * p_scale).to(p_ptr.dtype.element_ty), mask=both)
        tl.store(w_ptr + place, (w * w_scale).to(w_ptr.dtype.element_ty), mask=both)
        p_sum += tl.sum(p, axis=1)
        w_sum += tl.sum(w, axis=1)
    place = sums_ptr + position * 2 * num_splits + split
    tl.store(place, p_sum, mask=row_mask)
    tl.store(place + num_splits, w_sum, mask=row_mask)


@triton.jit
def _row_gradients_kernel(
    x_ptr,  # (M, D)
    grad_quantized_ptr,  # (M, D), where SOFT
    keys_sums_ptr,  # (2, rows of the chunk, D) fp32: p k and w k, where NEEDS_X
    sums_ptr,  # (rows of the chunk, 2, splits) fp32: partial sums of p and of w
    order_ptr,  # (M,) int32, where NOISE
    mask_ptr,  # (M,) bool, where NOISE
    tau_ptr,  # () floating point, where NOISE
    scale_ptr,  # () floating point
    scales_ptr,  # (4,) fp32: what p, w and the right sides for p and w are kept times, where SCALED
    grad_x_ptr,  # (M, D), where NEEDS_X
    right_ptr,  # (2, rows of the chunk, W), where NEEDS_CODES
    first_row,
    end_row,
    num_splits,
    factor,
    D: tl.constexpr,
    W: tl.constexpr,
    NOISE: tl.constexpr,
    SOFT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_CODES: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute dx and the right sides of the codes' gradients, once delta of each row is known."""
    position = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    num_rows = (end_row - first_row).to(tl.int64)
    row_mask = position < num_rows
    rows = first_row + position
    row_factor = tl.full([BM], 1.0, tl.float32) * (factor * tl.load(scale_ptr).to(tl.float32))
    if NOISE:
        rows = tl.load(order_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        stochastic = tl.load(mask_ptr + rows, mask=row_mask, other=0) != 0
        row_factor = tl.where(stochastic, row_factor / tl.load(tau_ptr).to(tl.float32), row_factor)
    p_sum = tl.zeros([BM], tl.float32)
    w_sum = tl.zeros([BM], tl.float32)
    for split in range(num_splits):
        place = sums_ptr + position * 2 * num_splits + split
        p_sum += tl.load(place, mask=row_mask, other=1.0)
        w_sum += tl.load(place + num_splits, mask=row_mask, other=0.0)
    delta = w_sum / p_sum
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = row_mask[:, None] & (column < D)[None, :]
    place = rows[:, None] * D + column[None, :]
    if NEEDS_X:
        sums = position[:, None] * D + column[None, :]
        of_p = tl.load(keys_sums_ptr + sums, mask=inside, other=0.0)
        of_w = tl.load(keys_sums_ptr + num_rows * D + sums, mask=inside, other=0.0)
        if SCALED:
            of_p /= tl.load(scales_ptr)
            of_w /= tl.load(scales_ptr + 1)
        grad_x = row_factor[:, None] * (of_w - delta[:, None] * of_p)
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEEDS_CODES:
        # Column D is a channel that is 1 in every row: it sums f dS.
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        for_w = row_factor[:, None] * tl.where((column == D)[None, :], 1.0, x)
        for_p = -delta[:, None] * for_w
        if SOFT:
            for_p += tl.load(grad_quantized_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            for_p *= tl.load(scales_ptr + 2)
            for_w *= tl.load(scales_ptr + 3)
        wide = position[:, None] * W + column[None, :]
        inside = row_mask[:, None] & (column < W)[None, :]
        tl.store(right_ptr + wide, for_p.to(right_ptr.dtype.element_ty), mask=inside)
        tl.store(right_ptr + num_rows * W + wide, for_w.to(right_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _code_gradients_kernel(
    sums_ptr,  # (N, W) fp32: dk (and the look-up's gradient), and f dbias in column D
    lookup_ptr,  # (N, D) fp32, where LOOKUP
    codes_ptr,  # (N, D)
    scales_ptr,  # (5,) fp32: the last is what the sums are multiplied by, where SCALED
    grad_codes_ptr,  # (N, D)
    size,  # N D
    D: tl.constexpr,
    W: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dZ of distance logits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    start = place // D * W
    z = tl.load(codes_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(sums_ptr + start + place % D, mask=inside, other=0.0)
    grad -= tl.load(sums_ptr + start + D, mask=inside, other=0.0) * z
    if SCALED:
        grad *= tl.load(scales_ptr + 4)
    if LOOKUP:
        grad += tl.load(lookup_ptr + place, mask=inside, other=0.0)
    tl.store(grad_codes_ptr + place, grad.to(grad_codes_ptr.dtype.element_ty), mask=inside)


def vector_quantize_backward(
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    x: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    indices: torch.Tensor,
    tau: torch.Tensor,
    scale: torch.Tensor,
    row_offset: torch.Tensor,
    lse: torch.Tensor,
    codebook_grad: str,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return gradients of (x, codebook, weight, bias) in their types; None for those that nobody needs.

    indices (M,) int64 and lse (M,) fp32 are the forward's.

    Raises:
        RuntimeError: the forward kept no lse.
    """
    if len(lse) != len(x):
        raise RuntimeError(
            "vector_quantize kept nothing for a backward, since no input required a gradient where it was called: "
            "for gradients under torch.func.vmap give impl='eager'"
        )
    x, codebook, grad_quantized = x.contiguous(), codebook.contiguous(), grad_quantized.contiguous()
    keys = codebook if weight is None else weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    (num_rows, width), num_codes, dtype = x.shape, codebook.shape[0], x.dtype
    linear, soft = weight is not None, codebook_grad == "soft"
    how = schedules.schedule(x.device)
    chunked = how == "chunked"
    # Each chunk reads and writes the codes' gradients: as few of them as 2 KiB a code and buffer allow.
    least = schedules.MIN_CHUNK_ROWS * (1 if chunked or dtype == torch.float32 else 2)
    chunk = max(1, min(num_rows, schedules.equal_chunks(num_rows, schedules.chunk_rows(num_codes, least))))
    factor = 1.0 if linear else 2.0  # times the scale, which is on the device
    column = column_term(
        codebook, linear, None if bias is None else bias.contiguous(), LOG2_E if linear else -LOG2_E, scale
    )
    group_rows = num_rows if grad_posterior is None else max(1, num_rows // grad_posterior.shape[0])
    if grad_posterior is not None:
        grad_posterior = grad_posterior.to(torch.float32).contiguous() / group_rows
    order = None if mask is None else order_rows(mask, min(chunk, schedules.ORDER_WINDOW))
    scales = None
    if dtype == torch.float16:
        scales = _fp16_scales(x, grad_quantized, grad_posterior, codebook, tau, factor * scale)
    # A product's right side has a column more for the bias, and stays aligned.
    wide = width if linear and bias is None else triton.cdiv(width + 1, 8) * 8
    shared = {"D": width, "NOISE": mask is not None, "SCALED": scales is not None}
    one_group = grad_posterior is not None and grad_posterior.shape[0] == 1
    flags = {
        **shared,
        "LINEAR": linear,
        "POSTERIOR": grad_posterior is not None,
        "ONE_GROUP": one_group,
        "HAS_SCORES": chunked,
        "PRECISION": schedules.precision(dtype),
    }

    def sweep(
        start: int,
        end: int,
        scores: torch.Tensor | None,
        products: torch.Tensor | None,
        buffers: torch.Tensor,
        tile: schedules.Tile,
    ) -> torch.Tensor:
        """Fill the buffers (2, rows, N) with p and w; return their partial sums (rows, 2, splits)."""
        waves = 1 if order is None else schedules.NOISY_WAVES
        split_codes = schedules.part_codes(end - start, num_codes, tile, MIN_SPLIT_CODES, x.device, waves)
        num_splits = triton.cdiv(num_codes, split_codes)
        sums = x.new_empty(end - start, 2, num_splits, dtype=torch.float32)
        _vector_quantize_bwd_kernel[(triton.cdiv(end - start, tile.BM) * num_splits,)](
            x, keys, codebook, column, grad_quantized, grad_posterior, indices, lse, scores, products,
            order, mask, seed, row_offset, tau, scale, scales, buffers[0], buffers[1], sums,
            start, end, num_codes, split_codes, num_splits, group_rows, factor * LOG2_E, **flags, **tile.options(),
        )  # fmt: skip
        return sums

    # Linear logits need a tile of weights more, several posteriors one of their gradients.
    heavy = linear or (grad_posterior is not None and not one_group)
    kernel = "vector_quantize_backward_heavy" if heavy else "vector_quantize_backward"
    kind = (num_codes, triton.next_power_of_2(chunk), *flags.values())
    grad_x = torch.empty_like(x) if needs_x else None
    grad_codes = grad_lookup = None
    memory = x.new_empty(2 * chunk * num_codes)
    for start in range(0, num_rows, chunk):
        end = min(start + chunk, num_rows)
        rows = end - start
        buffers = memory[: 2 * rows * num_codes].view(2, rows, num_codes)
        scores = products = None
        if chunked:
            with without_tf32(x.device):
                scores = product_fp32(x[start:end], keys.t())
                products = product_fp32(grad_quantized[start:end], codebook.t())
        sums = schedules.run(
            kernel, how, dtype, width, kind, x.device, partial(sweep, start, end, scores, products, buffers)
        )
        keys_sums = product_fp32(buffers.flatten(0, 1), keys) if needs_x else None
        right = x.new_empty(2, rows, wide) if needs_codes else None
        _row_gradients_kernel[(triton.cdiv(rows, 32), triton.cdiv(wide if needs_codes else width, 64))](
            x, grad_quantized, keys_sums, sums, order, mask, tau, scale, scales, grad_x, right,
            start, end, sums.shape[2], factor, W=wide, SOFT=soft and not linear, NEEDS_X=needs_x,
            NEEDS_CODES=needs_codes, BM=32, BD=64, num_warps=4, enable_fp_fusion=True, **shared,
        )  # fmt: skip
        if right is not None:
            grad_codes = product_fp32(buffers.flatten(0, 1).t(), right.flatten(0, 1), grad_codes)
            if linear and soft:  # the look-up's codes are not the logits' weights: a sum of its own
                grads = grad_quantized[start:end] if order is None else grad_quantized[order[start:end]]
                grad_lookup = product_fp32(buffers[0].t(), grads, grad_lookup)

    if not needs_codes:
        return grad_x, None, None, None
    if grad_codes is None:  # no rows
        grad_weight, grad_bias = (None if tensor is None else torch.zeros_like(tensor) for tensor in (weight, bias))
        return grad_x, torch.zeros_like(codebook), grad_weight, grad_bias
    if codebook_grad == "hard":
        grad_lookup = segment_sum(grad_quantized, indices, num_codes)
    if not linear:
        grad_codebook = torch.empty_like(codebook)
        _code_gradients_kernel[(triton.cdiv(codebook.numel(), 1024),)](
            grad_codes, grad_lookup, codebook, scales, grad_codebook, codebook.numel(),
            D=width, W=wide, LOOKUP=grad_lookup is not None, SCALED=scales is not None,
            BLOCK=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return grad_x, grad_codebook, None, None
    if scales is not None:
        grad_codes *= scales[4]
        if soft:
            assert grad_lookup is not None
            grad_lookup /= scales[0]
    grad_codebook = torch.zeros_like(codebook) if grad_lookup is None else grad_lookup.to(dtype)
    grad_bias = None if bias is None else (grad_codes[:, width] / (factor * scale)).to(dtype)
    return grad_x, grad_codebook, grad_codes[:, :width].to(dtype).contiguous(), grad_bias


def _fp16_scales(
    x: torch.Tensor,
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    codebook: torch.Tensor,
    tau: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """Return what fp16 copies are kept times, so that they fill fp16: (5,) fp32.

    Of p, of w, of their right sides in the codes' gradients, and what these gradients are multiplied by in the end.
    |w| <= 2 max |dP|, which norms bound; then |f x / t| and |dQ - f delta x / t| follow with |delta| <= 2 max |dP|.
    """

    def largest_norm(matrix: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
        return norms.max() if len(norms) else norms.new_zeros(())

    grad_norm = largest_norm(grad_quantized)
    most = 2 * grad_norm * largest_norm(codebook)
    if grad_posterior is not None:
        most = most + 2 * grad_posterior.abs().max()
    most = most.clamp(min=1e-20)
    by_temperature = factor.to(torch.float32) / tau.to(torch.float32).clamp(max=1.0)
    right = (grad_norm + most * by_temperature * largest_norm(x).clamp(min=1.0)).clamp(min=1e-20)
    p_scale = torch.full_like(most, FP16_SCALE)
    return torch.stack(
        [p_scale, FP16_SCALE / most, FP16_SCALE / right, FP16_SCALE * most / right, right / FP16_SCALE**2]
    )
