"""The autoregressive prior, training and sampling, beside taming-transformers' minGPT at the same size.

pytest bench/bench_autoregressive.py -k small           on the CPU: width 256, 4 blocks, 8 images of 256 tokens
pytest bench/bench_autoregressive.py -k paper           on a GPU: width 1024, 24 blocks, 32 images
pytest bench/bench_autoregressive.py -s -k target       only the claims, whose runs take turns; prints their numbers

``--benchmark-json FILE`` keeps what was measured. A training step is the loss of a batch, its gradients and the update
of AdamW, the fused one for both. Sampling draws as many images from their conditions; taming's is
``sample_with_past``, whose cache grows by a copy of itself at each token. Both have the same weights and choose among
all codes. Mixed precision trains; to sample in half precision, the network's weights are converted. ``llama`` is ours
with the blocks of that name, fresh, in the precision that follows. taming needs
``pip install --no-deps taming-transformers-rom1504``.
"""

import copy
import functools
from collections.abc import Callable

import measuring
import peers
import prior_runs
import pytest
import taming_gpt
import torch
import torch.nn.functional as F
from prior_runs import NUM_CODES, NUM_TOKENS, Benchmark, Size
from torch import Tensor, nn

from regvq_fast.precision import choose_precision
from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.training.compilation import maybe_compile

NUM_CLASSES = 151
SIZES = {"small": Size("cpu", 256, 4, 8, 8), "paper": Size("cuda", 1024, 24, 16, 32)}
# By importance: a GPU's time may run out. On a CPU one is compiled, since compiling takes longer than all the rest.
TRAINING = {
    "small": ("taming", "fp32", "amp", "llama-fp32"),
    "paper": ("taming-amp", "amp-compile", "taming", "amp", "fp32", "llama-amp-compile"),
}
SAMPLING = {
    "small": ("taming", "fp32", "fp32-compile", "llama-fp32"),
    "paper": ("taming-half", "half-compile", "half", "taming", "fp32", "fp32-compile", "llama-half-compile"),
}


@functools.cache
def networks(size: str) -> tuple[nn.Module, TokenTransformer]:
    """taming's and ours with the same weights, in evaluation mode, which without dropout computes as training does."""
    device, width, depth, heads, *_ = SIZES[size]
    torch.manual_seed(0)
    ours = TokenTransformer(NUM_CODES, NUM_CLASSES, width=width, depth=depth, heads=heads)
    length = ours.condition_length + ours.num_tokens
    theirs = taming_gpt.module().GPT(NUM_CODES, length, n_layer=depth, n_head=heads, n_embd=width)
    with torch.no_grad():  # fresh weights would hardly tell a condition from another
        for parameter in theirs.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    ours.load_taming_state_dict(theirs.state_dict())
    return theirs.to(device).eval(), ours.to(device).eval()


def make_batch(size: str) -> tuple[Tensor, Tensor]:
    """Tokens and condition, (B, NUM_TOKENS) each."""
    generator = torch.Generator().manual_seed(1)
    shape = (SIZES[size].images, NUM_TOKENS)
    tokens, condition = (torch.randint(n, shape, generator=generator) for n in (NUM_CODES, NUM_CLASSES))
    return tokens.to(SIZES[size].device), condition.to(SIZES[size].device)


def taming_logits(network: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
    """Logits of the tokens, as ``Net2NetTransformer`` takes them from its network."""
    logits, _ = network(torch.cat([condition, tokens], 1)[:, :-1])
    return logits[:, condition.shape[1] - 1 :]


def taming_loss(network: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
    logits = taming_logits(network, tokens, condition)
    return F.cross_entropy(logits.reshape(-1, NUM_CODES), tokens.flatten())


def pick(size: str, mode: str) -> nn.Module:
    """A copy of one of the networks, or a new one of the other kind."""
    theirs, ours = networks(size)
    if mode.startswith("llama"):
        return TokenTransformer(**{**ours._arguments, "arch": "llama"}).to(SIZES[size].device)
    return copy.deepcopy(theirs if mode.startswith("taming") else ours)


def training_run(size: str, mode: str) -> measuring.Run:
    """A step of training, always on the same batch."""
    network, precision = pick(size, mode).train(), choose_precision("amp" in mode, torch.device(SIZES[size].device))
    loss: Callable[..., Tensor] = taming_loss if mode.startswith("taming") else TokenTransformer.loss
    loss = maybe_compile(loss, mode.endswith("compile"))
    tokens, condition = make_batch(size)

    def value() -> Tensor:
        with precision.autocast():
            return loss(network, tokens, condition)

    return prior_runs.training_step(network, precision, value)


def sampling_run(size: str, mode: str) -> measuring.Run:
    """Images for all conditions of the batch."""
    network, (_, condition) = pick(size, mode), make_batch(size)
    half = choose_precision("half" in mode, condition.device).dtype
    network = network if half is None else network.to(half)
    if mode.startswith("taming"):
        return lambda: taming_gpt.module().sample_with_past(condition, network, NUM_TOKENS)
    assert isinstance(network, TokenTransformer)
    ours, compiled = network, mode.endswith("compile")
    return lambda: sample_autoregressive(ours, condition, seed=0, compile=compiled)


@functools.cache
def check(size: str) -> None:
    """Both compute the same loss, and greedily draw what the other would: a wrong one reports no time."""
    theirs, ours = networks(size)
    tokens, condition = (ids[:2] for ids in make_batch(size))
    with torch.no_grad():
        torch.testing.assert_close(ours.loss(tokens, condition), taming_loss(theirs, tokens, condition))
        drawn = sample_autoregressive(ours, condition, seed=0, temperature=0.0).flatten(1)
        theirs_drawn = taming_gpt.module().sample_with_past(condition, theirs, NUM_TOKENS, sample_logits=False)
        assert drawn.unique().numel() > 10
        for sample, judge in (
            (drawn, taming_logits(theirs, drawn, condition)),
            (theirs_drawn, ours(theirs_drawn, condition)),
        ):
            chosen = judge.gather(2, sample.unsqueeze(2)).squeeze(2)
            assert float((judge.amax(2) - chosen).max()) < 1e-3  # equals within rounding may change places


def need(size: str) -> None:
    """Skips the test where the size's device or taming is missing; fails where a result is wrong."""
    prior_runs.need_device(SIZES[size].device)
    try:
        check(size)
    except peers.SkippedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(TRAINING))
def test_training(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("autoregressive", "training step", SIZES, training_run).measure(measure_step, size, mode)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(SAMPLING))
def test_sampling(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("autoregressive", "sampling", SIZES, sampling_run).measure(measure_step, size, mode)


def test_target_sampling_on_a_cpu() -> None:
    """3 times as fast. It measures time: run it on an idle machine."""
    need("small")
    seconds = prior_runs.compare(sampling_run, "small", "taming", "fp32")
    assert seconds["taming"] >= 3 * seconds["fp32"]


def test_target_training_on_a_cpu() -> None:
    """No slower, uncompiled and in fp32 as taming's."""
    need("small")
    seconds = prior_runs.compare(training_run, "small", "taming", "fp32")
    assert seconds["taming"] >= seconds["fp32"]
