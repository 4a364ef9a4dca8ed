"""Comparison of a quantizer with its accelerated copy, used by the tests of all integrations."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regvq_fast.integrations import swap_quantizers


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step(quantizer: nn.Module, batch: Tensor, seed: int, **options: Any) -> tuple[Any, list[Tensor | None]]:
    """Outputs, and the gradients of the batch and of all parameters; the upstream gradients are random."""
    torch.manual_seed(seed)
    batch = batch.clone().requires_grad_()
    quantizer.zero_grad()
    outputs = quantizer(batch, **options)
    trained = [output for output in tensors(outputs) if output.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    if trained:
        torch.autograd.backward(trained, [torch.randn(t.shape, generator=generator) for t in trained])
    return outputs, [batch.grad, *(parameter.grad for parameter in quantizer.parameters())]


def assert_same_steps(quantizer: nn.Module, batch: Tensor, steps: int = 2, **options: Any) -> None:
    """Same outputs, gradients and state, in some steps that each start from the state that the last one left."""
    accelerated = copy.deepcopy(quantizer)
    report = swap_quantizers(accelerated)
    assert report.swapped
    assert not report.left_alone
    assert type(accelerated).__name__ == type(quantizer).__name__
    for seed in range(steps):
        outputs, gradients = step(quantizer, batch, seed, **options)
        our_outputs, our_gradients = step(accelerated, batch, seed, **options)
        assert type(our_outputs) is type(outputs)
        for ours, theirs in zip(tree_leaves(our_outputs), tree_leaves(outputs), strict=True):
            if isinstance(theirs, Tensor):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # exact for indices
                assert ours.requires_grad == theirs.requires_grad
            else:
                assert ours == theirs
        torch.testing.assert_close(our_gradients, gradients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(accelerated.state_dict()), dict(quantizer.state_dict()), rtol=1e-5, atol=1e-6)


class _Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tensors(out))])
        return out


def largest_tensor(quantizer: nn.Module, batch: Tensor, **options: Any) -> int:
    """Elements of the largest tensor of a step, forward and backward; what goes on inside of an op isn't seen."""
    with _Sizes() as sizes:
        step(quantizer, batch, 0, **options)
    return sizes.largest
