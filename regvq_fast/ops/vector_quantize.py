"""Regularized vector quantization: stochastic-mask selection with a straight-through softmax backward.

Reg-VQ (Zhang et al., CVPR 2023), sections 3.1 and 3.2, Algorithm 1. Legend: M rows, N codes, D channels, G groups of
R = M / G rows.

    s[m,n]         = -scale * |x_m - z_n|^2   (distance)      or      scale * x_m . w_n + b_n   (linear)
    index[m]       = argmax_n (s[m,n] + mask[m] * g[m,n])                                g Gumbel(0, 1)
    best_index[m]  = argmax_n  s[m,n]
    quantized[m]   = z[index[m]]
    perturbation   = |z[index] - z[best_index]|^2
    posterior[g]   = mean over the valid rows of group g of one_hot(index)

The forward is hard; the backward is that of p[m] = softmax((s[m] + mask[m] * g[m]) / t[m]) with the same noise, t = tau
on stochastic rows and 1 elsewhere. No M x N tensor is kept for it: the backward recomputes scores and noise tile by
tile (the PyTorch fallback keeps the scores of small calls).

With heads (x (M, H, D), codebook (H, N, D)) this holds for each head; the heads share the masks of rows.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regvq_fast.dispatch import INPUTS_SCHEMA, Impl, Inputs, on_device_of, resolve_impl
from regvq_fast.matmul import compute_dtype
from regvq_fast.ops.tiling import may_keep
from regvq_fast.ops.validation import (
    as_scalar,
    check_codebook,
    check_finite,
    check_like,
    check_matrix,
    check_overflow,
    check_positive,
    check_rows,
    check_scalar,
    whole_number,
)
from regvq_fast.ops.vector_quantize_fallback import vector_quantize_backward_eager, vector_quantize_eager

CodebookGrad = Literal["soft", "hard", "none"]
_CODEBOOK_GRADS = ("soft", "hard", "none")
_MAX_MASKED_ROWS = 2**31 - 1  # the kernels order row numbers as int32


class VectorQuantizeOutput(NamedTuple):
    """Result of :func:`vector_quantize`; leading dimensions as those of ``x``, heads included."""

    quantized: Tensor
    """(M, D) x.dtype, straight-through gradient."""
    posterior: Tensor
    """(G, N) float32, with heads (G, H, N); straight-through gradient; a row sums to 1, or 0 without valid rows."""
    indices: Tensor
    """(M,) int64, the selected codes."""
    best_indices: Tensor
    """(M,) int64, the codes selected without noise."""
    perturbation: Tensor
    """(M,) float32, squared distance between these two codes; 0 on deterministic rows; no gradient."""


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    seed: Tensor | None = None,
    row_offset: int | Tensor = 0,
    tau: float | Tensor = 0.9,
    groups: int = 1,
    codebook_grad: CodebookGrad = "soft",
    impl: Impl = "auto",
) -> VectorQuantizeOutput:
    """Quantize rows to codes, with Gumbel noise on masked rows and the softmax's gradient on all rows.

    Equivalent to this code, which keeps several M x N matrices:

        s = -scale * torch.cdist(x, codebook) ** 2                # weight given: scale * x @ weight.T + bias
        a = (s + mask[:, None] * gumbel) / torch.where(mask, tau, 1.0)[:, None]
        p, hard = a.softmax(-1), one_hot(a.argmax(-1), N)
        straight_through = hard + p - p.detach()
        quantized = straight_through @ codebook                   # "soft": p, not hard, carries the codebook's gradient
        posterior = straight_through.view(groups, -1, N).mean(1)

    Args:
        x: (..., D) encoder vectors; fp16, bf16, fp32 or fp64. Leading dimensions are flattened to M rows.
        codebook: (N, D) codes, type and device of ``x``. Or (H, N, D), a codebook for each head of ``x`` (..., H, D):
            grouped and product quantization, in the launches of one head. Heads have independent noise.
        weight: None for distance logits; or the shape of ``codebook``, for linear logits, a predicted token
            distribution.
        bias: (N,) or (H, N), or None; only with ``weight``.
        scale: factor of the logits, > 0: a float, or a 0-dim floating-point tensor on the device of ``x``, which can
            change from call to call without recompiling. No gradient.
        mask: (...) bool, the leading shape of ``x`` without heads: the stochastic rows, in all heads. None: no row.
        valid: (...) bool, the shape of ``mask``: the rows that count in their group's posterior. Other rows (padding)
            get no gradient from the posterior; they are quantized like any row, with the same noise as without
            ``valid``, so mask their ``quantized``. None: every row counts.
        seed: 0-dim int64 tensor on the device of ``x``, needed with ``mask``; sample it outside the op.
        row_offset: number of the first row in the global batch: noise depends on (seed, row_offset + row, code) only.
            An int, or a 0-dim int64 tensor on the device of ``x``, which can change without recompiling.
        tau: Gumbel-softmax temperature of the stochastic rows' gradient, > 0; a float or a tensor, as ``scale``.
        groups: G; consecutive groups of M / G rows have a posterior each. 1: one for the batch. B: one per image.
        codebook_grad: gradient of the look-up to the codes. "soft": ``p^T dQ`` (Algorithm 1). "hard": ``dQ`` to the
            selected code (``gumbel_softmax(hard=True)`` then matmul). "none": no gradient. Distance logits have a
            gradient of their own to the codes in each case.
        impl: "auto" | "triton" | "eager". "auto": the Triton kernels on CUDA except for fp64, else eager PyTorch.
            "triton" on a CPU needs Triton's interpreter.

    Returns:
        :class:`VectorQuantizeOutput`. Posterior and perturbation are float64 if ``x`` is.

    Gradients: to ``x``, ``codebook``, ``weight``, ``bias``, from ``quantized`` and ``posterior``. Not supported: double
    backward, forward-mode differentiation (its tangents are silently 0), and the transforms of torch.func other than
    vmap with impl="eager".

    Numerics: scores, softmax, noise and sums use fp32 (fp64 for fp64), whatever PyTorch's float32 matmul precision:
    TF32 would change indices. The gradients' products of fp32 inputs follow that setting. The kernels compute scores of
    fp32 inputs as three TF32 products; for 16-bit inputs they round probabilities and their gradients to 16 bits, as a
    tensor-core product would. "eager" sets probabilities under 1e-26 to 0 in backward. The smallest code wins an exact
    tie. Deterministic: two calls give the same bits. Autocast: floating-point inputs are cast to fp32.

    Memory beyond inputs and outputs, where N counts the codes of all heads (24 M and the bytes per row are per head):

    - Triton, forward: 4 (M + N + G N) bytes, and 24 M for each split of the codes.
    - Triton, backward: 4 N (D + 8) bytes, twice that for "hard" or linear logits. For a chunk of rows, 16 (D + 8) bytes
      per row (12 for 16-bit inputs), and two buffers of scores in the type of ``x``: 4096 rows or 512 MiB each,
      whichever is less, but at least 2^25 scores and 2 KiB per code. Below sm_80 a buffer has max(2^25, 512 N) scores,
      with one more in fp32 forward and two more backward.
    - Eager: O((M + N) * D) and a fixed number of tiles of about 2^20 scores (2^24 on CUDA; at least 64 rows). For the
      backward it keeps M N scores up to 2^21, and those of the stochastic rows up to M N = 2^24.

    Raises:
        ValueError: shapes, devices or values that don't fit; ``mask`` without ``seed``; on a CPU also nan or inf in
            ``x``, ``codebook``, ``weight`` or ``bias``, a ``scale`` or ``tau`` tensor that isn't > 0, or magnitudes
            whose scores may overflow (on CUDA checking would force a synchronization: nan propagates, and overflow
            gives wrong indices).
        TypeError: types that don't fit.
    """
    groups = whole_number("groups", groups)
    if not isinstance(row_offset, Tensor):
        row_offset = whole_number("row_offset", row_offset, "an int or a 0-dim int64 tensor")
    _check_arguments(x, codebook, weight, bias, scale, mask, valid, seed, row_offset, tau, groups, codebook_grad)
    chosen = resolve_impl(impl, x.device, x.dtype)
    if chosen == "triton" and mask is not None and mask.numel() > _MAX_MASKED_ROWS:
        raise ValueError(
            f"the kernels take at most {_MAX_MASKED_ROWS} rows with a mask, got {mask.numel()}: call the op on parts "
            "of them, each with its row_offset, or use impl='eager'"
        )
    leaves, rows = (x, codebook, weight, bias), x.shape[: 1 - codebook.ndim]
    trains = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    # Whether the forward keeps the kernels' log-sum-exps, or the fallback's scores, for the backward.
    keeps = trains and (
        chosen == "triton" or may_keep(x.numel() // x.shape[-1] * codebook.shape[-2], noisy=mask is not None)
    )
    a = Inputs(
        x.reshape(-1, *x.shape[len(rows) :]),
        codebook,
        weight,
        bias,
        None if mask is None else mask.reshape(-1),
        seed,
        as_scalar(tau, x),
        as_scalar(scale, x),
        row_offset if isinstance(row_offset, Tensor) else torch.full((), row_offset, device=x.device),
        groups,
        codebook_grad,
        None if valid is None else valid.reshape(-1),
    )
    quantized, posterior, indices, best_indices, perturbation, _ = _forward_op(*a, keeps, chosen)
    shape = x.shape[:-1]
    return VectorQuantizeOutput(
        quantized.reshape(x.shape),
        posterior,
        indices.reshape(shape),
        best_indices.reshape(shape),
        perturbation.reshape(shape),
    )


def _check_arguments(
    x: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    seed: Tensor | None,
    row_offset: int | Tensor,
    tau: float | Tensor,
    groups: int,
    codebook_grad: str,
) -> None:
    check_codebook(x, codebook)
    if weight is not None:
        check_matrix("weight", weight, x.shape[-1], ndim=codebook.ndim)
        check_like("weight", weight, "x", x)
        if weight.shape != codebook.shape:
            raise ValueError(f"weight {tuple(weight.shape)} and codebook {tuple(codebook.shape)} must have one shape")
    if bias is not None:
        if weight is None:
            raise ValueError("bias belongs to linear logits: give weight as well, or leave bias out")
        check_matrix("bias", bias, codebook.shape[-2], ndim=codebook.ndim - 1)
        check_like("bias", bias, "x", x)
        if bias.shape != codebook.shape[:-1]:
            raise ValueError(f"bias {tuple(bias.shape)} must have one number for each code of {tuple(codebook.shape)}")
    shape = x.shape[: 1 - codebook.ndim]
    for name, rows in (("mask", mask), ("valid", valid)):
        if rows is not None:
            check_rows(name, rows, shape, x)
    if mask is not None and seed is None:
        raise ValueError("mask without seed: stochastic rows need a seed, a 0-dim int64 tensor")
    if seed is not None:
        check_scalar("seed", seed, x)
    if isinstance(row_offset, Tensor):
        check_scalar("row_offset", row_offset, x)
    for name, value in (("scale", scale), ("tau", tau)):
        if isinstance(value, Tensor):
            check_scalar(name, value, x, floating=True)
            if value.requires_grad:
                raise TypeError(f"{name} gets no gradient, but it requires one: give {name}.detach()")
        else:
            check_positive(name, value)
    num_rows = math.prod(shape)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if num_rows and groups > num_rows:
        raise ValueError(f"more groups than rows: groups={groups}, rows={num_rows}")
    if num_rows % groups:
        raise ValueError(f"groups must divide the number of rows, got groups={groups}, rows={num_rows}")
    if codebook_grad not in _CODEBOOK_GRADS:
        raise ValueError(f"codebook_grad must be one of {', '.join(map(repr, _CODEBOOK_GRADS))}, got {codebook_grad!r}")


# ------------------------------------------------------------------------------------------------------- forward


@torch.library.custom_op(
    "regvq::vector_quantize",
    mutates_args=(),
    schema=f"({INPUTS_SCHEMA}, bool keeps, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*arguments):  # type: ignore[no-untyped-def]
    """Return the five outputs, and a tensor for the backward of the same ``impl``, empty unless ``keeps``.

    The kernels keep the rows' log-sum-exp (M, [H]), the fallback the scores over their temperature ([H], M, N).
    """
    *inputs, keeps, impl = arguments
    a = Inputs(*inputs)
    _check_values(a)
    if impl == "triton":
        from regvq_fast.kernels.vector_quantize import vector_quantize_forward

        with on_device_of(a.x):
            return vector_quantize_forward(a, keeps)
    return vector_quantize_eager(a, keeps)


def _check_values(a: Inputs) -> None:
    """Raise for non-finite values, or magnitudes whose scores or perturbations may overflow; on a CPU only."""
    x, codes, weight, bias = (check_finite(name, getattr(a, name)) for name in ("x", "codebook", "weight", "bias"))
    if a.x.device.type != "cpu":
        return
    tau, scale = a.tau.item(), a.scale.item()
    check_positive("tau", tau)
    check_positive("scale", scale)
    products = a.x.shape[-1] * (2 * x * max(codes, weight) + 4 * codes**2)
    bound = (max(1.0, scale) * products + 2 * scale + bias) / min(1.0, tau)
    check_overflow(bound, compute_dtype(a.x), "x, the codes, scale or 1 / tau")


@_forward_op.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    *inputs, keeps, impl = arguments
    a = Inputs(*inputs)
    num_rows, *heads, _ = a.x.shape  # len() would specialize a dynamic size
    codes, dtype, kept_rows = a.codebook.shape[-2], compute_dtype(a.x), num_rows if keeps else 0
    indices = a.x.new_empty(a.x.shape[:-1], dtype=torch.int64)
    kept = (kept_rows, *heads) if impl == "triton" else (*heads, kept_rows, codes)
    return (
        a.codebook.new_empty(a.x.shape),
        a.x.new_empty(a.groups, *heads, codes, dtype=dtype),
        indices,
        torch.empty_like(indices),
        a.x.new_empty(a.x.shape[:-1], dtype=dtype),
        a.x.new_empty(kept, dtype=dtype),
    )


# ------------------------------------------------------------------------------------------------------ backward


@torch.library.custom_op(
    "regvq::vector_quantize_backward",
    mutates_args=(),
    schema=f"({INPUTS_SCHEMA}, Tensor grad_quantized, Tensor? grad_posterior, Tensor indices, Tensor kept, "
    "bool needs_x, bool needs_codes, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(*arguments):  # type: ignore[no-untyped-def]
    """Return the gradients of x, codebook, weight and bias; empty tensors for those not needed."""
    num_inputs, impl = len(Inputs._fields), arguments[-1]
    a, upstream = Inputs(*arguments[:num_inputs]), arguments[num_inputs:-1]
    grads: tuple[Tensor | None, ...]
    if impl == "triton":
        from regvq_fast.kernels.vector_quantize_backward import vector_quantize_backward

        with on_device_of(a.x):
            grads = vector_quantize_backward(a, *upstream)
    else:
        grads = vector_quantize_backward_eager(a, *upstream)
    return tuple(a.x.new_empty(0) if grad is None else grad for grad in grads)


@_backward_op.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    leaves, (needs_x, needs_codes, _) = arguments[:4], arguments[-3:]
    needed = (needs_x, needs_codes, needs_codes, needs_codes)
    return tuple(
        torch.empty_like(leaf, memory_format=torch.contiguous_format)
        if needs and leaf is not None
        else leaves[0].new_empty(0)
        for leaf, needs in zip(leaves, needed, strict=True)
    )


# ------------------------------------------------------------------------------------------ autograd and autocast


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.groups, ctx.codebook_grad, valid, _, ctx.impl = inputs
    indices, kept = output[2], output[5]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, valid, indices, kept)


def _backward(ctx, grad_quantized, grad_posterior, *_):  # type: ignore[no-untyped-def]
    *tensors, valid, indices, kept = ctx.saved_tensors
    a = Inputs._make((*tensors, ctx.groups, ctx.codebook_grad, valid))
    no_grads = (None,) * (len(Inputs._fields) + 2)
    if grad_quantized is None:
        if grad_posterior is None:
            return no_grads
        grad_quantized = a.codebook.new_zeros(a.x.shape)
    needed = ctx.needs_input_grad[:4]
    grads = _backward_op(*a, grad_quantized, grad_posterior, indices, kept, needed[0], any(needed[1:]), ctx.impl)
    return *(grad if needs else None for grad, needs in zip(grads, needed, strict=True)), *no_grads[4:]


_forward_op.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    _forward_op.register_autocast(_device_type, torch.float32)
    _backward_op.register_autocast(_device_type, torch.float32)

# -------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.regvq.vector_quantize)
def _(x: torch.Size, codebook: torch.Size, *_: object, **__: object) -> int:
    return 2 * x.numel() * codebook[-2]  # the scores


@register_flop_formula(torch.ops.regvq.vector_quantize_backward)
def _(x: torch.Size, codebook: torch.Size, *_: object, **__: object) -> int:
    return 5 * 2 * x.numel() * codebook[-2]  # scores, dP, dS k, dS^T x, p^T dQ
