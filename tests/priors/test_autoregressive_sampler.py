"""Sampling from the autoregressive prior: what the chain rule says, in every batch, guided, edited, compiled."""

import math
from typing import get_args

import pytest
import torch

from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.priors.autoregressive.model import Arch
from regvq_fast.priors.choosing import choose_tokens

SEED = 5
CODES, CLASSES = 12, 5


def make_prior(num_codes=CODES, **options):
    """Weights so large that tokens depend on all before them, in fp64 that rounding does not matter."""
    arguments = {"token_shape": (3, 4), "condition_shape": (1, 4), "width": 16, "depth": 2, "heads": 2}
    prior = TokenTransformer(num_codes, CLASSES, **(arguments | options)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if not name.endswith("bias") and ".ln" not in name:  # of which some codes would always be the likeliest
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior


@pytest.fixture(scope="module", params=get_args(Arch))
def prior(request):
    return make_prior(arch=request.param)


@pytest.fixture
def condition():
    return torch.randint(CLASSES, (5, 1, 4), generator=torch.Generator().manual_seed(2))


def rows(images, length=12, first_image=0):
    return (torch.arange(images) + first_image)[:, None] * length + torch.arange(length)


def choose(logits, **settings):
    return choose_tokens(logits, rows(len(logits)), torch.tensor(SEED), **settings).view(-1, 3, 4)


# Tokens are right where the logits that the whole network gives of them, all at once, choose the same tokens.
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 5, "top_p": 0.8}])
def test_it_draws_from_the_whole_networks_logits(prior, condition, settings):
    tokens = sample_autoregressive(prior, condition, seed=SEED, **settings)
    assert (tokens.shape, tokens.dtype) == ((5, 3, 4), torch.int64)
    assert tokens.unique().numel() > 4
    assert torch.equal(tokens, choose(prior(tokens, condition), **settings))


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_guidance_weighs_the_null_condition(prior, condition, guidance):
    tokens = sample_autoregressive(prior, condition, seed=SEED, guidance=guidance)
    null = prior(tokens, torch.full_like(condition, CLASSES))
    logits = null + guidance * (prior(tokens, condition) - null)
    assert torch.equal(tokens, choose(logits))
    assert not torch.equal(tokens, sample_autoregressive(prior, condition, seed=SEED))


def test_kept_tokens_stay_and_the_others_follow_them(prior, condition):
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(CODES, (5, 3, 4), generator=generator)
    mask = torch.rand(5, 3, 4, generator=generator) < 0.5
    tokens = sample_autoregressive(prior, condition, seed=SEED, keep=(given, mask))
    assert torch.equal(tokens, torch.where(mask, given, choose(prior(tokens, condition))))
    flat = sample_autoregressive(prior, condition, seed=SEED, keep=(given.flatten(1), mask.flatten(1)))
    assert torch.equal(tokens, flat)
    everything = torch.ones_like(mask)
    assert torch.equal(sample_autoregressive(prior, condition, seed=SEED, keep=(given, everything)), given)


def test_an_image_does_not_depend_on_its_batch(prior, condition):
    whole = sample_autoregressive(prior, condition, seed=SEED, first_image=7)
    parts = [
        sample_autoregressive(prior, condition[:2].flatten(1), seed=SEED, first_image=7),
        sample_autoregressive(prior, condition[2:], seed=torch.tensor(SEED), first_image=torch.tensor(9)),
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_autoregressive(prior, condition, seed=SEED + 1, first_image=7))
    assert not torch.equal(whole, sample_autoregressive(prior, condition, seed=SEED, first_image=8))


@pytest.mark.parametrize("arch", get_args(Arch))
def test_images_have_the_frequencies_of_the_chain_rule(arch):
    sizes = {"token_shape": (1, 2), "condition_shape": (1, 1), "width": 8, "depth": 1}
    images, prior = 6000, make_prior(num_codes=3, arch=arch, **sizes)
    tokens = sample_autoregressive(prior, torch.full((images, 1), 2), seed=SEED).flatten(1)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    pairs = torch.stack([first, second], 1)
    log_p = prior(pairs, torch.full((9, 1), 2)).log_softmax(-1)
    expected = images * log_p.gather(2, pairs[..., None]).sum((1, 2)).exp().detach()
    assert float(expected.sum()) == pytest.approx(images)
    assert float(expected.min()) > 5
    counts = (tokens[:, 0] * 3 + tokens[:, 1]).bincount(minlength=9)
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.8  # 8 degrees of freedom: 99.99 %


