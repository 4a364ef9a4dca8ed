"""Reg-VQ: the noise of a new quantizer, the control of the logit scale, initialization, loss and settings."""

import copy
import math

import pytest
import torch
from helpers.quantizer_cases import D, N, maps, seed
from torch import Tensor

from regvq_fast.losses.prior import prior_kl
from regvq_fast.padding import Padding
from regvq_fast.quantizers import RegularizedQuantizer


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
