"""Sampling from the diffusion prior: memorized images, the distribution of samples, and refused settings."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from regvq_fast.priors.diffusion import sampler
from regvq_fast.priors.diffusion.loss import diffusion_terms
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.sampler import sample_diffusion, timesteps
from regvq_fast.priors.diffusion.text import WordEncoder
from regvq_fast.priors.diffusion.timesteps import TimestepSampler

CAPTIONS = [
    f"{colour} {thing} {place}" for colour in ("red", "blue") for thing in ("cat", "dog") for place in ("left", "right")
]
CODES, SIDE = 8, 3


def make_prior(**arguments: Any) -> VQDiffusion:
    torch.manual_seed(0)
    encoder = WordEncoder(width=16, depth=1, heads=2, max_words=4, buckets=64)
    sizes = {"token_shape": (SIDE, SIDE), "num_steps": 10, "width": 32, "depth": 2, "heads": 2}
    return VQDiffusion(CODES, **{"text_encoder": encoder, **sizes, **arguments})


@pytest.fixture(scope="module")
def learned() -> tuple[VQDiffusion, Tensor]:
    """A prior that knows eight captioned grids by heart, and these, (8, h, w)."""
    prior = make_prior()
    tokens = torch.randint(CODES, (8, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    clean = tokens.flatten(1).repeat(4, 1)
    ids = prior.tokenize_text(CAPTIONS).repeat(4, 1, 1)
    steps = TimestepSampler(prior.num_steps)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    for seed in torch.arange(300):
        t, probability = steps.sample(seed, 32)
        noisy = prior.transition.corrupt(clean, t, seed)
        logits = prior(noisy, t, ids, prior.keep_text(32, 0.3, seed=seed))
        terms = diffusion_terms(prior.transition, logits, clean, noisy, t)
        optimizer.zero_grad()
        terms.loss(t, probability, prior.num_steps, auxiliary_weight=0.5).backward()
        optimizer.step()
        schedule.step()
        steps.update(t, terms.bound)
    assert steps.probabilities().std() > 0  # the last ones were sampled by importance
    return prior, tokens


@pytest.mark.parametrize(
    "settings", [{}, {"steps": 3}, {"steps": 1}, {"truncation": 1.0, "temperature": 0.0}, {"guidance": 1.5}]
)
def test_captions_bring_back_what_was_learned(learned: tuple[VQDiffusion, Tensor], settings: dict) -> None:
    prior, tokens = learned
    drawn = sample_diffusion(prior, CAPTIONS, seed=1, **settings)
    assert (drawn == tokens).float().mean() > 0.97


def test_kept_tokens_stay_and_the_rest_is_drawn_around_them(learned: tuple[VQDiffusion, Tensor]) -> None:
    prior, tokens = learned
    mask = torch.zeros(8, SIDE, SIDE, dtype=torch.bool)
    mask[:, 0] = True
    given = torch.where(mask, (tokens + 1) % CODES, 0)
    drawn = sample_diffusion(prior, CAPTIONS, seed=1, keep=(given, mask))
    assert torch.equal(drawn[mask], given[mask])
    assert (drawn < CODES).all()
    # Without a caption the rest can only follow from what is kept.
    kept = (tokens.flatten(1), torch.ones(8, SIDE * SIDE, dtype=torch.bool).index_fill_(1, torch.tensor([4]), False))
    drawn = sample_diffusion(prior, num_images=8, seed=1, keep=kept)
    assert (drawn == tokens).float().mean() > 0.97


def test_images_depend_on_seed_and_number_alone() -> None:
    prior = make_prior().double()  # so that the batch's rounding doesn't decide
    settings = {"truncation": 0.9, "guidance": 2.0, "steps": 4}
    whole = sample_diffusion(prior, CAPTIONS, seed=3, **settings)
    parts = [
        sample_diffusion(prior, CAPTIONS[part], seed=3, first_image=part.start, **settings)
        for part in (slice(0, 3), slice(3, 8))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sample_diffusion(prior, CAPTIONS, seed=torch.tensor(3), **settings), whole)
    assert not torch.equal(sample_diffusion(prior, CAPTIONS, seed=4, **settings), whole)
    # Ids and features are the captions in other words.
    ids = prior.tokenize_text(CAPTIONS)
    features, mask = prior.text_encoder(ids)  # type: ignore[misc]
    assert torch.equal(sample_diffusion(prior, ids, seed=3, **settings), whole)
    assert torch.equal(sample_diffusion(prior, features, text_mask=mask, seed=3, **settings), whole)


class Fixed(VQDiffusion):
    """Gives the same p(x_0) everywhere, whatever it sees."""

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        return probabilities.expand(*tokens.shape, 4)


def shares(steps: int | None = None, **settings: Any) -> list[float]:
    prior = Fixed(4, token_shape=(32, 32), text_shape=(1, 4), num_steps=10, width=4, depth=1, heads=1)
    drawn = sample_diffusion(prior, torch.zeros(4, 1, 4), seed=0, steps=steps, **settings)
    return (drawn.flatten().bincount(minlength=4) / drawn.numel()).tolist()


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler calls the function of VQDiffusion itself, which it may have compiled, not that of a subclass."""
    monkeypatch.setattr(sampler.VQDiffusion, "forward", Fixed.forward)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("steps", [None, 3, 1])
