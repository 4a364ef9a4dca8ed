"""Choosing tokens: frequencies, restriction, ties, counters, guidance, refusals; compiled and captured steps."""

import math
import subprocess
import sys

import pytest
import torch

from regvq_fast.priors.choosing import check_guidance, choose_tokens, guide, restrict
from regvq_fast.priors.sampler import capture, compiled

SEED = torch.tensor(11)
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.1])
DRAWS = 20_000


def frequencies(logits, **settings):
    rows = torch.arange(DRAWS)
    return choose_tokens(logits.expand(DRAWS, -1), rows, SEED, **settings).bincount(minlength=len(logits))


def chi_square(counts, probabilities):
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * DRAWS
    return float(((counts[possible] - expected) ** 2 / expected).sum())


# By hand: the order of LOGITS is 1, 3, 0, 4, 2 with probabilities 0.546, 0.245, 0.100, 0.082, 0.027, so that 0.6 needs
# two codes. After top_k=3, which makes them 0.613, 0.275, 0.112, it needs but one.
@pytest.mark.parametrize(
    ("settings", "likely"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.6}, [1]),
        ({"top_k": 3, "top_p": 0.7, "temperature": 0.7}, [1]),
        ({"top_k": 4, "temperature": 3.0}, [0, 1, 3, 4]),
    ],
)
def test_frequencies_are_the_restricted_softmax(settings, likely):
    scaled = LOGITS.double() / settings.get("temperature", 1.0)
    expected = torch.full_like(scaled, -math.inf)
    expected[likely] = scaled[likely]
    counts = frequencies(LOGITS, **settings)
    # Four degrees of freedom or fewer: 99.99 % of draws stay below.
    assert chi_square(counts, expected.softmax(0)) < 23.5


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-12}, {"temperature": 1e-6}])
def test_the_limits_are_greedy(settings):
    assert frequencies(LOGITS, **settings)[1] == DRAWS


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-12}])
def test_the_smallest_of_equals_wins(settings):
    assert frequencies(torch.tensor([0.0, 3.0, 3.0, -1.0, 3.0]), **settings)[1] == DRAWS


def test_exactly_k_of_equals_stay():
    kept = restrict(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]]), top_k=2).isfinite()
    assert kept.tolist() == [[True, True, False, False], [True, True, False, False]]


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.7501, 4)])
def test_top_p_takes_the_fewest_that_suffice(top_p, count):
    assert int(restrict(torch.zeros(4), top_p=top_p).isfinite().sum()) == count


def test_codes_that_are_impossible_stay_so():
    logits = LOGITS.clone()
    logits[1] = -math.inf
    counts = frequencies(logits, top_p=0.999)
    assert counts[1] == 0
    assert chi_square(counts, logits.double().softmax(0)) < 23.5


def test_a_draw_depends_on_seed_and_row_alone():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(6) + 2**33
    whole = choose_tokens(logits, rows, SEED, top_p=0.9)
    parts = [choose_tokens(logits[i : i + 2], rows[i : i + 2], SEED, top_p=0.9) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    shaped = choose_tokens(logits.view(2, 3, 40), rows.view(2, 3), SEED, top_p=0.9)
    assert torch.equal(whole, shaped.flatten())
    same_row = choose_tokens(LOGITS.expand(50, -1), rows[:1].expand(50), SEED)
    assert same_row.unique().numel() == 1
    other_seed = choose_tokens(logits, rows, SEED + 1, top_p=0.9)
    assert not torch.equal(whole, other_seed)


def test_half_precision_is_computed_with_in_fp32():
    logits = LOGITS.bfloat16()
    settings = {"temperature": 0.7, "top_p": 0.95}
    assert torch.equal(frequencies(logits, **settings), frequencies(logits.float(), **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, r"temperature .*-0\.5"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"temperature": math.inf}, "temperature .* got inf"),
        ({"top_k": 0}, r"top_k .*\b0$"),
        ({"top_p": 0.0}, r"top_p .*\b0\.0$"),
        ({"top_p": 1.5}, r"top_p .*\b1\.5$"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        frequencies(LOGITS, **settings)
    if "temperature" not in settings:
        with pytest.raises(ValueError, match=message):
            restrict(LOGITS, **settings)


def test_guidance_weighs_two_distributions():
    logits = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # 2 conditional, 2 null
    assert guide(logits, 2.0).tolist() == [[0.0, 0.0, 5.0], [0.0, 4.0, 1.0]]  # by hand
    conditional, null = logits.softmax(-1).chunk(2)
    product = conditional**1.5 * null**-0.5
    torch.testing.assert_close(guide(logits, 1.5).softmax(-1), product / product.sum(-1, keepdim=True))
    assert guide(logits.bfloat16(), 0.0).dtype == torch.float32


@pytest.mark.parametrize("guidance", [-0.5, math.inf, math.nan])
def test_guidance_that_is_no_weight_is_refused(guidance):
    with pytest.raises(ValueError, match=rf"guidance .*{guidance}"):
        check_guidance(guidance)


def test_importing_the_samplers_compiles_nothing() -> None:
    samplers = "regvq_fast.priors.autoregressive.sampler, regvq_fast.priors.diffusion.sampler"
    code = f"import torch; torch.compile = None; import {samplers}"  # None: a call fails
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_is_wrapped_once() -> None:
    assert compiled(torch.relu) is compiled(torch.relu)
    assert compiled(torch.relu) is not compiled(torch.tanh)


@pytest.mark.gpu
def test_a_captured_step_starts_from_what_was_there() -> None:
    index, total = torch.tensor(2, device="cuda"), torch.tensor(10, device="cuda")
    seen = torch.zeros(8, dtype=torch.int64, device="cuda")

    def step() -> None:
        total.add_(index)
        seen.index_copy_(0, index.view(1), total.view(1))
        index.add_(1)

    advance = capture(step, index, total)
    assert (index.item(), total.item()) == (2, 10)
    for _ in range(3):
        advance()
    assert (index.item(), total.item()) == (5, 10 + 2 + 3 + 4)
    assert seen.tolist() == [0, 0, 12, 15, 19, 0, 0, 0]
