"""The diffusion prior, training and sampling, beside a plain expression of VQ-Diffusion's loss and sampler.

pytest bench/bench_diffusion.py -k small           on the CPU: width 128, 4 blocks, 8 images of 256 tokens, 5 steps
pytest bench/bench_diffusion.py -k paper           on a GPU: VQ-Diffusion-B, 16 images, 100 steps
pytest bench/bench_diffusion.py -s -k target       only the claims, whose runs take turns; prints their numbers

``--benchmark-json FILE`` keeps what was measured. The loss is that of a batch of logits, with its gradient. A
training step is the network's too, and the update of AdamW, the fused one for both. Sampling draws as many images, with
guidance. The network is ours in all of them; in the plain ones its attention is written out, as in VQ-Diffusion's code.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import measuring
import prior_runs
import pytest
import torch
from plain_diffusion import PlainDiffusion, plain_attention
from prior_runs import NUM_CODES, NUM_TOKENS, Benchmark, Size
from torch import Tensor

from regvq_fast.precision import choose_precision
from regvq_fast.priors.diffusion import VQDiffusion
from regvq_fast.priors.diffusion import model as vq_diffusion
from regvq_fast.priors.diffusion.loss import diffusion_terms
from regvq_fast.priors.diffusion.sampler import sample_diffusion
from regvq_fast.training.compilation import maybe_compile

SIZES = {"small": Size("cpu", 128, 4, 4, 8, steps=5), "paper": Size("cuda", 1024, 19, 16, 16, steps=100)}
# By importance: a GPU's time may run out. On a CPU one is compiled, since compiling takes longer than all the rest.
TRAINING = {
    "small": ("plain", "fp32", "fp32-compile"),
    "paper": ("plain-amp", "amp-compile", "plain", "fp32", "fp32-compile"),
}
SAMPLING = {"small": ("plain", "fp32"), "paper": ("plain", "fp32-compile", "fp32")}
LOSS = {"small": ("plain", "fp32"), "paper": ("plain", "fp32", "fp32-compile")}
GUIDANCE, TRUNCATION, AUXILIARY_WEIGHT = 2.0, 0.86, 5e-4


@contextlib.contextmanager
def written_out(mode: str) -> Iterator[None]:
    """The network as VQ-Diffusion's code has it, in the plain modes."""
    if not mode.startswith("plain"):
        yield
        return
    with mock.patch.object(vq_diffusion, "attention", plain_attention):
        yield


def make_prior(size: str, num_steps: int = 100) -> VQDiffusion:
    device, width, depth, heads, *_ = SIZES[size]
    torch.manual_seed(0)
    return VQDiffusion(NUM_CODES, width=width, depth=depth, heads=heads, num_steps=num_steps).to(device)


def make_batch(size: str) -> dict[str, Tensor]:
    """Tokens, noisy tokens and their steps, text, and logits."""
    device, _, _, _, images, _ = SIZES[size]
    chain = vq_diffusion.MaskAndReplace(NUM_CODES)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_CODES, (images, NUM_TOKENS), generator=generator)
    t = torch.randint(1, 101, (images,), generator=generator)
    batch = {
        "tokens": tokens,
        "noisy": chain.corrupt(tokens, t, torch.tensor(0)),
        "t": t,
        "text": torch.randn(images, 77, 512, generator=generator),
        "logits": 3 * torch.randn(images, NUM_TOKENS, NUM_CODES, generator=generator),
    }
    return {name: value.to(device) for name, value in batch.items()}


