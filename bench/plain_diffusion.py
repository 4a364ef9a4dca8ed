"""VQ-Diffusion's loss and sampler in plain PyTorch, as its public code computes them, for comparison.

Distributions are (B, N + 1, L) tensors of log probabilities, of the tokens as well (one-hot, with log 1e-30 for 0), the
softmax runs in float64, posteriors come from sums of such tensors, and each step's draws are the argmax over all of
them plus Gumbel noise. The chain's probabilities are ours, in float32 tables over the steps -1 (a copy of step 0, the
image) to T - 1. Written from the equations and the order of operations of github.com/microsoft/VQ-Diffusion
(diffusion_transformer.py); its bookkeeping of accuracies, which waits for the device at each image, is left out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.priors.diffusion.loss import MaskAndReplace

_ZERO = 1e-30
_FLOOR = -70.0  # of log probabilities


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """`regvq_fast.models.attention.attention` with its matrix in memory."""
    assert not causal
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2)


class PlainDiffusion:
    """Loss and sampler of a chain."""

    def __init__(self, chain: MaskAndReplace, device: str | torch.device = "cpu") -> None:
        self.num_codes, self.num_steps = chain.num_codes, chain.num_steps
        steps = torch.arange(chain.num_steps + 1)
        self.cumulative = [value.log().float().to(device) for value in chain.cumulative(steps)]
        alpha, beta, gamma = chain.between(steps[:-1], steps[1:])
        self.single = [F.pad(value.log().float(), (1, 0)).to(device) for value in (alpha, beta, gamma)]
        self.mask_stays = [
            torch.log1p(-gamma.exp() + 1e-20).float().to(device) for gamma in (self.cumulative[2], self.single[2])
        ]

    def log_one_hot(self, tokens: Tensor) -> Tensor:
        """(B, L) to (B, N + 1, L)."""
        return F.one_hot(tokens, self.num_codes + 1).transpose(1, 2).float().clamp(min=_ZERO).log()

    def predict(self, logits: Tensor) -> Tensor:
        """Logits (B, L, N) to log p(x_0 | x_t), (B, N + 1, L)."""
        log_p = F.log_softmax(logits.transpose(1, 2).double(), dim=1).float()
        return torch.cat([log_p, torch.full_like(log_p[:, :1], _FLOOR)], dim=1).clamp(_FLOOR, 0.0)

    def _forward(self, log_x: Tensor, table: list[Tensor], stays: Tensor, t: Tensor) -> Tensor:
        alpha, beta, gamma = (values[t][:, None, None] for values in table)
        codes = torch.logaddexp(log_x[:, :-1] + alpha, beta)
        return torch.cat([codes, torch.logaddexp(log_x[:, -1:] + stays[t][:, None, None], gamma)], dim=1)

    def marginal(self, log_x: Tensor, t: Tensor) -> Tensor:
        """log q(x_t | x_0)."""
        return self._forward(log_x, self.cumulative, self.mask_stays[0], t)

    def posterior(self, log_start: Tensor, log_x: Tensor, t: Tensor) -> Tensor:
        """log p(x_t-1 | x_t), (B, N + 1, L), from log p(x_0 | x_t) and x_t."""
        masked = (log_x.argmax(1) == self.num_codes)[:, None]
        zeros = torch.full_like(log_start[:, :1], _ZERO).log()
        log_t = self.marginal(log_x, t)[:, :-1]
        log_t = torch.where(masked, self.cumulative[2][t][:, None, None].expand_as(log_t), log_t)
        step = torch.cat([self._forward(log_x, self.single, self.mask_stays[1], t)[:, :-1], zeros], dim=1)
        to_mask = torch.cat([self.single[2][t][:, None, None].expand_as(log_t), torch.zeros_like(zeros)], dim=1)
        step = torch.where(masked, to_mask, step)
        q = torch.cat([log_start[:, :-1] - log_t, zeros], dim=1)
        total = q.logsumexp(1, keepdim=True)
        return (self.marginal(q - total, t - 1) + step + total).clamp(_FLOOR, 0.0)

    def draw(self, log_probabilities: Tensor) -> Tensor:
        """(B, N + 1, L) to tokens (B, L)."""
        uniform = torch.rand_like(log_probabilities)
        return (log_probabilities - (-(uniform + _ZERO).log() + _ZERO).log()).argmax(1)

    def corrupt(self, tokens: Tensor, t: Tensor) -> Tensor:
        return self.draw(self.marginal(self.log_one_hot(tokens), t))

    def bound(self, logits: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The bound's terms and the auxiliary ones, (B,) each, in nats a token."""
        log_tokens, log_noisy, log_start = self.log_one_hot(tokens), self.log_one_hot(noisy), self.predict(logits)
        predicted = self.posterior(log_start, log_noisy, t)
        true = self.posterior(log_tokens, log_noisy, t)
        divergence = (true.exp() * (true - predicted)).sum(1)
        likelihood = -(log_tokens.exp() * predicted).sum(1)
        tokens_p = log_tokens[:, :-1]
        auxiliary = (tokens_p.exp() * (tokens_p - log_start[:, :-1])).sum(1)
        first = (t == 1)[:, None]
        terms = torch.where(first, likelihood, divergence), torch.where(first, likelihood, auxiliary)
        return terms[0].mean(1), terms[1].mean(1)

    def truncate(self, log_p: Tensor, share: float) -> Tensor:
        """The likeliest codes (B, N, L) that have the share of the probability, the floor for others."""
        ordered, order = log_p.sort(dim=1, descending=True)
        within = ordered.exp().cumsum(1) < share
        within = torch.cat([torch.ones_like(within[:, :1]), within[:, :-1]], dim=1)
        within = within.gather(1, order.argsort(1)).float()
        return within * log_p + (1 - within) * _FLOOR

    @torch.no_grad()
    def sample(
        self, network: Callable[..., Tensor], text: Tensor, null: Tensor, length: int, guidance: float, share: float
    ) -> Tensor:
        """Tokens (B, L), every step of the chain."""
        batch = len(text)
        tokens = torch.full((batch, length), self.num_codes, device=text.device)
        for step in range(self.num_steps, 0, -1):
            t = torch.full((batch,), step, device=text.device)
            log_start = self.predict(network(tokens, t, text))[:, :-1]
            if guidance != 1.0:
                log_null = self.predict(network(tokens, t, null))[:, :-1]
                log_start = log_null + guidance * (log_start - log_null)
                log_start = (log_start - log_start.logsumexp(1, keepdim=True)).clamp(_FLOOR, 0.0)
            log_start = self.truncate(log_start, share)
            log_start = torch.cat([log_start, torch.full_like(log_start[:, :1], _FLOOR)], dim=1)
            tokens = self.draw(self.posterior(log_start, self.log_one_hot(tokens), t))
        return tokens
