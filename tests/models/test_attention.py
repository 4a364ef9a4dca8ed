"""Attention: the formula, both implementations, one graph, and what it refuses."""

import functools
import math
import sys
import warnings
from unittest import mock

import pytest
import torch

from regvq_fast.models import attention as module
from regvq_fast.models.attention import attention, pytorch_attention, xformers_attention

CASES = [(False, 5), (False, 7), (True, 5)]  # causal, keys; five queries


def make(keys: int, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(**options) for shape in shapes]


def by_formula(query, key, value, *, causal):
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    if causal:
        later = torch.arange(key.shape[1]) > torch.arange(query.shape[1])[:, None]
        scores = scores.masked_fill(later.to(scores.device), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)


@pytest.mark.parametrize(("causal", "keys"), CASES)
def test_it_is_the_formula_with_its_gradients(causal, keys):
    inputs = [tensor.requires_grad_() for tensor in make(keys)]
    output, expected = attention(*inputs, causal=causal), by_formula(*inputs, causal=causal)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad(result, inputs, upstream) for result in (output, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("causal", "keys"), CASES)
def test_both_implementations_agree(causal, keys, dtype):
    pytest.importorskip("xformers.ops")
    inputs = [tensor.requires_grad_() for tensor in make(keys, device="cuda", dtype=dtype)]
    outputs = [function(*inputs, causal=causal) for function in (xformers_attention, pytorch_attention)]
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    tolerance = {"rtol": 0, "atol": 0.02 if dtype == torch.float16 else 1e-2}  # fp32 may multiply in TF32
    torch.testing.assert_close(*outputs, **tolerance)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.gpu
def test_xformers_runs_on_a_gpu_unless_it_does_not_fit(monkeypatch):
    pytest.importorskip("xformers.ops")
    calls = []
    monkeypatch.setattr(module, "xformers_attention", lambda *tensors, **options: calls.append(options))
    attention(*make(5, device="cuda", dtype=torch.float16), causal=True)
    assert calls == [{"causal": True}]
    narrow = [tensor[..., :4] for tensor in make(5, device="cuda", dtype=torch.float16)]
    assert attention(*narrow).shape == (2, 5, 3, 4)
    assert attention(*make(5, device="cuda")).dtype == torch.float64
    assert len(calls) == 1


def test_xformers_is_not_imported_on_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "_xformers", lambda: pytest.fail("it would warn that there is no CUDA"))
    attention(*make(5, dtype=torch.float32))


def test_one_graph():
    inputs = make(5, dtype=torch.float32)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, causal=True), attention(*inputs, causal=True))


@pytest.mark.parametrize(
    ("change", "causal", "message"),
    [
        (lambda q, k, v: (q[0], k, v), False, r"query .*\(B, L, heads, head_dim\).*query \(5, 3, 8\)"),
        (lambda q, k, v: (q, k, v[:, :6]), False, r"\(B, S, heads, head_dim\).*value \(2, 6, 3, 8\)"),
        (lambda q, k, v: (q[:1], k, v), False, r"batch.*query \(1, 5, 3, 8\)"),
        (lambda q, k, v: (q[:, :, :2], k, v), False, r"heads.*query \(2, 5, 2, 8\)"),
        (lambda q, k, v: (q, k, v), True, r"query \(2, 5, 3, 8\), key \(2, 7, 3, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, causal, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*make(7)), causal=causal)


def test_mixed_types_are_refused():
    query, key, value = make(5)
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.float64 and torch\.float64"):
        attention(query.float(), key, value)


def test_where_xformers_has_no_kernel_pytorchs_attention_goes_on(monkeypatch):
    """A build for another PyTorch imports, and refuses every call."""
    asked = []

    def refuses(query, key, value, *, causal):
        asked.append(causal)
        raise NotImplementedError("No operator found\nand many lines of reasons")

    monkeypatch.setattr(module, "_wants_xformers", lambda query: True)
    monkeypatch.setattr(module, "_without_kernel", set())
    monkeypatch.setattr(module, "xformers_attention", refuses)
    query = torch.randn(2, 5, 3, 8)
    expected = pytorch_attention(query, query, query, causal=True)
    with pytest.warns(UserWarning, match="No operator found$"):
        assert torch.equal(attention(query, query, query, causal=True), expected)
    assert torch.equal(attention(query, query, query, causal=True), expected)
    assert asked == [True]  # the second call didn't ask again


@pytest.fixture
def load_xformers():
    """`_xformers`, as if xformers had not been looked for yet; afterwards all is as before."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
            del sys.modules[name]
        yield functools.cache(module._xformers.__wrapped__)


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError", "AttributeError"])
def test_where_xformers_fails_to_import_pytorchs_attention_goes_on(monkeypatch, tmp_path, load_xformers, error):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text(f"raise {error}('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=f"{error}: undefined symbol$") as caught:
        assert [load_xformers() for _ in range(2)] == [None, None]
    assert len(caught) == 1


def test_no_xformers_is_no_warning(monkeypatch, load_xformers):
    monkeypatch.setattr(sys, "path", [])
    with warnings.catch_warnings(action="error"):
        assert load_xformers() is None