def make_loss(size: str, mode: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Of logits, tokens, noisy tokens and t; 0-dim."""
    chain, device = vq_diffusion.MaskAndReplace(NUM_CODES), torch.device(SIZES[size].device)
    plain = PlainDiffusion(chain, device)
    probability = torch.full((SIZES[size].images,), 0.01, device=device)

    def loss(logits: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        if mode.startswith("plain"):
            bound, auxiliary = plain.bound(logits, tokens, noisy, t)
            return ((bound + AUXILIARY_WEIGHT * (2 - (t - 1) / 100) * auxiliary) / probability).mean()
        return diffusion_terms(chain, logits, tokens, noisy, t).loss(t, probability, 100, AUXILIARY_WEIGHT)

    return loss


def loss_run(size: str, mode: str) -> measuring.Run:
    loss, batch = maybe_compile(make_loss(size, mode), mode.endswith("compile")), make_batch(size)
    logits = batch["logits"].requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, batch["tokens"], batch["noisy"], batch["t"]), logits)


def training_run(size: str, mode: str) -> measuring.Run:
    """A step of training, always on the same batch."""
    prior, batch = make_prior(size), make_batch(size)
    precision, loss = choose_precision("amp" in mode, batch["text"].device), make_loss(size, mode)

    def of_batch(tokens: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with precision.autocast():
            logits = prior(noisy, t, text)
        return loss(logits, tokens, noisy, t)

    compiled = maybe_compile(of_batch, mode.endswith("compile"))

    def value() -> Tensor:
        with written_out(mode):
            return compiled(batch["tokens"], batch["noisy"], batch["t"], batch["text"])

    return prior_runs.training_step(prior, precision, value)


def sampling_run(size: str, mode: str) -> measuring.Run:
    """Images for all texts of the batch."""
    prior, text = make_prior(size, SIZES[size].steps).eval(), make_batch(size)["text"]
    if mode != "plain":
        draw = functools.partial(
            sample_diffusion, guidance=GUIDANCE, truncation=TRUNCATION, compile=mode == "fp32-compile"
        )
        return lambda: draw(prior, text, seed=0)
    plain = PlainDiffusion(prior.transition, text.device)

    def run() -> None:
        with written_out(mode):
            plain.sample(prior, text, prior.condition(len(text)), NUM_TOKENS, GUIDANCE, TRUNCATION)

    return run


@functools.cache
def check(size: str) -> None:
    """Both compute the same network, losses, gradients and posteriors: a wrong one reports no time."""
    batch, prior = make_batch(size), make_prior(size)
    logits, tokens, noisy, t = (batch[name][:2] for name in ("logits", "tokens", "noisy", "t"))
    probability = torch.ones(2, device=t.device)
    plain = PlainDiffusion(prior.transition, t.device)
    logits = logits.requires_grad_()
    bound, auxiliary = plain.bound(logits, tokens, noisy, t)
    terms = diffusion_terms(prior.transition, logits, tokens, noisy, t)
    torch.testing.assert_close(terms.bound, bound, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(terms.cross_entropy, auxiliary, rtol=1e-3, atol=1e-4)
    theirs = ((bound + 2 * auxiliary) / probability).mean()
    ours = ((terms.bound + 2 * terms.cross_entropy) / probability).mean()
    (expected,), (gradient,) = (torch.autograd.grad(value, logits) for value in (theirs, ours))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        posterior = prior.transition.log_posterior(logits, noisy, t - 1, t).clamp(min=-70.0)
        plainly = plain.posterior(plain.predict(logits), plain.log_one_hot(noisy), t).mT
        torch.testing.assert_close(posterior.exp(), plainly.exp(), rtol=1e-3, atol=1e-6)
        predicted = prior(noisy, t, batch["text"][:2])
        with written_out("plain"):
            torch.testing.assert_close(prior(noisy, t, batch["text"][:2]), predicted, rtol=1e-3, atol=1e-3)


def need(size: str) -> None:
    """Skips the test where the size's device is missing; fails where a result is wrong."""
    prior_runs.need_device(SIZES[size].device)
    check(size)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(TRAINING))
def test_training(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("diffusion", "training step", SIZES, training_run).measure(measure_step, size, mode)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(SAMPLING))
def test_sampling(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    more = ", {steps} steps, guidance"
    Benchmark("diffusion", "sampling", SIZES, sampling_run, more).measure(measure_step, size, mode)


@pytest.mark.parametrize(("size", "mode"), prior_runs.pairs(LOSS))
def test_loss(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size)
    Benchmark("diffusion", "loss and gradient", SIZES, loss_run).measure(measure_step, size, mode)


def test_target_training_on_a_cpu() -> None:
    """1.5 times as fast, compiled. It measures time: run it on an idle machine."""
    need("small")
    seconds = prior_runs.compare(training_run, "small", "plain", "fp32", "fp32-compile")
    assert seconds["plain"] >= 1.5 * seconds["fp32-compile"]


def test_target_sampling_on_a_cpu() -> None:
    """No slower, and drawn by counter-based noise."""
    need("small")
    seconds = prior_runs.compare(sampling_run, "small", "plain", "fp32", "fp32-compile")
    assert seconds["plain"] >= seconds["fp32"]
