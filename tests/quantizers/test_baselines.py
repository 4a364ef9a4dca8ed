"""The baselines vq-gan, vq-vae and gumbel-vq: gradients, moving averages, temperature and settings."""

import math

import pytest
import torch
from helpers.quantizer_cases import D, N, maps, seed

from regvq_fast.quantizers import (
    EMAQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    NearestQuantizer,
    Quantizer,
    RegularizedQuantizer,
    SimVQQuantizer,
)


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
    monkeypatch.delattr("regvq_fast.quantizers.ema.row_words")  # no rows are sampled for them either
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