def test_one_token_alone(condition):
    prior = make_prior(token_shape=(1, 1))
    tokens = sample_autoregressive(prior, condition, seed=SEED)
    expected = choose_tokens(prior(tokens, condition)[:, 0], torch.arange(5), torch.tensor(SEED))
    assert torch.equal(tokens.flatten(), expected)


def test_compiled_it_draws_the_same(prior, condition):
    expected = sample_autoregressive(prior, condition, seed=SEED, guidance=1.5)
    assert torch.equal(sample_autoregressive(prior, condition, seed=SEED, guidance=1.5, compile=True), expected)


def test_it_evaluates_and_leaves_the_mode_alone(condition):
    prior = make_prior(dropout=0.5).train()
    prior.blocks[0].eval()
    expected = [module.training for module in prior.modules()]
    tokens = sample_autoregressive(prior, condition, seed=SEED)
    assert [module.training for module in prior.modules()] == expected
    assert torch.equal(tokens, sample_autoregressive(make_prior(), condition, seed=SEED))


def test_progress_counts_positions(prior, condition):
    seen = []
    sample_autoregressive(prior, condition, seed=SEED, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(1, 13)]


def test_half_precision(prior, condition):
    low = make_prior(arch=prior.arch).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        automatic = sample_autoregressive(make_prior(arch=prior.arch).float(), condition, seed=SEED)
    exact = sample_autoregressive(prior, condition, seed=SEED)
    # Rounding sends an image another way sooner or later, but at its first token hardly ever.
    for tokens in (automatic, sample_autoregressive(low, condition, seed=SEED)):
        assert (tokens[:, 0, 0] == exact[:, 0, 0]).sum() >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_draws_the_same_without_waiting(prior, condition, compiled):
    expected = sample_autoregressive(prior, condition, seed=SEED, guidance=1.5, top_p=0.9)
    there, condition = make_prior(arch=prior.arch).cuda(), condition.cuda()
    settings = {"seed": torch.tensor(SEED, device="cuda"), "guidance": 1.5, "top_p": 0.9, "compile": compiled}

    def forbid_waiting(done, total):
        torch.cuda.set_sync_debug_mode("error")

    try:
        tokens = sample_autoregressive(there, condition, progress=forbid_waiting, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": -1.0}, r"guidance .*-1\.0"),
        ({"guidance": math.nan}, "guidance .*nan"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"keep": (torch.zeros(5, 3, 3).long(), torch.ones(5, 3, 4).bool())}, r"\(5, 12\).*\(5, 3, 3\)"),
        ({"keep": (torch.zeros(5, 3, 4).long(), torch.ones(1, 12).bool())}, r"mask .*\(1, 12\)"),
        (
            {"keep": (torch.full((5, 12), 12), torch.ones(5, 12).bool())},
            r"keep .*\[0, 12\).* 12 to 12",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(prior, condition, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_autoregressive(prior, condition, seed=SEED, **settings)


def test_conditions_that_do_not_fit_are_refused(prior, condition):
    with pytest.raises(ValueError, match=r"condition .*\(B, 1, 4\) or \(B, 4\).*\(5, 4, 1\)"):
        sample_autoregressive(prior, condition.transpose(1, 2), seed=SEED)
    with pytest.raises(ValueError, match=r"condition.*\(0, 1, 4\)"):
        sample_autoregressive(prior, condition[:0], seed=SEED)
    with pytest.raises(ValueError, match=r"condition .*meta .*cpu"):
        sample_autoregressive(prior, condition.to("meta"), seed=SEED)
    with pytest.raises(TypeError, match=r"mask .*torch\.float32"):
        sample_autoregressive(prior, condition, seed=SEED, keep=(torch.zeros(5, 12).long(), torch.zeros(5, 12)))
