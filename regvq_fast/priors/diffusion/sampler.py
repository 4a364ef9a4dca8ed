"""Sampler of the diffusion prior: all tokens of an image in parallel, from all masked to none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from regvq_fast.models.model import evaluating
from regvq_fast.priors.choosing import check_choice, check_guidance, choose_tokens, guide, step_seeds, token_rows
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.sampler import PriorSampler, Progress, SteppedSettings, capture, check_keep, compiled


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(SteppedSettings):
    """Settings of sampling from the diffusion prior."""

    truncation: float = 0.86
    """diffusion: fraction of p(x_0 | x_t) to choose from, the most likely codes first."""


class DiffusionSampler(PriorSampler):
    """Sampler of a `VQDiffusion`."""

    title = "diffusion"
    conditions = ("caption", "label", "none")
    settings_type = DiffusionSettings
    preview_settings: ClassVar = {"steps": 25}
    has_states = True

    prior: VQDiffusion
    settings: DiffusionSettings

    @classmethod
    def preview(cls, prior: VQDiffusion, seed: int) -> "DiffusionSampler":
        return cls(prior, DiffusionSettings(seed=seed, steps=min(cls.preview_settings["steps"], prior.num_steps)))

    def check(self, run: Path | None = None) -> None:
        super().check(run)
        settings = self.settings
        check_settings(self.prior, settings.steps, settings.truncation, settings.guidance, self.condition)

    def prepare(self, conditions: Any, source: str, *, strict: bool = False) -> Any:
        """Return captions as they are; look up labels.

        Raises:
            ValueError: an unknown label; with `strict`, an empty or over-long caption.
        """
        if strict and self.condition == "caption":
            self.prior.text_encoder.truncate = False  # type: ignore[union-attr]
            self.prior.tokenize_text(conditions)
        return super().prepare(conditions, source)

    def sample(
        self,
        conditions: Any,
        first_image: int = 0,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        ids = self.prior.condition_ids(self.prepare(conditions, "a condition"))
        return sample_diffusion(
            self.prior,
            None if ids is None else ids.to(self.prior.head.weight.device),
            num_images=len(conditions),
            first_image=first_image,
            keep=keep,
            states=states,
            progress=progress,
            **self.describe(),
        )

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described | {"steps": described["steps"] or self.prior.num_steps}


@torch.no_grad()
def sample_diffusion(
    prior: VQDiffusion,
    text: Sequence[str] | Tensor | None = None,
    *,
    seed: int | Tensor,
    text_mask: Tensor | None = None,
    num_images: int | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    truncation: float = 0.86,
    guidance: float = 1.0,
    keep: tuple[Tensor, Tensor] | None = None,
    first_image: int | Tensor = 0,
    compile: bool = False,
    states: list[Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample the tokens of one image for each text, without dropout, whatever mode the prior is in.

    A step from t to s samples x_0 from the truncated p(x_0 | x_t), then x_s from q(x_s | x_t, x_0). Together this
    samples p(x_s | x_t) exactly for any s < t, so a sampler may skip steps. All shapes are static and the host does not
    wait for the device; on a GPU the steps replay a CUDA graph, captured once per call. A token is a function of (seed,
    number of the image, position): images don't depend on their batch (but see `regvq_fast.priors.choosing` on
    rounding).

    Args:
        prior: the model.
        text: B captions or labels for the prior's encoder; or ids or features, as in `VQDiffusion.forward`, on the
            prior's device. None: the null condition.
        seed: an int, or a 0-dim int64 tensor on the prior's device.
        text_mask: of the text, as in `VQDiffusion.forward`.
        num_images: B without text.
        steps: 1 to the prior's `num_steps`; None: `num_steps`.
        temperature: of p(x_0 | x_t); 0 takes the most likely code.
        truncation: fraction of p(x_0 | x_t) to sample from, the most likely codes first; 1: all.
        guidance: weight w of classifier-free guidance: p(x_0 | x_t, text) is proportional to
            p(conditional)^w p(null)^(1 - w). 1: none; others double the work.
        keep: for in-painting: tokens, and a mask of those to keep, (B, h, w) or (B, L) int64 and bool. Kept tokens are
            never masked; the others are sampled around them.
        first_image: global number of the first image.
        compile: run the network by `torch.compile`, compiled once for calls with equal shapes.
        states: a list to which x_s (B, h, w) of every step is appended; masked tokens are num_codes.
        progress: called after each step with the steps done and in total.

    Returns:
        Tokens (B, h, w) int64.

    Raises:
        ValueError: a setting out of range, more steps than the prior has, guidance without a null condition, an empty
            or over-long caption, shapes that don't fit, or tensors on different devices.
        TypeError: a tensor of another type.
    """
    check_choice(temperature)
    check_settings(prior, steps, truncation, guidance, text)
    device, length = prior.head.weight.device, prior.num_tokens
    if isinstance(text, Tensor):
        if text.device != device:
            raise ValueError(f"the text is on {text.device} but the prior on {device}; move them to one device")
    elif text is not None:
        text = prior.tokenize_text(text).to(device)
    batch = _batch(text, num_images)
    given, kept = check_keep(keep, batch, prior, device)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    schedule = timesteps(prior.num_steps, steps or prior.num_steps)
    seeds = step_seeds(seed, len(schedule) - 1, each=2)
    grid = torch.tensor(schedule, device=device)
    network = compiled(VQDiffusion.forward) if compile else VQDiffusion.forward

    tokens = torch.full((batch, length), prior.num_codes, dtype=torch.int64, device=device)
    if given is not None and kept is not None:
        tokens = torch.where(kept, given, tokens)
    rows = token_rows(tokens, first_image)
    index = torch.zeros(1, dtype=torch.int64, device=device)  # of the step's t in the schedule

    def step() -> None:
        t, s = grid.index_select(0, index), grid.index_select(0, index + 1)
        if guidance == 1.0:
            logits = network(prior, tokens, t.expand(batch), condition)
        else:
            logits = guide(network(prior, tokens.repeat(2, 1), t.expand(2 * batch), condition), guidance)
        choice_seed, step_seed = seeds.index_select(0, index)[0].unbind()
        start = choose_tokens(logits, rows, choice_seed, temperature=temperature, top_p=truncation)
        sampled = prior.transition.sample_posterior(start, tokens, s, t, step_seed, first_image)
        if given is not None and kept is not None:
            sampled = torch.where(kept, given, sampled)
        tokens.copy_(sampled)
        index.add_(1)

    with evaluating(prior):
        condition = prior.condition(batch, text, text_mask)
        if guidance != 1.0:
            condition = torch.cat([condition, prior.condition(batch)])
        advance = capture(step, tokens, index) if device.type == "cuda" and len(schedule) > 2 else step
        for done in range(1, len(schedule)):
            advance()
            if states is not None:
                states.append(tokens.clone().view(batch, *prior.token_shape))
            if progress is not None:
                progress(done, len(schedule) - 1)
    return tokens.view(batch, *prior.token_shape)


