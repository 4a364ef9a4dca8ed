"""Weighted InfoNCE: the probabilistic contrastive loss of Reg-VQ (Zhang et al., CVPR 2023, section 3.3).

With ``a_ij = query_i . key_j / tau`` in each image, L positions of C channels:

    vanilla (Eq. 2)    loss_i = log(      e^{a_ii} +         sum_{j != i} e^{a_ij} ) - a_ii
    weighted (Eq. 3)   loss_i = log( w_i  e^{a_ii} + (1/L) * sum_{j != i} e^{a_ij} ) - a_ii

Eq. 3 also has the term ``-log w_i``, which has no gradient and is infinite for w_i = 0. Without it the value is finite
for every w >= 0, and the gradient is that of Eq. 3 wherever that is defined.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regvq_fast.dispatch import Impl, on_device_of, resolve_impl
from regvq_fast.matmul import compute_dtype, image_chunks, without_tf32
from regvq_fast.ops.row_passes import log_sum_exp, softmax
from regvq_fast.ops.tiling import may_keep, rows_per_tile
from regvq_fast.ops.validation import check_finite, check_like, check_matrix, check_overflow, check_positive


def weighted_info_nce(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    *,
    tau: float = 0.07,
    impl: Impl = "auto",
) -> Tensor:
    """Return the contrastive loss of every position: its positive is the same position, its negatives all others.

    Without weight it is equivalent to ``cross_entropy(query @ key.mT / tau, arange(L), reduction="none")``.

    Args:
        query: (B, L, C) features of the original, fp16, bf16, fp32 or fp64; usually L2-normalised over C.
        key: (B, L, C) features of the reconstruction, shape, type and device of ``query``.
        weight: (B, L) floating point, the weights of the positives, >= 0. They are not normalised here; Eq. 3 wants sum
            1 in each image. A larger weight means a weaker pull. None: vanilla InfoNCE. No gradient.
        tau: temperature, > 0; a number, not a tensor, since it gets no gradient.
        impl: "auto" | "triton" | "eager". "auto": the Triton kernels on CUDA except for fp64, else eager PyTorch.
            "triton" on a CPU needs Triton's interpreter.

    Returns:
        (B, L) float32 (float64 for float64 inputs). Sum it over an image for Eq. 3, average it for Eq. 2.

    Gradients: to ``query`` and ``key``. Double backward, forward-mode differentiation (its tangents are silently 0) and
    the transforms of torch.func are not supported.

    Numerics: similarities, sums and the result use fp32, whatever PyTorch's float32 matmul precision. The gradients'
    products of fp32 inputs follow that setting. The kernels compute similarities of fp32 inputs as three TF32 products;
    for 16-bit inputs they round the similarities' gradients to 16 bits, as a tensor-core product would. Deterministic.
    Autocast: inputs are cast to fp32. An image with a single position has no negatives: its loss is ``log w`` (0
    without weight; w = 0 counts as the smallest normal number) and its gradient 0.

    Memory beyond inputs and output: 8 B L bytes are kept for the backward, and

    - Triton: forward 12 B L bytes for each split of the keys; backward a buffer of at most max(2^25, 512 L)
      similarities in the type of ``query``, and fp32 gradients of a chunk of keys and, if they train, of all queries.
      Below sm_80 also an fp32 buffer of as many similarities, forward and backward.
    - Eager: O(B * L * C) and a fixed number of tiles of about 2^20 similarities (2^24 on CUDA; at least 64 rows). For
      the backward it keeps B L^2 similarities up to 2^21.

    Raises:
        ValueError: shapes, devices or values that don't fit; on a CPU also nan or inf in an input, a negative
            weight, or similarities that may overflow (on CUDA checking would force a synchronization).
        TypeError: types that don't fit.
    """
    check_matrix("query", query, ndim=3)
    check_matrix("key", key, ndim=3)
    if query.shape != key.shape:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have one shape")
    check_like("key", key, "query", query)
    if weight is not None:
        check_matrix("weight", weight)
        if weight.shape != query.shape[:2]:
            raise ValueError(f"weight must have shape {tuple(query.shape[:2])}, got {tuple(weight.shape)}")
        if weight.device != query.device:
            raise ValueError(f"weight is on {weight.device} but query on {query.device}; move them to one device")
        weight = weight.detach()
    check_positive("tau", tau)
    chosen = resolve_impl(impl, query.device, query.dtype)
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    keeps = trains and chosen == "eager" and may_keep(query.shape[0] * query.shape[1] ** 2)
    return _forward_op(query, key, weight, float(tau), keeps, chosen)[0]


# ---------------------------------------------------------------------------------------------- PyTorch fallback


def _tiles(query: Tensor) -> list[tuple[slice, slice]]:
    num_images, length, _ = query.shape
    return image_chunks(num_images, length, rows_per_tile(max(1, length), query.device))


def _log_factors(weight: Tensor | None, length: int, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """Return the logarithms of the weights of positives (B, L) and negatives."""
    if weight is None:
        return None, 0.0
    # A single position with weight 0 leaves an empty sum: the smallest normal number keeps its logarithm finite.
    smallest = torch.finfo(dtype).tiny if length == 1 else 0.0
    return weight.to(dtype).clamp(min=smallest).log_(), -math.log(max(1, length))


def _similarities(
    query: Tensor, key: Tensor, images: slice, rows: slice, tau: float, out: Tensor | None = None
) -> Tensor:
    """Return similarities over tau, (images, rows, L)."""
    dtype = compute_dtype(query)
    with without_tf32(query.device):
        return torch.bmm(query[images, rows].to(dtype) / tau, key[images].to(dtype).mT, out=out)


def _weighted_info_nce_eager(
    query: Tensor, key: Tensor, weight: Tensor | None, tau: float, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query)
    kept = query.new_empty(query.shape[0] if keeps else 0, query.shape[1], query.shape[1], dtype=dtype)
    log_positive, log_negative = _log_factors(weight, query.shape[1], dtype)
    loss = torch.empty(query.shape[:2], dtype=dtype, device=query.device)
    lse, negative_fraction = torch.empty_like(loss), torch.empty_like(loss)
    for images, rows in _tiles(query):
        a = _similarities(query, key, images, rows, tau, out=kept[images, rows] if keeps else None)
        diagonal = a.diagonal(rows.start, 1, 2)
        positive = diagonal.clone()
        if log_positive is not None:
            diagonal += log_positive[images, rows] - log_negative
        lse[images, rows] = log_sum_exp(a)
        loss[images, rows] = lse[images, rows] + log_negative - positive
        negative_fraction[images, rows] = (diagonal - lse[images, rows]).expm1_().neg_()
    return loss, lse, negative_fraction, kept


def _weighted_info_nce_backward_eager(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    negative_fraction: Tensor,
    kept: Tensor,
    tau: float,
    needs_query: bool,
    needs_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dtype = compute_dtype(query)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device) if needs_query else None
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device) if needs_key else None
    for images, rows in _tiles(query):
        a = kept[images, rows] if len(kept) else _similarities(query, key, images, rows, tau)
        factor = grad_loss[images, rows].to(dtype) / tau
        a = softmax(a, lse[images, rows], factor, out=torch.empty_like(a) if len(kept) else a)
        a.diagonal(rows.start, 1, 2).copy_(-negative_fraction[images, rows] * factor)
        if grad_query is not None:
            grad_query[images, rows] = torch.bmm(a, key[images].to(dtype)).to(query.dtype)
        if grad_key is not None:
            grad_key[images].baddbmm_(a.mT, query[images, rows].to(dtype))
    return grad_query, None if grad_key is None else grad_key.to(key.dtype)


# ------------------------------------------------------------------------------------------------------- forward


@torch.library.custom_op("regvq::weighted_info_nce", mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, weight: Tensor | None, tau: float, keeps: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of every row (B, L), and three tensors for the backward of the same ``impl``.

    They are the log-sum-exp without the negatives' weight 1 / L (in log 2 for the kernels), the negatives' fraction of
    that sum, and the fallback's similarities (B, L, L) with the weights of positives; these are empty unless ``keeps``.
    """
    largest = [check_finite(name, value) for name, value in (("query", query), ("key", key), ("weight", weight))]
    bound = (query.shape[2] * largest[0] * largest[1] + 1) / min(1.0, tau)
    check_overflow(bound, compute_dtype(query), "query, key or 1 / tau")
    if weight is not None and weight.device.type == "cpu" and (weight < 0).any():
        raise ValueError(f"weight must not be negative, got {weight.min().item()}")
    if impl == "triton":
        from regvq_fast.kernels.weighted_info_nce import weighted_info_nce_forward

        with on_device_of(query):
            return *weighted_info_nce_forward(query, key, weight, tau), query.new_empty(0)
    return _weighted_info_nce_eager(query, key, weight, tau, keeps)


