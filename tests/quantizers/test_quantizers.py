"""One suite over all quantizers, then what is special to each."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from regvq_fast.losses.prior import prior_kl
from regvq_fast.matmul import score_dtype
from regvq_fast.padding import Padding
from regvq_fast.quantizers import (
    BSQQuantizer,
    EMAQuantizer,
    FSQQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    LFQQuantizer,
    NearestQuantizer,
    Quantizer,
    QuantizerOutput,
    RegularizedQuantizer,
    SimVQQuantizer,
)
from regvq_fast.quantizers.mask import stochastic_mask

N, D = 24, 8
BUILDERS = {
    "reg-vq": lambda: RegularizedQuantizer(N, D),
    "reg-vq-linear": lambda: RegularizedQuantizer(N, D, logits="linear"),
    "reg-vq-distance": lambda: RegularizedQuantizer(N, D, logits="distance"),
    "gumbel-vq": lambda: GumbelQuantizer(N, D),
    "vq-gan": lambda: NearestQuantizer(N, D),
    "vq-vae": lambda: EMAQuantizer(N, D),
    "fsq": lambda: FSQQuantizer(3 * 4**7, D, levels=(3, *[4] * 7)),
    "lfq": lambda: LFQQuantizer(2**D, D),
    "lfq-groups": lambda: LFQQuantizer(2**D, D, temperature=1.0, group_bits=3),
    "bsq": lambda: BSQQuantizer(2**D, D),
    "vq-gan-rotation": lambda: NearestQuantizer(N, D, rotation_trick=True),
    "vq-vae-kmeans": lambda: EMAQuantizer(N, D, kmeans_init=True),
    "simvq": lambda: SimVQQuantizer(N, D),
    "ibq": lambda: IBQQuantizer(N, D),
}


@pytest.fixture(params=BUILDERS, ids=str)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return BUILDERS[request.param]()


def maps(batch: int = 3, height: int = 4, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, D, height, width, generator=generator).to(memory_format=torch.channels_last)


def seed(value: int = 7) -> Tensor:
    return torch.tensor(value)


def equal(a: QuantizerOutput, b: QuantizerOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor))


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


def test_maps_without_a_position_are_refused(quantizer: Quantizer) -> None:
    with pytest.raises(ValueError, match=r"\(0, 8, 4, 5\)"):
        quantizer(torch.zeros(0, D, 4, 5))


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
    with pytest.raises(ValueError, match=rf"\(B, {D}, \*\)|at least one position"):
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


# ------------------------------------------------------------------------------------------------------- reg-vq


def test_reg_vq_masks_exactly_the_share_of_every_image_and_redraws_it() -> None:
    quantizer = RegularizedQuantizer(N, D, mask_ratio=0.4)
    first, second = quantizer(maps(), seed(1)), quantizer(maps(), seed(2))
    assert (first.mask.flatten(1).sum(1) == math.floor(0.4 * 20)).all()
    assert not torch.equal(first.mask[0], first.mask[1])
    assert not torch.equal(first.mask, second.mask)
    assert (first.perturbation[~first.mask] == 0).all()


def test_a_mask_of_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode .*'random'$"):
        stochastic_mask(2, 20, 0.4, seed(), mode="random")


def test_bernoulli_mask_has_its_ratio_on_average() -> None:
    mask = stochastic_mask(100, 1000, 0.3, seed(), mode="bernoulli")
    assert abs(mask.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1e5)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_a_batch_split_over_ranks_draws_the_same_mask(mode: str) -> None:
    whole = stochastic_mask(4, 20, 0.4, seed(), mode=mode)
    parts = [stochastic_mask(2, 20, 0.4, seed(), mode=mode, row_offset=offset) for offset in (0, 40)]
    assert torch.equal(whole, torch.cat(parts))


def test_every_position_is_masked_equally_often() -> None:
    counts = torch.stack([stochastic_mask(50, 16, 0.25, seed(s)).view(50, 16).sum(0) for s in range(40)]).sum(0)
    expected = 2000 * 0.25
    # Chi-square with 15 degrees of freedom; draws without replacement vary less than independent ones.
    assert float(((counts - expected) ** 2 / (expected * 0.75)).sum()) < 37.7


def test_reg_vq_split_over_ranks_selects_the_same_codes() -> None:
    quantizer = RegularizedQuantizer(N, D)
    z = maps(batch=4)
    quantizer(maps(), seed(6))  # leaves an error for the next step
    other = copy.deepcopy(quantizer)
    whole = quantizer(z, seed())
    halves = [other(z[k : k + 2], seed(), k * 20) for k in (0, 2)]
    torch.testing.assert_close(other.error, quantizer.error)
    assert torch.equal(whole.indices, torch.cat([h.indices for h in halves]))


LOGITS = ["cosine", "distance", "linear"]


def latents(code_dim: int, batch: int = 4, seed: int = 0) -> Tensor:
    """Maps as a new encoder makes them: small, off the origin, of far fewer directions than channels."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, code_dim, generator=torch.Generator().manual_seed(9))
    values = torch.randn(batch, 8, 8, 6, generator=generator) @ directions
    return (0.1 * values + 0.3).permute(0, 3, 1, 2)


