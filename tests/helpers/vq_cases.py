"""Inputs for ``vector_quantize`` and its reference, and every output and gradient of a call: shared by its tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regvq_fast.ops.reference import vector_quantize_reference

LEAVES = ("x", "codebook", "weight", "bias")
LOGITS = ("distance", "linear", "linear with bias")
MASKS = ("no mask", "all", "random")
SEED = torch.tensor(1234567890123456789)


def make_inputs(
    logits: str = "distance",
    mask: str = "random",
    num_rows: int = 24,
    num_codes: int = 11,
    width: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of the op; floating-point tensors are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs: dict[str, Any] = {"x": leaf(num_rows, width), "codebook": leaf(num_codes, width)}
    if logits != "distance":
        inputs["weight"] = leaf(num_codes, width)
    if logits == "linear with bias":
        inputs["bias"] = leaf(num_codes)
    if mask != "no mask":
        random = torch.rand(num_rows, generator=generator) < 0.5
        inputs |= {"mask": random if mask == "random" else torch.ones_like(random), "seed": SEED}
    return inputs


def make_head_inputs(heads: int, *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Like :func:`make_inputs`, with heads: x (M, H, D), codebook and weight (H, N, D), bias (H, N)."""
    each = [make_inputs(*arguments, **settings | {"seed": head}) for head in range(heads)]
    stacked = {
        name: torch.stack([inputs[name].detach() for inputs in each], int(name == "x")).requires_grad_()
        for name in LEAVES
        if name in each[0]
    }
    return each[0] | stacked


def head_of(inputs: dict[str, Any], head: int) -> dict[str, Any]:
    """The inputs of one head of :func:`make_head_inputs`, as those of a call without heads."""
    leaves = {name: inputs[name] for name in LEAVES if name in inputs}
    chosen = {name: value[:, head] if name == "x" else value[head] for name, value in leaves.items()}
    return inputs | {name: value.detach().clone().requires_grad_() for name, value in chosen.items()}


def frozen(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, none of which trains."""
    return {name: value.detach() for name, value in inputs.items()}


def copy_leaves(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with new leaves of another type."""
    return inputs | {
        name: inputs[name].detach().to(dtype).requires_grad_(inputs[name].requires_grad)
        for name in LEAVES
        if inputs.get(name) is not None
    }


def upstream(num_rows: int, width: int, groups: int, num_codes: int, few_digits: bool = True) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantized`` and ``posterior``; the latter's scale makes both matter.

    With ``few_digits`` the former is exact in every type: no input of backward is rounded.
    """
    generator = torch.Generator().manual_seed(99)
    grad_quantized = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    if few_digits:
        grad_quantized = grad_quantized.mul(32).round().div(32)
    grad_posterior = torch.randn(groups, num_codes, generator=generator, dtype=torch.float64) * num_rows / groups
    return grad_quantized, grad_posterior


def outputs_and_gradients(
    op: Callable[..., Any],
    inputs: dict[str, Any],
    use: tuple[str, ...] = ("quantized", "posterior"),
    loss_scale: float = 1.0,
    few_digits: bool = True,
    **settings: Any,
) -> dict[str, Tensor]:
    """Named outputs of ``op`` and, as "d x" and so on, the gradients of its leaves (zero where there is none)."""
    output = op(**inputs, **settings)
    x, codebook = inputs["x"], inputs["codebook"]
    results = {name: getattr(output, name).detach() for name in output._fields}
    groups = settings.get("groups", 1)
    num_codes = codebook.shape[:-1].numel()
    grads = upstream(x.shape[:-1].numel(), x.shape[-1], groups, num_codes, few_digits=few_digits)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for name, grad in zip(("quantized", "posterior"), grads, strict=True):
        value = getattr(output, name)
        if name in use:
            grad = (grad * loss_scale).to(x.device)
            loss = loss + (value.double() * grad.reshape(value.shape)).sum()
    leaves = [name for name in LEAVES if inputs.get(name) is not None and inputs[name].requires_grad]
    gradients = torch.autograd.grad(loss, [inputs[name] for name in leaves], allow_unused=True) if leaves else []
    for name, gradient in zip(leaves, gradients, strict=True):
        results[f"d {name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return results


def plain_low_precision(x: Tensor, codebook: Tensor, **arguments: Any) -> Any:
    """The reference in the inputs' own type; cdist has no half types, so distances are spelt out as a product."""
    if "weight" not in arguments:
        arguments |= {"weight": 2 * codebook, "bias": -arguments.get("scale", 1.0) * codebook.square().sum(-1)}
    return vector_quantize_reference(x, codebook, **arguments)


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Equal integers; floats within ``tolerance`` of the tensor's largest magnitude (or of 1)."""
    assert results.keys() == expected.keys()
    for name, value in results.items():
        other = expected[name]
        assert value.shape == other.shape, name
        if value.is_floating_point():
            atol = tolerance * max(1.0, float(other.abs().max()) if other.numel() else 0.0)
            torch.testing.assert_close(value, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(value, other), name
