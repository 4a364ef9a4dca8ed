"""Sampling from the masked prior: what it learned by heart, the law of its samples, counts, editing, refusals."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regvq_fast.priors.maskgit import MaskGIT, sample_maskgit, sampler
from regvq_fast.priors.maskgit.sampler import masked_counts

SEED = 5
CODES, CLASSES = 12, 5


def make_prior(num_codes: int = CODES, **options: Any) -> MaskGIT:
    """Build a prior in fp64, so that rounding doesn't matter, whose tokens depend on all others."""
    arguments = {"token_shape": (3, 4), "width": 16, "depth": 2, "heads": 2}
    prior = MaskGIT(num_codes, CLASSES, **(arguments | options)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if not name.endswith("bias") and ".ln" not in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior


@pytest.fixture(scope="module")
def prior() -> MaskGIT:
    return make_prior()


@pytest.fixture
def condition() -> Tensor:
    return torch.randint(CLASSES, (5, 3, 4), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def learned() -> tuple[MaskGIT, Tensor, Tensor]:
    """A prior that knows four images by heart, these, and their conditions."""
    torch.manual_seed(0)
    prior = MaskGIT(CODES, 4, token_shape=(3, 4), label_names="abcd", width=32, depth=2, heads=2)
    tokens = torch.randint(CODES, (4, 3, 4), generator=torch.Generator().manual_seed(0))
    condition = torch.arange(4)[:, None]
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    for seed in torch.arange(300):
        counts = prior.training_counts(32, seed=seed, first_image=0)
        masked = prior.mask(counts, seed=seed, first_image=0)
        ids = prior.drop_condition(condition.repeat(8, 1), 0.4, seed=seed, first_image=0)
        optimizer.zero_grad()
        prior.loss(tokens.repeat(8, 1, 1), ids, masked).mean().backward()
        optimizer.step()
        schedule.step()
    return prior, tokens, condition


@pytest.mark.parametrize("settings", [{}, {"steps": 3}, {"steps": 1}, {"steps": 12}, {"guidance": 1.5}])
def test_conditions_bring_back_what_was_learned(learned, settings):
    prior, tokens, condition = learned
    assert torch.equal(sample_maskgit(prior, condition, seed=1, temperature=0.0, **settings), tokens)
    assert (sample_maskgit(prior, condition, seed=1, **settings) == tokens).double().mean() > 0.95


def test_kept_tokens_stay_and_the_rest_is_sampled_around_them(learned):
    prior, tokens, _ = learned
    mask = torch.zeros(4, 3, 4, dtype=torch.bool)
    mask[:, 0] = True
    states: list[Tensor] = []
    null = torch.full((4, 1), 4)
    found = sample_maskgit(prior, null, seed=1, temperature=0.0, keep=(tokens, mask), states=states)
    assert torch.equal(found, tokens)  # without a condition the rest can only follow from what is kept
    given = torch.where(mask, (tokens + 1) % CODES, 0)
    states.clear()
    found = sample_maskgit(prior, null, seed=1, keep=(given.flatten(1), mask.flatten(1)), states=states)
    assert (found < CODES).all()
    assert all(torch.equal(state[mask], given[mask]) for state in states)
    everything = torch.ones_like(mask)
    assert torch.equal(sample_maskgit(prior, null, seed=1, keep=(given, everything)), given)


# --- the law of samples ----------------------------------------------------------------------------------------------


def chi_square(found: Tensor, expected: Tensor) -> float:
    assert float(expected.sum()) == pytest.approx(float(found.sum()))
    assert float(expected.min()) > 5
    return float(((found - expected) ** 2 / expected).sum())


def test_one_random_position_at_a_time_is_the_mean_of_all_chain_rules():
    """As many steps as tokens, and noise that drowns the confidences."""
    images, prior = 6000, make_prior(num_codes=2, token_shape=(1, 3), label_names="abcde", width=8, depth=1)
    condition = torch.full((images, 1), 2)
    tokens = sample_maskgit(prior, condition, seed=SEED, steps=3, choice_temperature=1e9).flatten(1)
    grids = torch.cartesian_prod(*[torch.arange(2)] * 3)
    total = torch.zeros(8, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        seen, log_p = torch.full((8, 3), 2), torch.zeros(8, dtype=torch.float64)
        for position in order:
            at = prior(seen, condition[:8])[:, position].log_softmax(-1)
            log_p += at.gather(1, grids[:, position, None])[:, 0].detach()
            seen[:, position] = grids[:, position]
        total += log_p.exp() / 6
    found = (tokens @ torch.tensor([4, 2, 1])).bincount(minlength=8)
    assert chi_square(found, images * total) < 29.9  # 7 degrees of freedom: 99.99 %


@pytest.mark.parametrize(("choice_temperature", "temperature"), [(4.5, 1.0), (0.7, 1.0), (0.0, 1.0), (4.5, 1.5)])
def test_confidences_choose_the_first_token(choice_temperature, temperature):
    """With two tokens and two steps: of two Gumbel variables the larger is a logistic function of the difference."""
    images, prior = 6000, make_prior(num_codes=3, token_shape=(1, 2), label_names="abcde", width=8, depth=1)
    with torch.no_grad():
        prior.tok_emb.weight[:3] *= 0.3  # no pair is rare
    condition = torch.full((images, 1), 2)
    settings = {"choice_temperature": choice_temperature, "temperature": temperature}
    tokens = sample_maskgit(prior, condition, seed=SEED, steps=2, **settings).flatten(1)

    def probabilities(seen: list[int], position: int, scale: float) -> Tensor:
        return (prior(torch.tensor([seen]), condition[:1])[0, position].detach() / scale).softmax(-1)

    sampled = [probabilities([3, 3], position, temperature) for position in range(2)]
    confidence = [probabilities([3, 3], position, 1.0).log() for position in range(2)]
    difference = confidence[0][:, None] - confidence[1][None]  # (first code, second code)
    scale = choice_temperature / 2  # halfway to 0
    first = (difference / scale).sigmoid() if scale else (difference >= 0).double()
    joint = sampled[0][:, None] * sampled[1][None]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        expected[a] += (joint * first)[a].sum() * probabilities([a, 3], 1, temperature)
        expected[:, a] += (joint * (1 - first))[:, a].sum() * probabilities([3, a], 0, temperature)
    found = (tokens[:, 0] * 3 + tokens[:, 1]).bincount(minlength=9)
    assert chi_square(found, images * expected.flatten()) < 31.8  # 8 degrees of freedom: 99.99 %


def test_one_step_samples_every_token_by_itself(prior):
    images = 2000
    condition = torch.full((images, 12), 2)
    tokens = sample_maskgit(prior, condition, seed=SEED, steps=1).flatten(1)
    p = prior(torch.full((1, 12), CODES), condition[:1])[0].softmax(-1).detach()
    found = torch.stack([tokens[:, position].bincount(minlength=CODES) for position in range(12)])
    error = (found - images * p) / (images * p * (1 - p)).sqrt().clamp(min=1.0)
    assert error.abs().max() < 5


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_guidance_weighs_the_null_condition(prior, condition, guidance, monkeypatch):
    guided = sample_maskgit(prior, condition, seed=SEED, guidance=guidance)
    forward = MaskGIT.forward

    def combined(self: MaskGIT, tokens: Tensor, ids: Tensor) -> Tensor:
        null = forward(self, tokens, torch.full_like(ids, CLASSES))
        return null + guidance * (forward(self, tokens, ids) - null)

    plain = sample_maskgit(prior, condition, seed=SEED)
    monkeypatch.setattr(sampler.MaskGIT, "forward", combined)
    assert torch.equal(sample_maskgit(prior, condition, seed=SEED), guided)
    assert not torch.equal(plain, guided)


# --- counts, batches, modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 11, 12, 40, 256])
def test_counts_follow_the_cosine_and_fall_in_every_step(steps):
    unknown = torch.arange(257)
    counts = masked_counts(unknown, steps)
    assert torch.equal(counts[:, 0], unknown)
    assert (counts[:, -1] == 0).all()
    for known, row in zip(unknown.tolist(), counts.tolist(), strict=True):
        for s, (before, after) in enumerate(itertools.pairwise(row), 1):
            cosine = math.floor(known * math.cos(math.pi / 2 * s / steps)) if s < steps else 0
            assert after == max(0, min(cosine, before - 1))
        if known >= steps:
            assert row[-2] > 0  # no step is left without tokens


def test_states_and_progress_count_every_step(prior, condition):
    states: list[Tensor] = []
    seen: list[tuple[int, int]] = []
    tokens = sample_maskgit(
        prior, condition, seed=SEED, steps=5, states=states, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(step, 5) for step in range(1, 6)]
    assert torch.equal(states[-1], tokens)
    expected = masked_counts(torch.tensor([12]), 5)[0, 1:].tolist()
    for image in range(5):
        assert [int((state[image] == CODES).sum()) for state in states] == expected
    for before, after in itertools.pairwise(states):
        assert torch.equal(after[before < CODES], before[before < CODES])  # what is there stays
    assert len({state.data_ptr() for state in states}) == 5


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0, "steps": 4, "choice_temperature": 1.0}])
def test_an_image_does_not_depend_on_its_batch(prior, condition, settings):
    whole = sample_maskgit(prior, condition, seed=SEED, first_image=7, **settings)
    parts = [
        sample_maskgit(prior, condition[:2].flatten(1), seed=SEED, first_image=7, **settings),
        sample_maskgit(prior, condition[2:], seed=torch.tensor(SEED), first_image=torch.tensor(9), **settings),
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_maskgit(prior, condition, seed=SEED + 1, first_image=7, **settings))
    assert not torch.equal(whole, sample_maskgit(prior, condition, seed=SEED, first_image=8, **settings))


