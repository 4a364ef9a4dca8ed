"""The masked prior, training and sampling, beside a plain expression of MaskGIT's loss and sampler.

pytest bench/bench_maskgit.py -k small           on the CPU: width 128, 4 blocks, 8 images of 256 tokens, 8 steps
pytest bench/bench_maskgit.py -k paper           on a GPU: the paper's size, 32 images, 12 steps
pytest bench/bench_maskgit.py -s -k target       only the claims, whose runs take turns; prints their numbers

``--benchmark-json FILE`` keeps what was measured. A training step is the loss of a batch under labels, its gradients
and the update of AdamW, the fused one for both. Sampling makes as many images, with guidance. The network is ours in
all of them; in the plain ones its attention is written out, and masks, tokens and confidences come from PyTorch's own
operations and random numbers, as in public implementations. Without random numbers, both keep the same tokens.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from unittest import mock

import measuring
import prior_runs
import pytest
import torch
import torch.nn.functional as F
from plain_diffusion import plain_attention
from prior_runs import NUM_CODES, NUM_TOKENS, Benchmark, Size
from torch import Tensor

from regvq_fast.precision import choose_precision
from regvq_fast.priors.maskgit import MaskGIT, sample_maskgit
from regvq_fast.priors.maskgit import model as maskgit
from regvq_fast.training.compilation import maybe_compile

NUM_CLASSES = 1000
SIZES = {"small": Size("cpu", 128, 4, 4, 8, steps=8), "paper": Size("cuda", 768, 24, 8, 32, steps=12)}
TRAINING = {"small": ("plain", "fp32"), "paper": ("plain-amp", "amp-compile", "plain", "fp32", "fp32-compile")}
SAMPLING = {"small": ("plain", "fp32"), "paper": ("plain", "fp32-compile", "fp32")}
GUIDANCE, SMOOTHING, CHOICE_TEMPERATURE = 2.0, 0.1, 4.5


@contextlib.contextmanager
def written_out(mode: str) -> Iterator[None]:
    """The network with its attention's matrix in memory, in the plain modes."""
    if not mode.startswith("plain"):
        yield
        return
    with mock.patch.object(maskgit, "attention", plain_attention):
        yield


@functools.cache
def make_prior(size: str) -> MaskGIT:
    device, width, depth, heads, *_ = SIZES[size]
    torch.manual_seed(0)
    names = [str(k) for k in range(NUM_CLASSES)]
    prior = MaskGIT(NUM_CODES, NUM_CLASSES, label_names=names, width=width, depth=depth, heads=heads).to(device)
    with torch.no_grad():  # fresh weights would hardly tell a position from another
        prior.pos_emb.normal_()
        prior.tok_emb.weight.mul_(10)
    return prior


