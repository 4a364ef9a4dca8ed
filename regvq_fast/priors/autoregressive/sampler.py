"""Sampler of the autoregressive prior: the tokens of an image, position by position."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regvq_fast.models.attention import KeyValueCache
from regvq_fast.models.model import evaluating
from regvq_fast.priors.autoregressive.config import ARConfig
from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.choosing import check_choice, check_guidance, choose_tokens, guide
from regvq_fast.priors.class_ids import ClassIdSampler, check_conditions
from regvq_fast.priors.sampler import Progress, SamplingSettings, capture, check_keep, compiled


@dataclass(frozen=True, kw_only=True)
class ARSettings(SamplingSettings):
    """Settings of sampling from the autoregressive prior."""

    top_k: int | None = None
    """ar: choose among so many most likely codes."""
    top_p: float | None = None
    """ar: choose among the fewest codes whose probabilities sum to this."""


class ARSampler(ClassIdSampler):
    """Sampler of a `TokenTransformer`."""

    title = "autoregressive"
    settings_type = ARSettings
    config_type = ARConfig

    prior: TokenTransformer
    settings: ARSettings

    def check(self, run: Path | None = None) -> None:
        super().check(run)
        check_choice(top_k=self.settings.top_k, top_p=self.settings.top_p)

    def sample(
        self,
        conditions: Any,
        first_image: int = 0,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        ids = self.ids(conditions)
        return sample_autoregressive(
            self.prior, ids, first_image=first_image, keep=keep, progress=progress, **self.describe()
        )


@torch.no_grad()
def sample_autoregressive(
    prior: TokenTransformer,
    condition: Tensor,
    *,
    seed: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    keep: tuple[Tensor, Tensor] | None = None,
    first_image: int | Tensor = 0,
    compile: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Sample the tokens of one image for each condition, without dropout, whatever mode the prior is in.

    The condition takes one pass; then every token takes one step. On a GPU the step is a CUDA graph, captured once per
    call, after which the host does not wait for the device. A token is a function of (seed, number of the image,
    position): images don't depend on their batch (but see `regvq_fast.priors.choosing` on rounding).

    Args:
        prior: on the device of the condition; computes in the type of its weights (`prior.bfloat16()`).
        condition: (B, h', w') or (B, K) int64.
        seed: an int, or a 0-dim int64 tensor on that device.
        temperature, top_k, top_p: as in `choose_tokens`.
        guidance: weight w of classifier-free guidance, logits = null + w * (conditional - null). 1: none; others double
            the work and need a prior trained with a null condition.
        keep: for editing: tokens, and a mask of those to keep, (B, h, w) or (B, L) int64 and bool. The others are
            sampled in order, each given all tokens before it.
        first_image: global number of the first image.
        compile: run the network's step by `torch.compile`, compiled once for calls with equal shapes. It does not help
            on a CPU, where the step then covers the whole cache.
        progress: called after each position with the positions done and in total.

    Returns:
        Tokens (B, h, w) int64.

    Raises:
        ValueError: a setting out of range, shapes that don't fit, or tensors on different devices.
        TypeError: a tensor of another type.
    """
    check_choice(temperature, top_k, top_p)
    check_guidance(guidance)
    device, (batch, length) = prior.pos_emb.device, (len(condition), prior.num_tokens)
    check_conditions(condition, device)
    given, kept = check_keep(keep, batch, prior, device)
    guided = guidance != 1.0
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    first_rows = (torch.arange(batch, device=device) + first_image) * length
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    index = torch.zeros((), dtype=torch.int64, device=device)  # of the last token
    decode = compiled(TokenTransformer.decode) if compile else TokenTransformer.decode

    def choose(logits: Tensor) -> None:
        """Choose the token at `index` and store it."""
        if guided:
            logits = guide(logits, guidance)
        rows = first_rows + index
        chosen = choose_tokens(logits, rows, seed, temperature=temperature, top_k=top_k, top_p=top_p).unsqueeze(1)
        position = index.view(1)
        if given is not None and kept is not None:
            chosen = torch.where(kept.index_select(1, position), given.index_select(1, position), chosen)
        tokens.index_copy_(1, position, chosen)

    def step(cache: KeyValueCache, reached: int | None) -> None:
        last = tokens.index_select(1, index.view(1)).squeeze(1)
        logits = decode(prior, last.repeat(2) if guided else last, index, cache, reached=reached)
        index.add_(1)
        choose(logits)

    with evaluating(prior):
        logits, cache = prior.prefill(prior.with_null(condition) if guided else condition)
        choose(logits)
        replay = None
        if device.type == "cuda" and length > 1:
            replay = capture(functools.partial(step, cache, None), index)
        for done in range(1, length):
            if progress is not None:
                progress(done, length)
            if replay is not None:
                replay()
            else:
                step(cache, None if compile else done)
    if progress is not None:
        progress(length, length)
    return tokens.view(batch, *prior.token_shape)
