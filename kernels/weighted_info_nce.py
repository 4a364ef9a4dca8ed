"""Weighted InfoNCE, the probabilistic contrastive loss: similarities, their log-sum-exp and gradients, tile by tile.

Reg-VQ (Zhang et al., CVPR 2023), section 3.3. In each image, over its L positions i and j, a_ij = q_i . k_j / tau,

    loss_i = log(w_i e^{a_ii} + (1/L) sum_{j != i} e^{a_ij}) - a_ii             (Eq. 3 without its constant -log w_i)
    loss_i = log(    e^{a_ii} +       sum_{j != i} e^{a_ij}) - a_ii             (Eq. 2: without weights)

Forward sweeps the keys for BM queries and adds up the negatives online, in units of log 2. The positive is taken out of
its tile and added last, with every term divided by e^{a_ii}: a weight of 0 is no special case, and neither the loss nor
the positive's gradient is a small difference of large numbers. If the queries alone do not fill the GPU, the keys are
split, and a second kernel combines the splits in their order. Forward keeps two numbers per row for backward:

    lse_i      = log(L w_i e^{a_ii} + sum_{j != i} e^{a_ij})                    (Eq. 2: 1 instead of L w_i)
    fraction_i = sum_{j != i} e^{a_ij - lse_i}                                  the negatives' fraction of that sum

Backward, with g the gradient of the losses, takes one chunk at a time: some keys of one image, or several small images.
A sweep writes t, the gradient of a, in the type of the inputs, to which a tensor-core product would round it anyway:

    t_ij = g_i e^{a_ij - lse_i} (j != i),    t_ii = -g_i fraction_i
    dk_j = (1/tau) sum_i t_ij q_i,    dq_i = (1/tau) sum_j t_ij k_j

A chunk has all queries, so its dk needs no accumulator: in the usual call only the keys train, which costs two products
of 2 B L L C operations. g is a factor of t, not of q, which saves a rounding and a copy of q. fp16 can't hold
probabilities under 6e-8 or gradients times a large loss scale: there t is divided by the largest |g| and multiplied by
2^15.

Deterministic: every element has one writer, every sum a fixed order. Memory beyond inputs and outputs: forward three
numbers per row and split if the keys are split; backward one chunk of at most max(2^25, 512 L) elements in the type of
the inputs, its dk in fp32, and dq in fp32 if the queries train. ``chunked`` adds a buffer of as many fp32 similarities,
forward and backward.
"""

import math

import torch
import triton
import triton.language as tl

from regvq_fast.dispatch import Tile, chunk_rows, codes_per_split, dot_precision, is_chunked, pinned_tile
from regvq_fast.kernels.utils import FP16_SCALE, LN_2, LOG2_E, load_rows, multiply, product
from regvq_fast.matmul import image_chunks, product_fp32, without_tf32

# Maximum over no keys: finite, so that 2^(-inf - _LOWEST) is 0, not nan.
_LOWEST = tl.constexpr(-1e30)
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# Fewest keys of a split. Combining the splits costs the forward a kernel.
MIN_SPLIT_KEYS = 256