def test_draws_have_the_networks_probabilities_however_many_steps(steps: int | None) -> None:
    """4096 samples: a frequency's standard deviation is below 0.008."""
    assert shares(steps, truncation=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    total = 0.95  # the codes that 0.86 takes
    assert shares(steps, truncation=0.86) == pytest.approx([0.5 / total, 0.3 / total, 0.15 / total, 0], abs=0.03)
    assert shares(steps, truncation=0.4) == pytest.approx([1, 0, 0, 0], abs=2e-3)  # less what the chain replaces
    assert shares(steps, truncation=1.0, temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)


def test_guidance_multiplies_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: VQDiffusion, tokens: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert len(tokens) == len(t) == len(condition) == 8
        conditional, null = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25] * 4]).log()
        is_null = (condition == self.null_text).all(-1)[..., None]
        return torch.where(is_null, null, conditional).expand(*tokens.shape, 4)

    monkeypatch.setattr(sampler.VQDiffusion, "forward", forward)
    squares = torch.tensor([0.5, 0.3, 0.15, 0.05]).square()
    assert shares(truncation=1.0, guidance=2.0) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
    assert shares(truncation=1.0, guidance=0.0) == pytest.approx([0.25] * 4, abs=0.03)


def test_states_and_progress_tell_every_step() -> None:
    prior = make_prior().train()
    states: list[Tensor] = []
    told: list[tuple[int, int]] = []
    drawn = sample_diffusion(
        prior, CAPTIONS, seed=0, steps=5, states=states, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(step, 5) for step in range(1, 6)]
    assert torch.equal(states[-1], drawn)
    masked = [int((state == CODES).sum()) for state in states]
    assert masked == sorted(masked, reverse=True)
    assert masked[0] > masked[2] > masked[-1] == 0
    assert len({state.data_ptr() for state in states}) == 5
    assert prior.training


def test_compiled_network_draws_the_same_images() -> None:
    prior = make_prior(depth=1)
    settings: dict[str, Any] = {"seed": 0, "steps": 2}
    eager = sample_diffusion(prior, CAPTIONS, **settings)
    assert torch.equal(sample_diffusion(prior, CAPTIONS, compile=True, **settings), eager)


def test_steps_are_spread_evenly_and_end_at_both_ends() -> None:
    assert timesteps(100, 4) == [100, 75, 50, 25, 0]
    assert timesteps(10, 10) == list(range(10, -1, -1))
    for steps in range(1, 101):
        spread = timesteps(100, steps)
        assert spread[0] == 100
        assert spread[-1] == 0
        assert len(set(spread)) == steps + 1


def test_settings_that_make_no_sense_are_refused() -> None:
    prior, without = make_prior(), make_prior(null_condition=False, text_encoder=None, text_shape=(2, 4))
    keep = (torch.zeros(8, 9, dtype=torch.int64), torch.zeros(8, 9, dtype=torch.bool))
    for settings, message in [
        ({"steps": 11}, r"steps .*\b10\b.*\b11$"),
        ({"steps": 0}, r"steps .*\b10\b.*\b0$"),
        ({"truncation": 0.0}, r"truncation .*\b0\.0"),
        ({"temperature": -1.0}, r"temperature .*-1\.0"),
        ({"guidance": float("nan")}, "guidance .*nan"),
        ({"num_images": 3}, r"num_images .*\b3 .*\b8 texts"),
        ({"text": None}, "num_images .*required"),
        ({"text": None, "num_images": 0}, r"image.*\b0$"),
        ({"text": None, "num_images": 1, "guidance": 2.0}, r"guidance 2\.0 .*text"),
        ({"text": [""]}, r"caption 0\b"),
        ({"text": ["a b c d e"]}, r"\b5 words.*\b4\b"),
        ({"text": torch.zeros(1, 2, 3)}, r"text .*\(1, 4, 16\).*\(1, 2, 3\)"),
        ({"keep": (keep[0][:1], keep[1])}, "tokens to keep"),
        ({"prior": without, "text": torch.zeros(1, 2, 4), "guidance": 2.0}, r"guidance 2\.0 .*null condition"),
        ({"prior": without, "text": ["a cat"]}, "text_encoder"),
    ]:
        arguments = {"prior": prior, "text": CAPTIONS, "seed": 0, **settings}
        with pytest.raises(ValueError, match=message):
            sample_diffusion(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mask .*bool"):
        sample_diffusion(prior, CAPTIONS, seed=0, keep=(keep[0], keep[0]))


def test_default_truncation_is_vq_diffusions() -> None:
    assert inspect.signature(sample_diffusion).parameters["truncation"].default == 0.86
