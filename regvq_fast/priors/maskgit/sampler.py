"""Sampler of the masked prior: an image's tokens in a few steps, the most confident first."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regvq_fast.models.model import evaluating
from regvq_fast.ops.noise import Stream, gumbel_from_words, row_words
from regvq_fast.priors.choosing import check_choice, check_guidance, choose_tokens, guide, step_seeds, token_rows
from regvq_fast.priors.class_ids import ClassIdSampler, check_conditions
from regvq_fast.priors.maskgit.config import MaskGITConfig
from regvq_fast.priors.maskgit.model import MaskGIT
from regvq_fast.priors.sampler import Progress, SteppedSettings, capture, check_keep, compiled

_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class MaskGITSettings(SteppedSettings):
    """Settings of sampling from the masked prior."""

    choice_temperature: float = 4.5
    """maskgit: noise in the choice of the tokens to keep, falling to 0 at the last step."""


class MaskGITSampler(ClassIdSampler):
    """Sampler of a `MaskGIT`."""

    title = "MaskGIT"
    settings_type = MaskGITSettings
    config_type = MaskGITConfig
    has_states = True

    prior: MaskGIT
    settings: MaskGITSettings

    @property
    def most_steps(self) -> int:
        return self.prior.num_tokens

    def check(self, run: Path | None = None) -> None:
        super().check(run)
        check_settings(self.prior, self.settings.steps, self.settings.choice_temperature)

    def sample(
        self,
        conditions: Any,
        first_image: int = 0,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        return sample_maskgit(
            self.prior,
            self.ids(conditions),
            first_image=first_image,
            keep=keep,
            states=states,
            progress=progress,
            **self.describe(),
        )

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described | {"steps": described["steps"] or default_steps(self.prior)}


@torch.no_grad()
def sample_maskgit(
    prior: MaskGIT,
    condition: Tensor,
    *,
    seed: int | Tensor,
    steps: int | None = None,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    guidance: float = 1.0,
    keep: tuple[Tensor, Tensor] | None = None,
    first_image: int | Tensor = 0,
    compile: bool = False,
    states: list[Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample the tokens of one image for each condition, without dropout, whatever mode the prior is in.

    A step samples every masked token and keeps the most confident ones; the others are masked again. `masked_counts`
    gives their number. A token's confidence is its log-probability plus Gumbel noise times a temperature that falls
    linearly to 0 at the last step. All shapes are static and the host does not wait for the device; on a GPU the steps
    replay a CUDA graph, captured once per call. A token is a function of (seed, number of the image, position): images
    don't depend on their batch (but see `regvq_fast.priors.choosing` on rounding).

    Args:
        prior: on the device of the condition.
        condition: (B, K), or a map (B, h, w), int64.
        seed: an int, or a 0-dim int64 tensor on that device.
        steps: 1 to the number of tokens; None: 12, or the number of tokens if that is smaller.
        temperature: as in `choose_tokens`.
        choice_temperature: initial temperature of the noise in confidences. 0: keep the most probable tokens; very
            large: keep random ones.
        guidance: weight w of classifier-free guidance, logits = null + w * (conditional - null). 1: none; others double
            the work and need a prior trained with a null condition.
        keep: for in-painting: tokens, and a mask of those to keep, (B, h, w) or (B, L) int64 and bool. Kept tokens are
            never masked; the others are sampled around them.
        first_image: global number of the first image.
        compile: run the network by `torch.compile`, compiled once for calls with equal shapes.
        states: a list to which the tokens (B, h, w) after every step are appended; masked ones are num_codes.
        progress: called after each step with the steps done and in total.

    Returns:
        Tokens (B, h, w) int64.

    Raises:
        ValueError: a setting out of range, shapes that don't fit, or tensors on different devices.
        TypeError: a tensor of another type.
    """
    check_choice(temperature)
    check_guidance(guidance)
    check_settings(prior, steps, choice_temperature)
    steps = steps or default_steps(prior)
    device, (batch, length) = prior.pos_emb.device, (len(condition), prior.num_tokens)
    check_conditions(condition, device)
    given, kept = check_keep(keep, batch, prior, device)
    if guidance != 1.0:
        condition = prior.with_null(condition)
    seeds = step_seeds(torch.as_tensor(seed, dtype=torch.int64, device=device), steps)
    noise_scales = torch.tensor([choice_temperature * (1 - (k + 1) / steps) for k in range(steps)], device=device)
    network = compiled(MaskGIT.forward) if compile else MaskGIT.forward

    tokens = torch.full((batch, length), prior.num_codes, dtype=torch.int64, device=device)
    if given is not None and kept is not None:
        tokens = torch.where(kept, given, tokens)
    counts = masked_counts((tokens == prior.num_codes).sum(1), steps)
    rows = token_rows(tokens, first_image)
    ranks = torch.arange(length, device=device).expand(batch, -1)
    index = torch.zeros(1, dtype=torch.int64, device=device)  # of the step

    def step() -> None:
        if guidance == 1.0:
            logits = network(prior, tokens, condition).float()
        else:
            logits = guide(network(prior, tokens.repeat(2, 1), condition), guidance)
        step_seed = seeds.index_select(0, index)[0, 0]
        sampled = choose_tokens(logits, rows, step_seed, temperature=temperature)
        masked = tokens == prior.num_codes
        confidence = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
        noise = gumbel_from_words(row_words(step_seed, rows, Stream.CONFIDENCES))
        confidence = confidence + noise_scales.index_select(0, index) * noise
        order = confidence.masked_fill(~masked, torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        stays = rank < length - counts.index_select(1, index + 1)
        tokens.copy_(torch.where(masked & stays, sampled, tokens))
        index.add_(1)

    with evaluating(prior):
        advance = capture(step, tokens, index) if device.type == "cuda" and steps > 1 else step
        for done in range(1, steps + 1):
            advance()
            if states is not None:
                states.append(tokens.clone().view(batch, *prior.token_shape))
            if progress is not None:
                progress(done, steps)
    return tokens.view(batch, *prior.token_shape)


def masked_counts(unknown: Tensor, steps: int) -> Tensor:
    """Return the numbers of masked tokens before each step and after the last, (B, steps + 1) int64.

    After s of T steps, floor(U cos(pi / 2 * s / T)) of an image's U unknown tokens are masked, and at least one less
    than before, until there are none.

    Args:
        unknown: U, (B,) int64.
        steps: T.
    """
    ratios = [math.cos(math.pi / 2 * s / steps) for s in range(steps)]
    ratio = torch.tensor([*ratios, 0.0], dtype=torch.float64, device=unknown.device)
    taken = torch.arange(steps + 1, device=unknown.device)
    wanted = (unknown[:, None] * ratio).floor().long()
    return ((wanted + taken).cummin(1).values - taken).clamp(min=0)


def default_steps(prior: MaskGIT) -> int:
    """Return the default number of steps."""
    return min(_STEPS, prior.num_tokens)


def check_settings(prior: MaskGIT, steps: int | None, choice_temperature: float) -> None:
    """Raise ValueError for settings that :func:`sample_maskgit` can't take with this prior."""
    if steps is not None and not 1 <= steps <= prior.num_tokens:
        raise ValueError(f"steps must lie between 1 and the prior's {prior.num_tokens} tokens, got {steps}")
    if not 0.0 <= choice_temperature < math.inf:
        raise ValueError(f"choice_temperature must be a finite number of at least 0, got {choice_temperature}")
