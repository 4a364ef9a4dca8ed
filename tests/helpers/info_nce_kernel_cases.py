"""Results of the kernels of ``weighted_info_nce``, and the error that they may have."""

from collections.abc import Callable
from typing import Any

import torch
from helpers.kernel_cases import DEVICE, kernels, surrounded
from torch import Tensor

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.reference import weighted_info_nce_reference

NAMES = ("loss", "d query", "d key")
# The tensor cores' fp32 (three TF32 products) and exp2 are a few bits worse than the CPU's.
SLACK = 1 if DEVICE == "cpu" else 8

Inputs = tuple[Tensor, Tensor, Tensor | None]


def upstream(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def results(
    op: Callable[..., Tensor], inputs: Inputs, grad_loss: Tensor | None = None, **settings: Any
) -> list[Tensor]:
    """Loss and gradients of query and key, on the CPU."""
    loss = op(*inputs, **settings)
    grad_loss = upstream(loss.shape) if grad_loss is None else grad_loss
    gradients = torch.autograd.grad(loss, inputs[:2], grad_loss.to(loss))
    return [value.detach().cpu() for value in (loss, *gradients)]


def kernel_results(inputs: Inputs, schedule: str, grad_loss: Tensor | None = None, **settings: Any) -> list[Tensor]:
    with kernels(schedule):
        return results(weighted_info_nce, of_all(surrounded, inputs), grad_loss, impl="triton", **settings)


def of_all(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    query, key, weight = inputs
    return function(query), function(key), None if weight is None else function(weight)


def convert(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return of_all(lambda value: value.detach().to(dtype).requires_grad_(value.requires_grad), inputs)


def assert_within_budget(found: list[Tensor], inputs: Inputs, loss_scale: float = 1.0, tau: float = 0.07) -> None:
    """Against the truth in fp64 at most the error of plain PyTorch in the inputs' type, and a little.

    The little in fp32 is for the rounding of scores as large as 1 / tau, which their exponentials magnify. The kernels'
    sums are fp32 for half types too: there the budget is small however bad plain PyTorch is.
    """
    dtype = inputs[0].dtype
    eps = torch.finfo(dtype).eps
    truth, plain = (
        results(weighted_info_nce_reference, convert(inputs, kind), tau=tau) for kind in (torch.float64, dtype)
    )
    assert [value.dtype for value in found] == [torch.float32, dtype, dtype]
    for name, value, other, true in zip(NAMES, found, plain, truth, strict=True):
        scale = 1.0 if name == "loss" else loss_scale
        size = true.abs().max().clamp(min=1.0 if name == "loss" else 0.0)
        error, allowed = ((v - true).abs().max() / size for v in (value.double() / scale, other.double()))
        if dtype == torch.float32:
            allowed = SLACK * (allowed + (4 + 0.5 / tau) * eps)
        else:
            allowed = allowed.clamp(max=2 * eps) + eps
        if name != "loss":  # a gradient may be subnormal
            allowed += torch.finfo(dtype).smallest_normal * eps / scale / size
        assert error <= allowed, f"{name}: {error / eps:.2f} of {allowed / eps:.2f} eps"