def scores_of(quantizer: RegularizedQuantizer, z: Tensor) -> Tensor:
    """(M, N), by the definition of each kind of logits."""
    rows = (quantizer._to_rows(z) - quantizer.shift) * quantizer.gain
    scale = quantizer.log_scale.exp()
    if quantizer.settings.logits != "distance":
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    if quantizer.settings.logits == "linear":
        return scale * quantizer.proj(rows)
    return -scale * torch.cdist(rows, quantizer.codes()).square()


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("num_codes", "code_dim"), [(64, 8), (256, 32), (1024, 256), (8192, 64), (16384, 8)])
def test_noise_moves_as_many_rows_of_a_new_quantizer_as_it_should(logits: str, num_codes: int, code_dim: int) -> None:
    torch.manual_seed(0)
    quantizer = RegularizedQuantizer(num_codes, code_dim, logits=logits, mask_ratio=1.0)
    quantizer.initialize(latents(code_dim))
    z = latents(code_dim, seed=1)
    out = quantizer(z, seed())
    assert 0.45 < float(out.metrics["perturbed"]) < 0.75
    # What a row that is sampled moves by is far below the distance of two random codes.
    codes = quantizer.codes().detach()
    between = 2 * (codes - codes.mean(0)).square().sum(1).mean()
    assert float(out.perturbation.mean() / between) < 0.5


@pytest.mark.parametrize("logits", LOGITS)
def test_metrics_are_those_of_the_softmax_of_the_scores(logits: str) -> None:
    torch.manual_seed(0)
    quantizer = RegularizedQuantizer(40, 16, logits=logits)
    quantizer.initialize(latents(16))
    z = latents(16, seed=1)[:, :, :2, :4]  # eight positions an image: all of them are looked at
    p = scores_of(quantizer, z).detach().softmax(1)
    scale = quantizer.log_scale.exp().item()
    metrics = quantizer(z, seed()).metrics
    torch.testing.assert_close(metrics["largest_p"], p.amax(1).mean())
    torch.testing.assert_close(metrics["entropy"], -(p * p.log()).sum(1).mean())
    assert metrics["logit_scale"].item() == pytest.approx(scale)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("factor", [0.02, 50.0])
def test_the_scale_finds_back_to_where_noise_means_something(logits: str, factor: float) -> None:
    """Whatever an encoder does to its latents."""
    torch.manual_seed(0)
    quantizer = RegularizedQuantizer(128, 16, logits=logits)
    quantizer.initialize(latents(16))
    quantizer.log_scale.add_(math.log(factor))
    z = latents(16, seed=1)
    before = float(quantizer(z, seed()).metrics["largest_p"])
    assert abs(1 - before - 0.6) > 0.2
    for step in range(200):
        metrics = quantizer(z, seed(step)).metrics
    assert 1 - float(metrics["largest_p"]) == pytest.approx(0.6, abs=0.02)
    assert float(metrics["perturbed"]) == pytest.approx(0.6, abs=0.15)


def test_the_scale_stands_still_in_evaluation_and_without_a_mask_it_is_controlled_all_the_same() -> None:
    quantizer = RegularizedQuantizer(N, D, mask_ratio=0)
    before = quantizer.log_scale.clone()
    quantizer.eval()(maps(), seed(1))
    assert torch.equal(quantizer.log_scale, before)
    for step in (1, 2):
        metrics = quantizer.train()(maps(), seed(step)).metrics
    assert not torch.equal(quantizer.log_scale, before)
    assert metrics["perturbed"] == 0


