"""Sampling of the diffusion steps for training."""

import torch
from torch import Tensor, nn

from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.ranks import sum_over_ranks

_WORDS = 2**32
_GOLDEN = 2654435769  # of 2^32: its multiples are spread evenly


class TimestepSampler(nn.Module):
    """Sampler of steps t with probability proportional to sqrt(E[L_t^2]), where L_t is the bound's term at t.

    Divided by the probability, the loss has the bound as its expectation, with minimal variance (Nichol and Dhariwal,
    2021; VQ-Diffusion). All steps have the same probability until each has been sampled `warm_up` times. The first step
    uses the second's history, as in VQ-Diffusion, since its term is a likelihood, not a divergence.

    Args:
        num_steps: T.
        warm_up: samples of each step before the history is used.
        decay: of the history, per sample.
        uniform: fraction of the probability that is spread equally over all steps, which bounds the loss's weights.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, num_steps: int, *, warm_up: int = 10, decay: float = 0.9, uniform: float = 0.001) -> None:
        super().__init__()
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps}")
        if not warm_up >= 0:
            raise ValueError(f"warm_up must not be negative, got {warm_up}")
        if not 0 < decay < 1 or not 0 < uniform <= 1:
            raise ValueError(f"decay must lie in (0, 1) and uniform in (0, 1], got {decay} and {uniform}")
        self.num_steps, self.warm_up, self.decay, self.uniform = num_steps, warm_up, decay, uniform
        self.register_buffer("history", torch.zeros(num_steps))  # exponential moving average of L_t^2, from 0
        self.register_buffer("count", torch.zeros(num_steps))

    history: Tensor
    count: Tensor

    def probabilities(self) -> Tensor:
        """Return the probabilities (T,) float32 of the steps 1 to T."""
        squares = self.history / (1 - self.decay**self.count).clamp(min=1 - self.decay)
        weights = torch.cat([squares[1:2], squares[1:]]).sqrt()
        fractions = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        known = (self.count >= self.warm_up).all() & (weights.sum() > 0)
        return (
            torch.where(known, (1 - self.uniform) * fractions, 1 - self.uniform)
            / torch.where(known, 1.0, self.num_steps)
            + self.uniform / self.num_steps
        )

    def sample(self, seed: Tensor, num_images: int, first_image: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Sample steps (B,) int64, 1 to T, with probabilities (B,), as a function of (seed, image number).

        The steps of consecutive images are spread over the distribution, so that a batch's loss varies less.
        """
        images = torch.arange(num_images, device=seed.device) + first_image
        probabilities = self.probabilities()
        levels = (probabilities.double() * _WORDS).long().cumsum(0)  # integers: the same sums in any order
        words = (row_words(seed, images.new_zeros(1), Stream.TIME_STEPS) + images * _GOLDEN) % _WORDS
        index = torch.searchsorted(levels, words, right=True).clamp(max=self.num_steps - 1)
        return index + 1, probabilities[index]

    @torch.no_grad()
    def update(self, t: Tensor, bound: Tensor) -> None:
        """Add the terms (B,) at the steps t (B,) of all ranks to the history."""
        sampled = t[:, None] == torch.arange(1, self.num_steps + 1, device=t.device)
        squares = sampled * bound.detach().float().square()[:, None]
        counts, sums = sum_over_ranks(torch.stack([sampled.float().sum(0), squares.sum(0)]))
        kept = self.decay**counts
        self.history.copy_(kept * self.history + (1 - kept) * sums / counts.clamp(min=1))
        self.count.add_(counts)
