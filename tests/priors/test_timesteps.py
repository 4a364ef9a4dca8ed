"""Importance sampling of training steps: its probabilities, its draws, and that it leaves the loss unbiased."""

import pytest
import torch
from torch import Tensor

from regvq_fast.priors.diffusion import timesteps
from regvq_fast.priors.diffusion.timesteps import TimestepSampler

SEED = torch.tensor(5)


def warm_sampler(num_steps: int = 6) -> tuple[TimestepSampler, Tensor]:
    """A sampler that has seen each step 200 times, with these terms."""
    sampler = TimestepSampler(num_steps)
    terms = torch.arange(1.0, num_steps + 1) ** 2
    for _ in range(200):
        sampler.update(torch.arange(1, num_steps + 1), terms)
    return sampler, terms


def test_steps_are_equally_probable_until_each_was_drawn_ten_times() -> None:
    sampler = TimestepSampler(4)
    for _ in range(10):
        assert sampler.probabilities().tolist() == [0.25] * 4
        sampler.update(torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 1.0, 2.0, 4.0]))
    expected = torch.tensor([1.0, 1.0, 2.0, 4.0]) / 8 * 0.999 + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities(), expected)  # without a bias from the history's beginning


def test_probabilities_are_those_of_the_terms_and_the_first_step_takes_the_seconds() -> None:
    sampler, terms = warm_sampler()
    weights = torch.cat([terms[1:2], terms[1:]])
    torch.testing.assert_close(sampler.probabilities(), 0.999 * weights / weights.sum() + 0.001 / 6)


def test_weighted_loss_is_unbiased_by_enumeration() -> None:
    """Over all words that a draw can be made of (one in 2^16 of them), loss / probability sums to the sum of terms."""
    sampler, terms = warm_sampler()
    words = torch.arange(2**15, 2**32, 2**16)
    draw_words = lambda seed, images, stream: words  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timesteps, "row_words", draw_words)
        patch.setattr(timesteps, "_GOLDEN", 0)
        t, probability = sampler.sample(SEED, len(words))
    estimate = (terms[t - 1].double() / probability.double()).mean().item()
    assert estimate == pytest.approx(terms.sum().item(), rel=1e-3)
    assert set(t.tolist()) == set(range(1, 7))


def test_drawn_steps_have_the_probabilities_and_depend_on_the_image_alone() -> None:
    sampler, _ = warm_sampler()
    t, probability = sampler.sample(SEED, 4000)
    torch.testing.assert_close(probability, sampler.probabilities()[t - 1])
    shares = (t - 1).bincount(minlength=6) / 4000
    torch.testing.assert_close(shares, sampler.probabilities(), rtol=0, atol=0.03)  # four standard deviations
    torch.testing.assert_close(sampler.sample(SEED, 1000, first_image=3000)[0], t[3000:])


def test_a_batch_has_steps_from_all_over_the_range() -> None:
    sampler = TimestepSampler(100)
    batches = torch.stack([sampler.sample(torch.tensor(seed), 16)[0] for seed in range(50)])
    assert batches.sort().values.diff().max() <= 11  # of evenly spaced ones: 6 or 7
    assert batches.double().mean(1).std() < 4  # of independent ones: 7.2
    first = torch.cat([sampler.sample(torch.tensor(seed), 1)[0] for seed in range(4000)])
    assert first.bincount(minlength=101)[1:].min() > 15  # of 40 on average


def test_history_takes_all_ranks_terms_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, ranks = TimestepSampler(3), TimestepSampler(3)
    t, terms = torch.tensor([1, 1, 3]), torch.tensor([1.0, 3.0, 2.0])
    alone.update(t.repeat(2), terms.repeat(2))
    monkeypatch.setattr(timesteps, "sum_over_ranks", lambda value: 2 * value)  # two ranks of equal terms
    ranks.update(t, terms)
    torch.testing.assert_close(ranks.history, alone.history)
    assert ranks.count.tolist() == alone.count.tolist() == [4, 0, 2]
    # A step sampled four times moves by 1 - 0.9^4 towards the mean square of its terms, one that wasn't stays.
    torch.testing.assert_close(alone.history, torch.tensor([(1 - 0.9**4) * 5, 0, (1 - 0.9**2) * 4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay"),
        ({"uniform": 0.0}, "uniform"),
        ({"warm_up": -5}, "warm_up .*-5"),
    ],
)
def test_impossible_samplers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepSampler(4, **arguments)
    with pytest.raises(ValueError, match=r"num_steps .*\b1$"):
        TimestepSampler(1)
