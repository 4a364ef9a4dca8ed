"""Entropy and mean of softmax distributions over all codes: the KL term of Gumbel-VQ, the entropy terms of IBQ and LFQ.

    p[m]    = softmax_n((x_m . w_n + b_n) / temperature)
    entropy = mean_m -sum_n p[m,n] log p[m,n]           mean[n] = mean_m p[m,n]         over the M valid rows

With gradients e of the entropy and c[n] of the mean, the softmax's gradient is dP[m,n] = (c[n] - e log p[m,n]) / M, up
to a constant of each row, which drops out. Rows are computed in tiles; the backward computes their scores again.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regvq_fast.matmul import compute_dtype, without_tf32
from regvq_fast.ops.tiling import rows_per_tile
from regvq_fast.ops.validation import check_finite, check_like, check_matrix, check_overflow, check_positive, check_rows


def softmax_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, valid: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy, in nats, and the mean of the rows' softmax of ``(x weight^T + bias) / temperature``.

    Equivalent to this code, which keeps several M x N matrices:

        log_p = F.log_softmax(F.linear(x, weight, bias) / temperature, dim=1)
        return -(log_p.exp() * log_p).sum(1).mean(), log_p.exp().mean(0)

    The mean KL divergence to the uniform distribution is ``log(N) - entropy``.

    Args:
        x: (M, D), M > 0; fp16, bf16, fp32 or fp64.
        weight: (N, D), type and device of ``x``.
        bias: (N,) or None.
        valid: (M,) bool, the rows that count in both means; None: all. Without valid rows entropy and mean are 0.
        temperature: > 0; a number, not a tensor, since it gets no gradient.

    Returns:
        Entropy () and mean (N,), float32 (float64 if ``x`` is). Deterministic. Autocast: inputs are cast to fp32.

    Numerics: scores use fp32, whatever PyTorch's float32 matmul precision, since small temperatures magnify their
    error; the gradients' products follow that setting.

    Gradients: to ``x``, ``weight`` and ``bias``, from both. Double backward, forward-mode differentiation (its
    tangents are silently 0) and the transforms of torch.func are not supported.

    Memory beyond inputs and outputs: O((M + N) * D) and a fixed number of tiles of about 2^20 scores (2^24 on CUDA; at
    least 64 rows). The op is plain PyTorch on every device.

    Raises:
        ValueError: shapes, devices or values that don't fit; no rows; on a CPU also nan or inf, or scores that may
            overflow.
        TypeError: types that don't fit.
    """
    check_matrix("x", x)
    check_matrix("weight", weight, x.shape[1])
    check_like("weight", weight, "x", x)
    if x.shape[0] == 0 or weight.shape[0] == 0:
        raise ValueError(f"x and weight must have rows, got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None:
        check_matrix("bias", bias, weight.shape[0], ndim=1)
        check_like("bias", bias, "x", x)
    if valid is not None:
        check_rows("valid", valid, x.shape[:1], x)
    check_positive("temperature", temperature)
    return _forward_op(x, weight, bias, valid, float(temperature))


class _Tiles:
    """``log p`` of tiles of rows, and the number of valid rows."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, temperature: float
    ) -> None:
        self.dtype, self.factor = compute_dtype(x), 1 / temperature
        self.weight = weight.to(self.dtype).contiguous()
        # Over the temperature, as the scores.
        self.bias = self.weight.new_zeros(len(weight)) if bias is None else bias.to(self.dtype) * self.factor
        self.valid = None if valid is None else valid.to(self.dtype).unsqueeze(1)  # [M, 1]
        self.num_rows = len(x) if valid is None else valid.sum(dtype=torch.float64).clamp_(min=1)
        step = rows_per_tile(len(weight), x.device)
        self.slices = [slice(start, start + step) for start in range(0, len(x), step)]

    def log_p(self, x: Tensor) -> Tensor:
        with without_tf32(x.device):
            return torch.addmm(self.bias, x, self.weight.t(), alpha=self.factor).log_softmax(1)

    def without_invalid(self, values: Tensor, tile: slice) -> Tensor:
        """Set the invalid rows of a tile of values to 0, in place."""
        return values if self.valid is None else values.mul_(self.valid[tile])


def _softmax_statistics_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    tiles = _Tiles(x, weight, bias, valid, temperature)
    entropy, mean = tiles.bias.new_zeros(()), tiles.bias.new_zeros(len(weight))
    for tile in tiles.slices:
        log_p = tiles.log_p(x[tile].to(tiles.dtype))
        p = tiles.without_invalid(log_p.exp(), tile)
        mean += p.sum(0)
        entropy -= p.mul_(log_p).sum()
    return entropy.div_(tiles.num_rows), mean.div_(tiles.num_rows)


def _softmax_statistics_backward_eager(
    grad_entropy: Tensor,
    grad_mean: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    tiles = _Tiles(x, weight, bias, valid, temperature)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    grad_weight, grad_bias = torch.zeros_like(tiles.weight), torch.zeros_like(tiles.bias)
    for tile in tiles.slices:
        x_tile = x[tile].to(tiles.dtype)
        grad = tiles.log_p(x_tile)
        p = grad.clamp(min=-60).exp_()  # subnormal numbers would slow down the products on a CPU
        grad.mul_(-grad_entropy).add_(grad_mean)
        torch._softmax_backward_data(grad, p, 1, tiles.dtype, grad_input=grad)
        tiles.without_invalid(grad.mul_(tiles.factor / tiles.num_rows), tile)
        if grad_x is not None:
            grad_x[tile] = torch.mm(grad, tiles.weight).to(x.dtype)
        if needs_weight:
            grad_weight.addmm_(grad.t(), x_tile)
            grad_bias += grad.sum(0)
    if not needs_weight:
        return grad_x, None, None
    return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)


# ------------------------------------------------------------------------------------------------------- forward


@torch.library.custom_op("regvq::softmax_statistics", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    largest = [check_finite(name, value) for name, value in (("x", x), ("weight", weight), ("bias", bias))]
    bound = (x.shape[1] * largest[0] * largest[1] + largest[2] + 1) / min(1.0, temperature)
    check_overflow(bound, compute_dtype(x), "x, weight, bias or 1 / temperature")
    return _softmax_statistics_eager(x, weight, bias, valid, temperature)


@_forward_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    return x.new_empty((), dtype=dtype), x.new_empty(weight.shape[0], dtype=dtype)


# ------------------------------------------------------------------------------------------------------ backward


@torch.library.custom_op("regvq::softmax_statistics_backward", mutates_args=())
def _backward_op(
    grad_entropy: Tensor,
    grad_mean: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty tensors for those not needed."""
    grads = _softmax_statistics_backward_eager(
        grad_entropy, grad_mean, x, weight, bias, valid, temperature, needs_x, needs_weight
    )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_weight, grad_bias


@_backward_op.register_fake
def _(
    grad_entropy: Tensor,
    grad_mean: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(value: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(0) if value is None or not needed else value.new_empty(value.shape)

    return like(x, needs_x), like(weight, needs_weight), like(bias, needs_weight)


# ------------------------------------------------------------------------------------------ autograd and autocast


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_entropy, grad_mean):  # type: ignore[no-untyped-def]
    needs_x, *needs_weight = ctx.needs_input_grad[:3]
    grads = _backward_op(grad_entropy, grad_mean, *ctx.saved_tensors, ctx.temperature, needs_x, any(needs_weight))
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:3], strict=True)), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    _forward_op.register_autocast(_device_type, torch.float32)
    _backward_op.register_autocast(_device_type, torch.float32)

# -------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.regvq.softmax_statistics)
def _(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[0] * weight[0] * x[1]


@register_flop_formula(torch.ops.regvq.softmax_statistics_backward)
def _(
    grad_entropy: torch.Size, grad_mean: torch.Size, x: torch.Size, weight: torch.Size, *_: object, **__: object
) -> int:
    return 2 * 2 * x[0] * weight[0] * x[1]