@triton.jit
def _products(
    a,  # [BM, BK], loaded once, where D <= BK and not HAS_SCORES
    a_ptr,  # (B L, C)
    a_rows,  # [BM] int64
    a_mask,  # [BM] bool
    b_ptr,  # (B L, C)
    b_rows,  # [BN] int64
    b_mask,  # [BN] bool
    products_ptr,  # fp32, where HAS_SCORES
    products_start,  # int64
    offset,  # [BM, BN] int32: a tile of rows lies within 2^31 elements
    D: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return products of some rows of a and of b, [BM, BN] fp32; the ``chunked`` schedule reads them from a buffer."""
    if HAS_SCORES:
        return tl.load(products_ptr + products_start + offset, mask=a_mask[:, None] & b_mask[None, :], other=0.0)
    elif D <= BK:
        b = load_rows(b_ptr, b_rows, b_mask, 0, D, BK)
        return multiply(a, b, tl.zeros([BM, BN], tl.float32), PRECISION)
    else:
        return product(a_ptr, a_rows, a_mask, b_ptr, b_rows, b_mask, D, BM, BN, BK, PRECISION)


@triton.jit
def _write_rows(
    rows,  # [BM] int64, of B L
    row_mask,  # [BM]
    positive,  # [BM] fp32: q_i . k_i
    negative_max,  # [BM] fp32: the largest a_ij of the negatives, in log 2
    negative_sum,  # [BM] fp32: the sum of the negatives' e^{a_ij}, over that of the largest
    weight_ptr,  # (B, L) fp32, where WEIGHTED
    loss_ptr,  # (B, L) fp32
    lse_ptr,  # (B, L) fp32, in log 2
    negative_fraction_ptr,  # (B, L) fp32
    length,
    factor,  # log2(e) / tau
    WEIGHTED: tl.constexpr,
    BM: tl.constexpr,
):
    """Combine the positive with the negatives of BM rows: every term divided by e^{a_ii}, in log 2."""
    log_negative = tl.log2(negative_sum) + (negative_max - positive * factor)
    log_positive = tl.zeros([BM], tl.float32)
    log_length = log_positive
    if WEIGHTED:
        wide_length = tl.full([BM], length, tl.float32)
        log_length = tl.log2(wide_length)
        log_negative -= log_length
        # A single key with weight 0 leaves an empty sum: the smallest normal number keeps its logarithm finite.
        smallest = tl.where(wide_length == 1.0, _SMALLEST, 0.0)
        weight = tl.load(weight_ptr + rows, mask=row_mask, other=1.0)
        log_positive = tl.log2(tl.where(weight == 0.0, smallest, weight))
    largest = tl.maximum(log_positive, log_negative)
    loss = largest + tl.log2(tl.exp2(log_positive - largest) + tl.exp2(log_negative - largest))
    tl.store(loss_ptr + rows, loss * LN_2, mask=row_mask)
    tl.store(lse_ptr + rows, loss + log_length + positive * factor, mask=row_mask)
    tl.store(negative_fraction_ptr + rows, tl.exp2(log_negative - loss), mask=row_mask)


@triton.jit(do_not_specialize=["first_image", "first_row", "num_rows", "num_all"])
def _weighted_info_nce_fwd_kernel(
    query_ptr,  # (B, L, C)
    key_ptr,  # (B, L, C)
    products_ptr,  # (images of the chunk, rows of the chunk, L) fp32: q k^T where HAS_SCORES
    weight_ptr,  # (B, L) fp32, where WEIGHTED
    loss_ptr,  # (B, L) fp32
    lse_ptr,  # (B, L) fp32, in log 2
    negative_fraction_ptr,  # (B, L) fp32
    splits_ptr,  # (splits, 3, B L) fp32, where SPLIT
    first_image,
    first_row,
    num_rows,  # of an image, in the chunk
    length,
    num_all,  # B L
    split_keys,  # keys of a split, a multiple of BN
    factor,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles = tl.cdiv(num_rows, BM)
    image, start = tl.program_id(0) // tiles, first_row + tl.program_id(0) % tiles * BM
    row = start + tl.arange(0, BM)
    row_mask = row < first_row + num_rows
    image_start = (first_image + image).to(tl.int64) * length
    rows = image_start + row
    products_start = (image.to(tl.int64) * num_rows + (start - first_row)) * length
    buffer_row = (tl.arange(0, BM) * length)[:, None]  # [BM, 1]
    # Loaded once, for all keys.
    query = load_rows(query_ptr, rows, row_mask, 0, D, BK) if D <= BK and not HAS_SCORES else row_mask
    positive = tl.zeros([BM], tl.float32)
    negative_max, negative_sum = tl.full([BM], _LOWEST, tl.float32), positive
    first_key = tl.program_id(1) * split_keys
    for first in range(first_key, tl.minimum(first_key + split_keys, length), BN):
        key = first + tl.arange(0, BN)
        col_mask = key < length
        products = _products(
            query, query_ptr, rows, row_mask, key_ptr, image_start + key, col_mask,
            products_ptr, products_start, buffer_row + key[None, :], D, HAS_SCORES, PRECISION, BM, BN, BK,
        )  # fmt: skip
        # Only tiles on the diagonal hold positives, and only the last one has keys out of range; the others skip this.
        if (first + BN > length) | ((first < start + BM) & (first + BN > start)):
            negative = row[:, None] != key[None, :]
            positive += tl.sum(tl.where(negative, 0.0, products), axis=1)
            products = tl.where(negative & col_mask[None, :], products, float("-inf"))
        new_max = tl.maximum(negative_max, tl.max(products, axis=1) * factor)
        terms = tl.exp2(products * factor - new_max[:, None])
        negative_sum = negative_sum * tl.exp2(negative_max - new_max) + tl.sum(terms, axis=1)
        negative_max = new_max
    if SPLIT:
        split = splits_ptr + tl.program_id(1).to(tl.int64) * 3 * num_all + rows
        tl.store(split, positive, mask=row_mask)
        tl.store(split + num_all, negative_max, mask=row_mask)
        tl.store(split + num_all + num_all, negative_sum, mask=row_mask)
    else:
        _write_rows(
            rows, row_mask, positive, negative_max, negative_sum, weight_ptr, loss_ptr, lse_ptr, negative_fraction_ptr,
            length, factor, WEIGHTED, BM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_splits", "num_all"])
def _weighted_info_nce_combine_kernel(
    weight_ptr,  # (B, L) fp32, where WEIGHTED
    loss_ptr,  # (B, L) fp32
    lse_ptr,  # (B, L) fp32, in log 2
    negative_fraction_ptr,  # (B, L) fp32
    splits_ptr,  # (splits, 3, B L) fp32
    num_splits,
    num_all,
    length,
    factor,
    WEIGHTED: tl.constexpr,
    BM: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_mask = rows < num_all
    positive = tl.zeros([BM], tl.float32)
    negative_max, negative_sum = tl.full([BM], _LOWEST, tl.float32), positive
    split = splits_ptr + rows
    for _ in range(num_splits):
        positive += tl.load(split, mask=row_mask, other=0.0)  # 0 in all splits but one
        split += num_all
        split_max = tl.load(split, mask=row_mask, other=0.0)
        split += num_all
        split_sum = tl.load(split, mask=row_mask, other=0.0)
        split += num_all
        new_max = tl.maximum(negative_max, split_max)
        negative_sum = negative_sum * tl.exp2(negative_max - new_max) + split_sum * tl.exp2(split_max - new_max)
        negative_max = new_max
    _write_rows(
        rows, row_mask, positive, negative_max, negative_sum, weight_ptr, loss_ptr, lse_ptr, negative_fraction_ptr,
        length, factor, WEIGHTED, BM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_image", "first_key"])
def _weighted_info_nce_bwd_kernel(
    query_ptr,  # (B, L, C)
    key_ptr,  # (B, L, C)
    products_ptr,  # (images of the chunk, L, keys of the chunk) fp32: q k^T where HAS_SCORES
    grad_loss_ptr,  # (B, L) fp32
    lse_ptr,  # (B, L) fp32, in log 2
    negative_fraction_ptr,  # (B, L) fp32
    grad_scores_ptr,  # (images of the chunk, L, keys of the chunk): t
    first_image,
    first_key,
    num_keys,  # of an image, in the chunk
    length,
    split_keys,  # keys of a split, a multiple of BN
    factor,
    D: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles = tl.cdiv(length, BM)
    image, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BM
    row = start + tl.arange(0, BM)
    row_mask = row < length
    image_start = (first_image + image).to(tl.int64) * length
    rows = image_start + row
    buffer_start = (image.to(tl.int64) * length + start) * num_keys
    buffer_row = (tl.arange(0, BM) * num_keys)[:, None]  # [BM, 1]
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)
    grad = tl.load(grad_loss_ptr + rows, mask=row_mask, other=0.0)
    grad_positive = -grad * tl.load(negative_fraction_ptr + rows, mask=row_mask, other=0.0)
    # Loaded once, for all keys.
    query = load_rows(query_ptr, rows, row_mask, 0, D, BK) if D <= BK and not HAS_SCORES else row_mask
    first_column = tl.program_id(1) * split_keys
    for column in range(first_column, tl.minimum(first_column + split_keys, num_keys), BN):
        columns = column + tl.arange(0, BN)
        col_mask = columns < num_keys
        key = first_key + columns
        offset = buffer_row + columns[None, :]
        products = _products(
            query, query_ptr, rows, row_mask, key_ptr, image_start + key, col_mask,
            products_ptr, buffer_start, offset, D, HAS_SCORES, PRECISION, BM, BN, BK,
        )  # fmt: skip
        scores = tl.exp2(products * factor - lse[:, None]) * grad[:, None]
        first = first_key + column
        if (first < start + BM) & (first + BN > start):
            scores = tl.where(row[:, None] == key[None, :], grad_positive[:, None], scores)
        scores = scores.to(grad_scores_ptr.dtype.element_ty)
        tl.store(grad_scores_ptr + buffer_start + offset, scores, mask=row_mask[:, None] & col_mask[None, :])


def _num_tiles(images: slice, rows: slice, tile: Tile) -> int:
    """Return the number of row tiles in a chunk; a tile has rows of one image."""
    return (images.stop - images.start) * triton.cdiv(rows.stop - rows.start, tile.BM)


def weighted_info_nce_forward(
    query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor | None, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss, lse, negative_fraction), each (B, L) fp32, of checked arguments as the public op's."""
    (num_images, length, width), device, dtype = query.shape, query.device, query.dtype
    loss = torch.empty(num_images, length, dtype=torch.float32, device=device)
    lse, negative_fraction = torch.empty_like(loss), torch.empty_like(loss)
    if loss.numel() == 0:
        return loss, lse, negative_fraction
    if width == 0:  # all similarities are 0, as with one channel of zeros
        query = key = query.new_zeros(num_images, length, 1)
    query, key = query.contiguous(), key.contiguous()
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    chunked, num_rows = is_chunked(device), loss.numel()
    tile = pinned_tile("weighted_info_nce", dtype, width, device)
    chunks = image_chunks(num_images, length, chunk_rows(length) if chunked else num_rows)
    split_keys = codes_per_split(_num_tiles(*chunks[0], tile) * tile.BM, length, tile, MIN_SPLIT_KEYS, device)
    num_splits = triton.cdiv(length, split_keys)
    splits = loss.new_empty(num_splits, 3, num_rows) if num_splits > 1 else None
    for images, rows in chunks:
        products = None
        if chunked:
            with without_tf32(device):
                products = product_fp32(query[images, rows], key[images].mT)
        _weighted_info_nce_fwd_kernel[(_num_tiles(images, rows, tile), num_splits)](
            query, key, products, weight, loss, lse, negative_fraction, splits,
            images.start, rows.start, rows.stop - rows.start, length, num_rows, split_keys, LOG2_E / tau,
            D=query.shape[2], WEIGHTED=weight is not None, HAS_SCORES=chunked, SPLIT=splits is not None,
            PRECISION=dot_precision(dtype), **tile.options(),
        )  # fmt: skip
    if splits is not None:
        _weighted_info_nce_combine_kernel[(triton.cdiv(num_rows, 128),)](
            weight, loss, lse, negative_fraction, splits, num_splits, num_rows, length, LOG2_E / tau,
            WEIGHTED=weight is not None, BM=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, lse, negative_fraction


def weighted_info_nce_backward(
    grad_loss: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    negative_fraction: torch.Tensor,
    tau: float,
    needs_query: bool,
    needs_key: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return gradients of (query, key) in their types; None for those not needed.

    lse and negative_fraction, each (B, L) fp32, are the forward's.
    """
    (num_images, length, width), device, dtype = query.shape, query.device, query.dtype
    query, key, grad_loss = query.contiguous(), key.contiguous(), grad_loss.contiguous()
    grad_query = torch.zeros(query.shape, dtype=torch.float32, device=device) if needs_query else None
    grad_key = torch.empty_like(key) if needs_key else None
    if query.numel() == 0:
        return None if grad_query is None else grad_query.to(dtype), grad_key
    magnitude: float | torch.Tensor = 1 / tau
    if dtype == torch.float16:
        largest = grad_loss.abs().amax().clamp(min=1e-30)
        grad_loss, magnitude = grad_loss * (FP16_SCALE / largest), largest * (1 / (FP16_SCALE * tau))
    elif dtype == torch.bfloat16:  # its range suffices: the product writes the gradient directly
        grad_loss, magnitude = grad_loss * magnitude, 1.0
    chunked, tile = is_chunked(device), pinned_tile("weighted_info_nce_backward", dtype, width, device)
    buffer = None
    for images, keys in image_chunks(num_images, length, chunk_rows(length)):
        num_keys = keys.stop - keys.start
        shape = (images.stop - images.start, length, num_keys)
        buffer = query.new_empty(math.prod(shape)) if buffer is None else buffer  # the first chunk is the largest
        grad_scores, products = buffer[: math.prod(shape)].view(shape), None
        if chunked:
            with without_tf32(device):
                products = product_fp32(query[images], key[images, keys].mT)
        num_tiles = _num_tiles(images, slice(0, length), tile)
        split_keys = codes_per_split(num_tiles * tile.BM, num_keys, tile, MIN_SPLIT_KEYS, device)
        _weighted_info_nce_bwd_kernel[(num_tiles, triton.cdiv(num_keys, split_keys))](
            query, key, products, grad_loss, lse, negative_fraction, grad_scores,
            images.start, keys.start, num_keys, length, split_keys, LOG2_E / tau,
            D=width, HAS_SCORES=chunked, PRECISION=dot_precision(dtype), **tile.options(),
        )  # fmt: skip
        if grad_key is not None and dtype == torch.bfloat16:
            torch.bmm(grad_scores.mT, query[images], out=grad_key[images, keys])
        elif grad_key is not None:
            torch.mul(product_fp32(grad_scores.mT, query[images]), magnitude, out=grad_key[images, keys])
        if grad_query is not None:
            grad_query[images] += product_fp32(grad_scores, key[images, keys])
    return None if grad_query is None else grad_query.mul_(magnitude).to(dtype), grad_key