def timesteps(num_steps: int, steps: int) -> list[int]:
    """Return the steps T = t_0 > t_1 > ... > 0 of a sampler that takes `steps` of `num_steps`, evenly spaced."""
    return [round(num_steps * left / steps) for left in range(steps, -1, -1)]


def check_settings(prior: VQDiffusion, steps: int | None, truncation: float, guidance: float, text: object) -> None:
    """Raise ValueError for settings that :func:`sample_diffusion` can't take with this prior."""
    if steps is not None and not 1 <= steps <= prior.num_steps:
        raise ValueError(f"steps must lie between 1 and the prior's {prior.num_steps}, got {steps}")
    if not 0.0 < truncation <= 1.0:
        raise ValueError(
            f"truncation is the fraction of probability that is kept and must lie in (0, 1], got {truncation}"
        )
    check_guidance(guidance)
    if guidance != 1.0 and prior.null_text is None:
        raise ValueError(f"guidance {guidance} needs a null condition, which this prior lacks: set guidance=1")
    if guidance != 1.0 and text is None:
        raise ValueError(f"guidance {guidance} needs a text: without one, set guidance=1")


def _batch(text: Tensor | None, num_images: int | None) -> int:
    batch = num_images if text is None else len(text)
    if batch is None:
        raise ValueError("num_images must be given where there is no text")
    if num_images not in (None, batch):
        raise ValueError(f"num_images is {num_images} but there are {batch} texts: leave it out")
    if batch < 1:
        raise ValueError(f"there must be at least one image, got {batch}")
    return batch