@pytest.mark.parametrize("num_codes", [2, 3])
def test_few_codes_leave_the_scale_finite(num_codes: int) -> None:
    """Noise can't give three of five rows another one of two codes."""
    torch.manual_seed(0)
    quantizer = RegularizedQuantizer(num_codes, D)
    quantizer.initialize(maps())
    for step in range(100):
        quantizer(maps(), seed(step))
    assert abs(float(quantizer.log_scale)) < 10


def test_equal_codes_leave_the_scale_in_range() -> None:
    quantizer = RegularizedQuantizer(N, D)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(1.0)
    for step in range(2000):
        rows = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(step))
        quantizer._control(rows, seed(step), Padding())
    assert torch.isfinite(quantizer(maps(), seed()).quantized).all()


def test_initialize_makes_codes_of_latents_and_gives_their_channels_unit_variance() -> None:
    torch.manual_seed(0)
    z = latents(16)
    quantizer = RegularizedQuantizer(32, 16, logits="distance")
    quantizer.initialize(z)
    rows = quantizer._standardized(quantizer._to_rows(z))
    torch.testing.assert_close(rows.std(0), torch.ones(16))
    cosine = torch.nn.functional.cosine_similarity(quantizer.codes()[:, None], rows[None], dim=2).amax(1)
    assert cosine.min().item() > 0.9
    many = RegularizedQuantizer(1000, 16)  # more codes than latents
    many.initialize(z)
    assert len(many.embedding.weight.unique(dim=0)) == 1000
    # Copies of a latent differ in the directions that latents have; the noise of a code alone has all directions.
    flat = latents(16) * torch.tensor([1.0, 1.0, *[0.0] * 14]).view(1, 16, 1, 1)
    many.initialize(flat)
    first = many.codes()[: len(rows) // 2]
    copies = many.codes()[len(rows) // 2 : 2 * (len(rows) // 2)]
    assert (copies - first)[:, :2].abs().mean() > 3 * (copies - first)[:, 2:].abs().mean()
    with pytest.raises(ValueError, match=r"single latent .*\(1, 16, 1, 1\)"):
        quantizer.initialize(z[:1, :, :1, :1])


def test_no_fresh_code_is_nearest_to_every_small_input() -> None:
    quantizer = RegularizedQuantizer(256, 32).eval()
    out = quantizer(0.01 * torch.randn(8, 32, 8, 8))
    assert len(out.indices.unique()) > 100


@pytest.mark.parametrize(("scope", "groups"), [("image", 3), ("batch", 1), ("global", 1)])
def test_reg_vq_loss_is_the_weighted_kl_of_its_scope(scope: str, groups: int) -> None:
    quantizer = RegularizedQuantizer(N, D, prior_weight=0.5, prior_scope=scope, mask_ratio=0)
    out = quantizer(maps())
    indices = scores_of(quantizer.eval(), maps()).argmax(1).view(groups, -1)
    posterior = torch.stack([torch.bincount(group, minlength=N) / len(group) for group in indices])
    torch.testing.assert_close(out.loss, 0.5 * prior_kl(posterior, rows=60 // groups))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 1.5}, r"mask_ratio .*\b1\.5$"),
        ({"tau": 0.0}, r"tau .*\b0\.0$"),
        ({"perturbed": 0.0}, r"perturbed .*\b0\.0$"),
        ({"perturbed": 1.0}, r"perturbed .*\b1\.0$"),
        ({"perturbed": math.nan}, "perturbed .*nan$"),
        ({"prior_weight": -0.1}, r"prior_weight .*-0\.1$"),
        ({"prior_weight": math.nan}, "prior_weight .*nan$"),
        ({"logits": "dot"}, "logits .*'dot'$"),
        ({"mask_mode": "random"}, "mask_mode .*'random'$"),
        ({"prior_scope": "images"}, "prior_scope .*'images'$"),
        ({"codebook_grad": "firm"}, "codebook_grad .*'firm'$"),
    ],
)
def test_reg_vq_refuses_bad_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegularizedQuantizer(N, D, **arguments)


# ------------------------------------------------------------------------------------------------------ baselines


def test_vq_gan_gradient_is_the_identity_and_its_loss_the_textbook_one() -> None:
    quantizer = NearestQuantizer(N, D, commitment=0.25)
    z = maps().requires_grad_()
    out = quantizer(z)
    weight = torch.randn_like(out.quantized)
    (gradient,) = torch.autograd.grad((out.quantized * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)
    codes = quantizer.codes_of(out.indices).detach()
    loss_z, loss_codes = torch.autograd.grad(out.loss, (z, quantizer.embedding.weight))
    torch.testing.assert_close(loss_z, 0.25 * 2 * (z - codes).detach() / z.numel())
    expected = torch.zeros(N, D)
    difference = (codes - z.detach()).permute(0, 2, 3, 1).reshape(-1, D)
    expected.index_add_(0, out.indices.view(-1), 2 * difference / z.numel())
    torch.testing.assert_close(loss_codes, expected)


def test_vq_vae_codes_become_the_means_of_their_rows() -> None:
    quantizer = EMAQuantizer(2, 1, decay=0.0, dead_threshold=0.0)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    quantizer(torch.tensor([-3.0, -2.0, 4.0, 5.0]).view(1, 1, 2, 2), seed())
    torch.testing.assert_close(quantizer.embedding.weight.detach(), torch.tensor([[-2.5], [4.5]]))
    assert not quantizer.embedding.weight.requires_grad


def test_vq_vae_moves_dead_codes_to_encoder_outputs_and_leaves_live_ones() -> None:
    quantizer = EMAQuantizer(3, 1, decay=0.5, dead_threshold=0.1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [10.0], [1000.0]]))
        quantizer.start_from_embedding()
    z = torch.tensor([0.0, 1.0, 9.0, 10.0]).view(1, 1, 2, 2)
    codes = quantizer.embedding.weight.detach().view(-1)
    quantizer(z, seed())
    # Sums over shares: (0/3 + 1/4) / (1/3 + 2/4) and (10/3 + 19/4) / (1/3 + 2/4); nothing selects the third.
    torch.testing.assert_close(codes, torch.tensor([0.3, 9.7, 1000.0]))
    for step in range(5):
        quantizer(z, seed(step))
    assert codes.max() <= 10
    assert len(quantizer(z, seed()).indices.unique()) >= 2


def test_vq_vae_fresh_codebook_is_initialised_by_its_first_batch() -> None:
    quantizer = EMAQuantizer(N, D)
    z = 5 + maps()
    quantizer(z, seed())
    distance = torch.cdist(quantizer.embedding.weight.detach(), quantizer._to_rows(z)).min(1).values
    assert float((distance < 1e-5).float().mean()) > 0.6
    quantizer(z, seed(8))
    assert len(quantizer(z, seed(9)).indices.unique()) > 0.8 * N


def test_vq_vae_without_revival_leaves_codes_that_are_never_selected_where_they_are(monkeypatch) -> None:
    quantizer = EMAQuantizer(3, 1, dead_threshold=0)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [1.0], [1000.0]]))
        quantizer.start_from_embedding()
    monkeypatch.delattr("regvq_fast.quantizers.ema.row_words")  # nor are rows drawn for them
    fresh = EMAQuantizer(N, D, dead_threshold=0)
    before = fresh.embedding.weight.detach().clone()
    for step in range(3):
        quantizer(torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2), seed(step))
        selected = fresh(maps(), seed(step)).indices.unique()
    assert quantizer.embedding.weight[2].item() == pytest.approx(1000)
    unused = torch.ones(N, dtype=torch.bool).index_fill(0, selected, False)
    assert unused.any()
    assert float((fresh.embedding.weight.detach() - before)[unused].norm(dim=1).min()) < 1e-5


