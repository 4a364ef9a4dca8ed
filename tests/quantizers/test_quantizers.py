"""One suite over all quantizers: outputs, gradients, types, shapes of latents, graphs and state."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.quantizer_cases import D, N, equal, maps, seed

from regvq_fast.matmul import score_dtype
from regvq_fast.quantizers import Quantizer, RegularizedQuantizer


def test_output_has_the_documented_shapes_types_and_finite_values(quantizer: Quantizer) -> None:
    out = quantizer(maps(), seed())
    assert out.quantized.shape == (3, D, 4, 5)
    assert out.quantized.dtype == torch.float32
    assert out.indices.shape == out.perturbation.shape == out.mask.shape == (3, 4, 5)
    assert out.indices.dtype == torch.int64
    assert out.mask.dtype == torch.bool
    assert 0 <= int(out.indices.min()) <= int(out.indices.max()) < quantizer.num_codes
    assert out.loss.shape == ()
    assert torch.isfinite(out.loss)
    assert all(m.shape == () and torch.isfinite(m) and not m.requires_grad for m in out.metrics.values())


def test_quantized_maps_are_the_codes_of_the_indices(quantizer: Quantizer) -> None:
    for module in (quantizer.train(), quantizer.eval()):
        before = quantizer.codes().detach().clone()  # the EMA codebook moves after the look-up
        out = module(maps(), seed())
        torch.testing.assert_close(out.quantized, before[out.indices].permute(0, 3, 1, 2))


def test_evaluation_takes_the_best_code_everywhere_and_changes_nothing(quantizer: Quantizer) -> None:
    quantizer.eval()
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    first, second = quantizer(maps(), seed(1)), quantizer(maps(), seed(2))
    assert equal(first, second)
    assert not first.mask.any()
    assert (first.perturbation == 0).all()
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


def test_the_best_code_has_the_largest_logit(quantizer: Quantizer) -> None:
    quantizer.initialize(maps())
    quantizer.eval()
    logits = quantizer.logits(maps())
    assert logits.shape == (3, 4, 5, quantizer.num_codes)
    assert torch.equal(logits.argmax(-1), quantizer(maps()).indices)
    assert torch.equal(quantizer.best_codes(maps()), quantizer(maps()).indices)
    assert len(logits.argmax(-1).unique()) > 1


def test_the_seed_decides_and_the_global_generator_serves_where_none_is_given(quantizer: Quantizer) -> None:
    a = copy.deepcopy(quantizer)(maps(), seed(5))
    b = copy.deepcopy(quantizer)(maps(), seed(5))
    assert equal(a, b)
    torch.manual_seed(11)
    c = copy.deepcopy(quantizer)(maps())
    torch.manual_seed(11)
    assert equal(c, copy.deepcopy(quantizer)(maps()))


def test_gradients_reach_the_input_and_all_trainable_parameters(quantizer: Quantizer) -> None:
    z = maps().requires_grad_()
    out = quantizer(z, seed())
    (out.quantized.square().mean() + out.loss).backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantizer.parameters() if p.requires_grad)


def test_on_a_cpu_computes_in_fp32_under_autocast(quantizer: Quantizer) -> None:
    z = maps().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = copy.deepcopy(quantizer)(z, seed())
    assert equal(under_autocast, copy.deepcopy(quantizer)(z.float(), seed()))


@pytest.mark.parametrize(
    ("device", "rows", "codes", "fp32", "expected"),
    [
        ("cuda", torch.bfloat16, torch.float32, False, torch.bfloat16),
        ("cuda", torch.float16, torch.float16, False, torch.float16),
        ("cuda", torch.bfloat16, torch.float32, True, torch.float32),
        ("cuda", torch.float32, torch.float32, False, torch.float32),
        ("cuda", torch.bfloat16, torch.float64, False, torch.float64),
        ("cpu", torch.bfloat16, torch.float32, False, torch.float32),
    ],
)
def test_rows_and_codes_meet_in_16_bits_on_a_gpu_alone(device, rows, codes, fp32, expected) -> None:
    x = SimpleNamespace(dtype=rows, is_cuda=device == "cuda")
    assert score_dtype(x, torch.empty(1, dtype=codes), fp32) == expected


def test_in_16_bits_the_results_are_those_of_rounded_rows_and_codes(quantizer, monkeypatch) -> None:
    """As on a GPU: products of bf16 rows and codes, everything else in fp32."""
    in_fp32 = copy.deepcopy(quantizer)
    monkeypatch.setattr("regvq_fast.quantizers.quantizer.score_dtype", lambda z, *_: z.dtype)
    z = maps().bfloat16().requires_grad_()
    out = quantizer(z, seed())
    (out.quantized.float().square().mean() + out.loss).backward()
    assert out.loss.dtype == torch.float32
    assert all(metric.dtype == torch.float32 for metric in out.metrics.values())
    assert all(p.grad.dtype == torch.float32 for p in quantizer.parameters() if p.grad is not None)
    assert z.grad is not None
    assert z.grad.abs().sum() > 0

    monkeypatch.undo()
    expected = in_fp32(z.detach().float(), seed())
    assert (out.indices == expected.indices).float().mean() >= 0.9
    same = (out.indices == expected.indices).unsqueeze(1).expand_as(out.quantized)
    torch.testing.assert_close(out.quantized.float()[same], expected.quantized[same], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_another_type_computes_in_fp32_or_fp64_with_its_rounded_codes(quantizer, dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = copy.deepcopy(quantizer).to(dtype)
    expected = copy.deepcopy(rounded).to(wide)
    z, z_wide = (maps().to(kind).requires_grad_() for kind in (dtype, wide))
    with torch.no_grad():
        z_wide.copy_(z)
    out, out_wide = rounded(z, seed()), expected(z_wide, seed())
    assert out.quantized.dtype == out.loss.dtype == out.perturbation.dtype == wide
    assert torch.equal(out.indices, out_wide.indices)
    assert torch.equal(out.quantized, out_wide.quantized)
    assert torch.equal(out.loss, out_wide.loss)
    assert rounded.codes_of(out.indices).dtype == dtype
    (out.quantized.square().mean() + out.loss).backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert all(torch.isfinite(value).all() for value in rounded.state_dict().values())


def test_compiles_as_one_graph_to_the_same_result(quantizer: Quantizer) -> None:
    torch._dynamo.reset()
    expected = copy.deepcopy(quantizer)(maps(), seed())
    compiled = torch.compile(copy.deepcopy(quantizer), backend="aot_eager", fullgraph=True)
    z = maps().requires_grad_()
    out = compiled(z, seed())
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.quantized, expected.quantized)
    (out.quantized.sum() + out.loss).backward()
    assert z.grad is not None


def test_a_state_dict_carries_over_all_that_a_step_depends_on(quantizer: Quantizer) -> None:
    other = copy.deepcopy(quantizer)
    for value in other.state_dict().values():
        value.zero_()
    quantizer.set_progress(0.5)
    quantizer(maps(), seed())
    other.load_state_dict(quantizer.state_dict())
    for _ in range(2):  # an EMA codebook moves after the look-up
        result, expected = other(maps(), seed(3)), quantizer(maps(), seed(3))
        assert equal(result, expected)
        torch.testing.assert_close(result.metrics, expected.metrics, rtol=0, atol=0)


def test_lookup_gives_the_codes_of_a_token_map(quantizer: Quantizer) -> None:
    indices = torch.arange(N).view(1, 4, 6)
    torch.testing.assert_close(quantizer.codes_of(indices)[0, :, 2, 3], quantizer.codes()[2 * 6 + 3])


@pytest.mark.parametrize("shape", [(2, D + 1, 4, 4), (2, 4, D), (D,), (0, D, 4)])
def test_latents_of_another_shape_are_refused(quantizer: Quantizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"(\(B, {D}, \*\)|at least one position), got .*{re.escape(str(shape))}"):
        quantizer(torch.randn(shape), seed())


@pytest.mark.parametrize("sizes", [(20,), (2, 5, 2), ()], ids=["audio", "video", "vectors"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_latents_of_any_shape_are_the_same_rows(quantizer: Quantizer, sizes: tuple[int, ...], channels_last) -> None:
    if not sizes and isinstance(quantizer, RegularizedQuantizer):
        pytest.skip("a single position has no stochastic ones")
    latents = maps().movedim(1, -1).reshape(-1, D)[: 3 * math.prod(sizes)]
    as_map = latents.view(3, math.prod(sizes), 1, D).movedim(-1, 1)
    expected = copy.deepcopy(quantizer)(as_map.clone().requires_grad_(), seed())
    z = latents.view(3, *sizes, D)
    z = (z if channels_last else z.movedim(-1, 1)).clone().requires_grad_()
    quantizer.channels_last = channels_last
    out = copy.deepcopy(quantizer)(z, seed())
    assert out.quantized.shape == z.shape
    assert out.indices.shape == out.mask.shape == out.perturbation.shape == (3, *sizes)
    rows = out.quantized if channels_last else out.quantized.movedim(1, -1)
    assert torch.equal(rows.reshape(-1, D), expected.quantized.movedim(1, -1).reshape(-1, D))
    assert torch.equal(out.indices.flatten(), expected.indices.flatten())
    assert torch.equal(out.loss, expected.loss)
    (gradient,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, z)
    assert gradient.shape == z.shape
    codes = quantizer.codes_of(out.indices)
    assert codes.shape == z.shape
    quantizer.eval()
    assert torch.equal(quantizer.logits(z).argmax(-1), quantizer(z).indices)