def test_it_evaluates_and_leaves_the_mode_alone(prior, condition):
    other = make_prior(dropout=0.5).train()
    other.blocks[0].eval()
    modes = [module.training for module in other.modules()]
    tokens = sample_maskgit(other, condition, seed=SEED)
    assert [module.training for module in other.modules()] == modes
    assert torch.equal(tokens, sample_maskgit(prior, condition, seed=SEED))


def test_compiled_it_samples_the_same(condition):
    prior = make_prior(depth=1)
    expected = sample_maskgit(prior, condition, seed=SEED, steps=3)
    assert torch.equal(sample_maskgit(prior, condition, seed=SEED, steps=3, compile=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_samples_the_same_without_waiting(prior, condition, compiled):
    settings: dict[str, Any] = {"guidance": 1.5, "steps": 6}
    expected = sample_maskgit(prior, condition, seed=SEED, **settings)
    there, condition = make_prior().cuda(), condition.cuda()
    settings |= {"seed": torch.tensor(SEED, device="cuda"), "compile": compiled}
    sample_maskgit(there, condition, **settings)

    def forbid_waiting(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("error")

    try:
        tokens = sample_maskgit(there, condition, progress=forbid_waiting, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), expected)


def test_settings_that_make_no_sense_are_refused(prior, condition):
    kept = torch.ones(5, 12, dtype=torch.bool)
    settings: list[tuple[dict[str, Any], str]] = [
        ({"steps": 13}, r"steps .*\b12 tokens.*\b13$"),
        ({"steps": 0}, r"steps .*\b0$"),
        ({"choice_temperature": -1.0}, r"choice_temperature .*-1\.0$"),
        ({"choice_temperature": math.inf}, "choice_temperature .*inf$"),
        ({"temperature": -1.0}, r"temperature .*-1\.0"),
        ({"guidance": math.nan}, "guidance .*nan"),
        ({"keep": (torch.full((5, 12), CODES), kept)}, r"keep .*\[0, 12\)"),
        ({"condition": condition[:0]}, r"condition.*\(0, 3, 4\)"),
        ({"condition": condition.to("meta")}, "condition .*meta .*cpu"),
    ]
    for changed, message in settings:
        with pytest.raises(ValueError, match=message):
            sample_maskgit(**{"prior": prior, "condition": condition, "seed": SEED, **changed})