def make_batch(size: str) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and labels (B, 1)."""
    device, *_, images, _ = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_CODES, (images, NUM_TOKENS), generator=generator)
    return tokens.to(device), torch.randint(NUM_CLASSES, (images, 1), generator=generator).to(device)


def plain_loss(prior: MaskGIT, tokens: Tensor, labels: Tensor, masked: Tensor | None = None) -> Tensor:
    """Mask by sorting uniform numbers, and take the cross-entropy of the logits that were masked."""
    if masked is None:
        ratio = torch.cos(math.pi / 2 * torch.rand(len(tokens), 1, device=tokens.device))
        order = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        masked = order < (NUM_TOKENS * ratio).ceil()
    logits = prior(tokens.masked_fill(masked, NUM_CODES), labels).float()
    losses = F.cross_entropy(logits.mT, tokens, reduction="none", label_smoothing=SMOOTHING)
    return ((losses * masked).sum(1) / masked.sum(1)).mean()


def our_loss(prior: MaskGIT, tokens: Tensor, labels: Tensor) -> Tensor:
    seed = torch.zeros((), dtype=torch.int64, device=tokens.device)
    counts = prior.training_counts(len(tokens), seed=seed, first_image=0)
    masked = prior.mask(counts, seed=seed, first_image=0)
    return prior.loss(tokens, labels, masked, label_smoothing=SMOOTHING).mean()


def plain_sample(prior: MaskGIT, labels: Tensor, steps: int, *, greedy: bool = False) -> Tensor:
    """Tokens (B, L): softmax, draw, confidence, keep the top, as public implementations do it."""
    tokens = torch.full((len(labels), NUM_TOKENS), NUM_CODES, device=labels.device)
    null = torch.full_like(labels, NUM_CLASSES)
    for step in range(steps):
        conditional, free = prior(torch.cat([tokens, tokens]), torch.cat([labels, null])).float().chunk(2)
        probability = (free + GUIDANCE * (conditional - free)).softmax(-1)
        flat = probability.flatten(0, 1)
        drawn = (flat.argmax(-1) if greedy else torch.multinomial(flat, 1)[:, 0]).view_as(tokens)
        masked = tokens == NUM_CODES
        confidence = probability.gather(-1, drawn[..., None])[..., 0].log()
        if not greedy:
            noise = -torch.rand_like(confidence).log().neg().log()
            confidence = confidence + CHOICE_TEMPERATURE * (1 - (step + 1) / steps) * noise
        confidence = confidence.masked_fill(~masked, math.inf)
        left = math.floor(NUM_TOKENS * math.cos(math.pi / 2 * (step + 1) / steps)) if step + 1 < steps else 0
        kept = confidence.topk(NUM_TOKENS - left, dim=1).indices
        tokens = torch.full_like(tokens, NUM_CODES).scatter(1, kept, torch.where(masked, drawn, tokens).gather(1, kept))
    return tokens


def training_run(size: str, mode: str) -> measuring.Run:
    """A step of training, always on the same batch."""
    prior, (tokens, labels) = make_prior(size).train(), make_batch(size)
    precision = choose_precision("amp" in mode, tokens.device)
    loss = maybe_compile(plain_loss if mode.startswith("plain") else our_loss, mode.endswith("compile"))

    def value() -> Tensor:
        with precision.autocast(), written_out(mode):
            return loss(prior, tokens, labels)

    return prior_runs.training_step(prior, precision, value)


def sampling_run(size: str, mode: str) -> measuring.Run:
    """Images for all labels of the batch."""
    prior, (_, labels), steps = make_prior(size).eval(), make_batch(size), SIZES[size].steps

    @torch.no_grad()
    def run() -> None:
        with written_out(mode):
            if mode == "plain":
                plain_sample(prior, labels, steps)
            else:
                compile = mode.endswith("compile")
                sample_maskgit(prior, labels, seed=0, steps=steps, guidance=GUIDANCE, compile=compile)

    return run


@functools.cache
def check(size: str) -> None:
    """Both compute the same loss, and choose the same tokens where nothing is drawn: a wrong one reports no time."""
    prior, (tokens, labels) = make_prior(size).eval(), (value[:2] for value in make_batch(size))
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens.device) < 0.6
    with torch.no_grad():
        ours = prior.loss(tokens, labels, masked, label_smoothing=SMOOTHING).mean()
        with written_out("plain"):
            torch.testing.assert_close(plain_loss(prior, tokens, labels, masked), ours, rtol=1e-4, atol=1e-4)
            theirs = plain_sample(prior, labels, 4, greedy=True)
        found = sample_maskgit(
            prior, labels, seed=0, steps=4, guidance=GUIDANCE, temperature=0.0, choice_temperature=0.0
        )
    assert theirs.unique().numel() > 10
    assert (found.flatten(1) == theirs).float().mean() > 0.95  # near ties are rounded otherwise


def need(size: str) -> None:
    """Skips the test where the size's device is missing; fails where a result is wrong."""
    prior_runs.need_device(SIZES[size].device)
    check(size)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(TRAINING))
def test_training(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("masked", "training step", SIZES, training_run).measure(measure_step, size, mode)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(SAMPLING))
def test_sampling(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("masked", "sampling", SIZES, sampling_run, ", {steps} steps, guidance").measure(measure_step, size, mode)


def test_target_on_a_cpu() -> None:
    """No slower in either. It measures time: run it on an idle machine."""
    need("small")
    for make in (training_run, sampling_run):
        seconds = prior_runs.compare(make, "small", "plain", "fp32")
        assert seconds["plain"] >= seconds["fp32"]