@pytest.mark.parametrize(("decay", "steps", "dead_threshold"), [(0.0, 2, 0.0), (0.8, 80, 0.0), (0.8, 80, 1e-30)])
def test_vq_vae_codes_stay_where_they_are_when_their_averages_have_faded(decay, steps, dead_threshold) -> None:
    quantizer = EMAQuantizer(2, 1, decay=decay, dead_threshold=dead_threshold)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [1000.0]]))
        quantizer.start_from_embedding()
    z = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    for step in range(steps):
        quantizer(z, seed(step))
    assert quantizer.embedding.weight.detach().view(-1).tolist() == pytest.approx([0.5, 1000], rel=1e-4)


def test_vq_vae_keeps_codes_that_were_loaded() -> None:
    codes = torch.randn(N, D)
    quantizer = EMAQuantizer(N, D, decay=0.99)
    quantizer.load_state_dict({"embedding.weight": codes}, strict=False)
    quantizer(maps(), seed())
    # A step of the average at most (at share 60 / 60 it would be a fifth of the way), not a replacement.
    assert float((quantizer.embedding.weight.detach() - codes).norm(dim=1).max()) < 1.0
    assert float((quantizer.embedding.weight.detach() - codes).norm(dim=1).median()) < 0.1


def test_vq_vae_averages_of_assigned_codes_have_their_type() -> None:
    quantizer = EMAQuantizer(N, D)
    quantizer.load_state_dict({"embedding.weight": torch.randn(N, D).double()}, strict=False, assign=True)
    assert {value.dtype for value in quantizer.state_dict().values()} == {torch.float64}