@_forward_op.register_fake
def _(
    query: Tensor, key: Tensor, weight: Tensor | None, tau: float, keeps: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_images, length, dtype = query.shape[0], query.shape[1], compute_dtype(query)
    loss = query.new_empty(num_images, length, dtype=dtype)
    kept = query.new_empty(num_images if keeps else 0, length, length, dtype=dtype)
    return loss, torch.empty_like(loss), torch.empty_like(loss), query.new_empty(0) if impl == "triton" else kept


# ------------------------------------------------------------------------------------------------------ backward


@torch.library.custom_op("regvq::weighted_info_nce_backward", mutates_args=())
def _backward_op(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    negative_fraction: Tensor,
    kept: Tensor,
    tau: float,
    impl: str,
    needs_query: bool,
    needs_key: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key; empty tensors for those not needed."""
    if impl == "triton":
        from regvq_fast.kernels.weighted_info_nce import weighted_info_nce_backward

        with on_device_of(query):
            grads = weighted_info_nce_backward(
                grad_loss, query, key, lse, negative_fraction, tau, needs_query, needs_key
            )
    else:
        grads = _weighted_info_nce_backward_eager(
            grad_loss, query, key, lse, negative_fraction, kept, tau, needs_query, needs_key
        )
    grad_query, grad_key = (query.new_empty(0) if grad is None else grad for grad in grads)
    return grad_query, grad_key


@_backward_op.register_fake
def _(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    negative_fraction: Tensor,
    kept: Tensor,
    tau: float,
    impl: str,
    needs_query: bool,
    needs_key: bool,
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape) if needs_query else query.new_empty(0),
        key.new_empty(key.shape) if needs_key else key.new_empty(0),
    )


# ------------------------------------------------------------------------------------------ autograd and autocast


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, _, ctx.tau, _, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, *output[1:])


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    needs_query, needs_key = ctx.needs_input_grad[:2]
    grad_query, grad_key = _backward_op(grad_loss, *ctx.saved_tensors, ctx.tau, ctx.impl, needs_query, needs_key)
    return grad_query if needs_query else None, grad_key if needs_key else None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    _forward_op.register_autocast(_device_type, torch.float32)
    _backward_op.register_autocast(_device_type, torch.float32)

# -------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.regvq.weighted_info_nce)
def _(query: torch.Size, *_: object, **__: object) -> int:
    return 2 * query[0] * query[1] * query[1] * query[2]


@register_flop_formula(torch.ops.regvq.weighted_info_nce_backward)
def _(grad_loss: torch.Size, query: torch.Size, *_: object, **__: object) -> int:
    return 2 * 2 * query[0] * query[1] * query[1] * query[2]
