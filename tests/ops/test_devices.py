"""Kernels run on the device of their tensors, which need not be the current one; launches are watched, not a GPU."""

import contextlib

import pytest
import torch
from helpers.kernel_cases import DEVICE, if_kernels_are_elsewhere, kernels, needs_kernels, pass_in_the_interpreter

from regvq_fast import dispatch
from regvq_fast.ops import assign_codes, segment_sum, vector_quantize, weighted_info_nce

pytest.importorskip("triton")


@if_kernels_are_elsewhere
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


@pytest.fixture
def launches(monkeypatch):
    """Record the current device of every kernel launch."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    entered, launched = [], []

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x.device)
        yield
        entered.pop()

    def watched(run):
        return lambda *args, **options: launched.append(list(entered)) or run(*args, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", watched(JITFunction.run))
    monkeypatch.setattr(GridExecutor, "__call__", watched(GridExecutor.__call__))
    return launched


X, CODEBOOK = torch.randn(40, 16), torch.randn(70, 16)
OPS = {
    "vector_quantize": lambda x: (
        vector_quantize(
            x,
            CODEBOOK.to(x.device).requires_grad_(),
            mask=torch.ones(len(x), dtype=torch.bool, device=x.device),
            seed=torch.tensor(1, device=x.device),
            codebook_grad="hard",
            impl="triton",
        ).quantized
    ),
    "assign_codes": lambda x: assign_codes(x, CODEBOOK.to(x.device), impl="triton"),
    "segment_sum": lambda x: segment_sum(x, torch.arange(len(x), device=x.device), len(x), impl="triton"),
    "weighted_info_nce": lambda x: weighted_info_nce(x[None], x[None], impl="triton"),
}


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_every_launch_is_made_in_the_context_of_the_tensors_device(op, launches):
    x = X.to(DEVICE).requires_grad_()
    with kernels("chunked"):
        out = OPS[op](x)
        forward = len(launches)
        if out.requires_grad:
            out.sum().backward()
            assert len(launches) > forward
    assert forward > 0
    assert launches == [[x.device]] * len(launches)


def test_on_a_cpu_nothing_happens():
    with dispatch.on_device_of(X):
        pass
