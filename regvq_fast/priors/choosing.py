"""Choice of a token from logits: guidance, temperature, top-k, top-p, then Gumbel-argmax with counter-based noise.

The noise of a token is a function of (seed, row, code), as for the quantizers (`regvq_fast.ops.noise`). If a row is the
global number of a position among all images of a seed, a sample does not depend on batch size or devices, except for
rounding: the network's products round differently for other batch shapes, which can exchange two codes with nearly
equal scores.
"""

import math

import torch
from torch import Tensor

from regvq_fast.ops.noise import Stream, gumbel_noise, row_words

_UNIT = 2**32  # probability 1 as an integer: integer sums are exact in any order


def choose_tokens(
    logits: Tensor,
    rows: Tensor,
    seed: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Sample one token a row from softmax(logits / temperature), restricted to the most likely ones.

    Args:
        logits: (..., N), floating point; computed in fp32.
        rows: (...) int64 global row numbers; equal numbers get equal noise.
        seed: 0-dim int64 tensor on the device of the logits.
        temperature: at least 0; 0 takes the most likely code, with the smallest index in a tie.
        top_k, top_p: as in `restrict`, after the temperature.

    Returns:
        (...) int64. The host does not wait for the device, and all shapes are static.

    Raises:
        ValueError: a setting that is out of range.
    """
    check_choice(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = restrict(logits / temperature, top_k=top_k, top_p=top_p)
    noise = gumbel_noise(seed, rows.reshape(-1), logits.shape[-1])
    return (logits + noise.view(logits.shape)).argmax(-1)


def restrict(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return the logits of the most likely codes, and -inf for the others.

    Args:
        logits: (..., N) float32.
        top_k: number of codes to keep, smaller indices first in a tie; None: all.
        top_p: keep the fewest of these codes, most likely first, whose renormalized probabilities sum to at least this.

    Returns:
        (..., N) float32.

    Raises:
        ValueError: a setting that is out of range.
    """
    check_choice(top_k=top_k, top_p=top_p)
    if top_p == 1.0:
        top_p = None
    if top_k is not None and top_k >= logits.shape[-1]:
        top_k = None
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # stable: smaller indices first in a tie
    kept = torch.ones_like(order, dtype=torch.bool)
    if top_k is not None:
        kept[..., top_k:] = False
    if top_p is not None:
        mass = (ordered.masked_fill(~kept, -torch.inf).softmax(-1) * _UNIT).long()
        kept &= mass.cumsum(-1) - mass < top_p * _UNIT
    return logits.masked_fill(~torch.zeros_like(kept).scatter_(-1, order, kept), -torch.inf)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Return logits of classifier-free guidance, null + guidance * (conditional - null).

    Their softmax is proportional to p(conditional)^guidance p(null)^(1 - guidance).

    Args:
        logits: (2B, ..., N), the conditional ones of B images, then their null ones.
        guidance: 1 is conditional, 0 is null.

    Returns:
        (B, ..., N) float32.
    """
    conditional, null = logits.float().chunk(2)
    return null + guidance * (conditional - null)


def token_rows(tokens: Tensor, first_image: int | Tensor = 0) -> Tensor:
    """Return the global numbers (B, L) int64 of tokens: image * L + position."""
    batch, length = tokens.shape
    positions = torch.arange(batch * length, device=tokens.device).view(batch, length)
    return positions + first_image * length


def step_seeds(seed: Tensor, steps: int, *, each: int = 1) -> Tensor:
    """Return seeds (steps, each) of a sampler's steps, different for all steps and seeds."""
    words = row_words(seed, torch.arange(2 * each * steps, device=seed.device), Stream.SAMPLING_STEPS)
    words = words.view(steps, each, 2)
    return words[..., 0] | words[..., 1] << 32


def check_choice(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raise ValueError for a setting of `choose_tokens` out of range."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be a finite number of at least 0 (0: always the likeliest), got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all codes, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], or be None for all codes, got {top_p}")


def check_guidance(guidance: float) -> None:
    """Raise ValueError for a guidance weight that is negative or not finite."""
    if not math.isfinite(guidance) or guidance < 0.0:
        raise ValueError(f"guidance must be a finite number of at least 0 (1: none), got {guidance}")