def test_vq_vae_takes_codes_for_loaded_only_where_they_were() -> None:
    pair = torch.nn.ModuleList([EMAQuantizer(N, D), EMAQuantizer(N, D)])
    trained = EMAQuantizer(N, D)
    trained(maps(), seed())
    state = {f"1.{name}": value for name, value in trained.state_dict().items()}
    pair.load_state_dict(state, strict=False)  # nothing of the first
    assert (pair[0].cluster_share == 0).all()
    pair.load_state_dict(state | {"0.embedding.weight": trained.embedding.weight}, strict=False)
    torch.testing.assert_close(pair[0].cluster_share, torch.full((N,), 1 / N))
    torch.testing.assert_close(pair[0].cluster_sum, trained.embedding.weight.detach() / N)
    for name, value in trained.state_dict().items():
        assert torch.equal(pair[1].state_dict()[name], value)


def test_gumbel_vq_anneals_its_temperature_without_recompiling() -> None:
    torch._dynamo.reset()
    quantizer = GumbelQuantizer(N, D, tau_start=1, tau_end=0.25)  # a whole number, as configurations write it
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    taus = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for fraction in (0.0, 0.5, 1.0):
            quantizer.set_progress(fraction)
            taus.append(float(compiled(maps(), seed()).metrics["tau"]))
    assert taus == pytest.approx([1.0, 0.5, 0.25])


def test_gumbel_vq_samples_every_position_as_torch_does_and_has_the_kl_of_its_softmax() -> None:
    quantizer = GumbelQuantizer(N, D, kl_weight=1.0)
    z = maps()
    out = quantizer(z, seed())
    assert out.mask.all()
    p = quantizer.proj(quantizer._to_rows(z)).softmax(1)
    expected = (p * (p * N).log()).sum(1).mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (NearestQuantizer, {"commitment": -1.0}, r"commitment .*-1\.0$"),
        (NearestQuantizer, {"commitment": math.nan}, "commitment .*nan$"),
        (EMAQuantizer, {"decay": 1.0}, r"decay .*\b1\.0$"),
        (EMAQuantizer, {"dead_threshold": -0.5}, r"dead_threshold .*-0\.5$"),
        (EMAQuantizer, {"dead_threshold": math.nan}, r"dead_threshold .*nan$"),
        (EMAQuantizer, {"commitment": math.nan}, r"commitment .*nan$"),
        (GumbelQuantizer, {"tau_end": 0.0}, r"tau_start .*tau_end .*1\.0 and 0\.0$"),
        (GumbelQuantizer, {"kl_weight": -1.0}, r"kl_weight .*-1\.0$"),
        (GumbelQuantizer, {"kl_weight": math.nan}, "kl_weight .*nan$"),
        (SimVQQuantizer, {"commitment": -1.0}, r"commitment .*-1\.0$"),
        (IBQQuantizer, {"codebook_weight": -1.0}, r"codebook_weight .*-1\.0$"),
        (IBQQuantizer, {"entropy_weight": math.nan}, "entropy_weight .*nan$"),
        (IBQQuantizer, {"entropy_temperature": 0.0}, r"entropy_temperature .*\b0\.0$"),
    ],
)
def test_baselines_refuse_bad_settings(build: type[Quantizer], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(N, D, **arguments)


@pytest.mark.parametrize("build", [NearestQuantizer, EMAQuantizer, GumbelQuantizer, RegularizedQuantizer])
def test_an_empty_codebook_is_refused(build: type[Quantizer]) -> None:
    with pytest.raises(ValueError, match=r"num_codes .*code_dim .*0 and 8$"):
        build(0, 8)
