"""Discrete diffusion by masking and replacing tokens: the chain, its posterior, and the variational bound.

Gu et al., "Vector Quantized Diffusion Model for Text-to-Image Synthesis", CVPR 2022 (VQ-Diffusion). Tokens are N codes
and one more, N, the mask. Steps are numbered as in the paper: x_0 is the image, x_T (almost) all mask.

The chain. From x_s to a later x_t a code stays with probability a + b, becomes any other code with b each, the mask
with g; the mask stays. Then a + N b + g = 1, and with cumulative A_t, B_t, G_t (of s = 0; A_0 = 1, B_0 = G_0 = 0)

    a = A_t / A_s        1 - g = (1 - G_t) / (1 - G_s)        q(x_t = k | x_0 = y) = A_t [k = y] + B_t,  G_t for k = N

The posterior q(x_s | x_t, x_0 = y) is q(x_t | x_s) q(x_s | y) / q(x_t | y):

    x_t = N:  k = N: G_s / G_t          code k: g (A_s [k = y] + B_s) / G_t
    x_t = c:  k = N: 0                  code k: (a [k = c] + b) (A_s [k = y] + B_s) / (A_t [c = y] + B_t)

The network gives p(x_0 | x_t) = softmax(z), and p(x_s | x_t) is the mean of the posterior over it. Where x_t = c that
takes p_k / (A_t [c = k] + B_t), whose logits differ from z at one position. So let z' be z with log K, K = B_t / (A_t +
B_t), added at c (nothing is added where x_t = N), W = sum exp z' / sum exp z, p' = softmax(z'), r = A_s / B_s; then

    p(x_s = k | x_t) = F_k W B_s (1 + r p'_k)        F_k = g / G_t,  or  (a [k = c] + b) / B_t
    q(x_s = k | ...) = F_k V B_s (1 + r [k = y])     V = K where c = y, else 1

for codes k; the mask has the same probability in both. F_k and B_s cancel in the ratio, and with Q the mass that q
gives to codes, q_y, q_c and q_o that of y, of c != y and of any other code, and l_k = log(1 + r p'_k),

    KL(q || p) = Q (log V - log W) + q_y (log(1 + r) - l_y) - q_c l_c - q_o (sum_k l_k - l_y - l_c)

without l_c and q_c where x_t = N or c = y. Of size N are therefore the two sums over k alone, of exp z' and of l_k,
and their gradient: three passes over the logits, which `torch.compile` fuses, and nothing but the gradient is stored.
At s = 0 the posterior is p itself, and the bound's term -log p(y).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.priors.choosing import token_rows

_WORDS = 2**32
_SOFTPLUS_THRESHOLD = 40.0  # beyond it softplus(x) is x to fp64's last bit


@dataclass(frozen=True)
class MaskAndReplace:
    """The chain: cumulative probabilities that a code stays or is masked, linear in t as in VQ-Diffusion.

    Probabilities are computed from t, one number per image, in fp64; there is no table.

    Args:
        num_codes: N.
        num_steps: T.
        alpha_bar: A at the steps 1 and T.
        gamma_bar: G at the steps 1 and T.

    Raises:
        ValueError: too few codes or steps, or invalid probabilities.
    """

    num_codes: int
    num_steps: int = 100
    alpha_bar: tuple[float, float] = (0.99999, 0.000009)
    gamma_bar: tuple[float, float] = (0.000009, 0.99999)

    def __post_init__(self) -> None:
        for name, size in {"num_codes": self.num_codes, "num_steps": self.num_steps}.items():
            if size < 2:
                raise ValueError(f"{name} must be at least 2, got {size}")
        alphas, gammas = self.alpha_bar, self.gamma_bar
        if not 1 > alphas[0] > alphas[1] > 0 or not 0 < gammas[0] < gammas[1] < 1:
            raise ValueError(
                f"alpha_bar must fall and gamma_bar rise, both in (0, 1), got alpha_bar {alphas}, gamma_bar {gammas}"
            )
        replaced = [1 - alpha - gamma for alpha, gamma in zip(alphas, gammas, strict=True)]
        # Both are linear: the fraction of replaced among unmasked codes rises everywhere if it rises from end to end.
        if min(replaced) <= 0 or replaced[1] / alphas[1] < replaced[0] / alphas[0]:
            raise ValueError(
                "alpha_bar + gamma_bar must stay below 1, and the fraction of replaced codes must not fall, got "
                f"alpha_bar {alphas}, gamma_bar {gammas}"
            )

    def cumulative(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A_t, B_t and G_t, float64, at the int64 steps t, 0 to T."""
        fraction = (t.double() - 1) / (self.num_steps - 1)
        first = t == 0
        alpha = torch.where(first, 1.0, torch.lerp(*self._ends(self.alpha_bar, fraction)))
        gamma = torch.where(first, 0.0, torch.lerp(*self._ends(self.gamma_bar, fraction)))
        replaced = tuple(1 - a - g for a, g in zip(self.alpha_bar, self.gamma_bar, strict=True))
        beta = torch.where(first, 0.0, torch.lerp(*self._ends(replaced, fraction))) / self.num_codes
        return alpha, beta, gamma

    @staticmethod
    def _ends(ends: tuple[float, ...], fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, last = (torch.full_like(fraction, end) for end in ends)
        return first, last, fraction

    def between(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a, b and g of q(x_t | x_s), float64, for steps 0 <= s < t <= T; computed without cancellation."""
        alpha_s, beta_s, gamma_s = self.cumulative(s)
        alpha_t, beta_t, gamma_t = self.cumulative(t)
        alpha = alpha_t / alpha_s
        beta = (beta_t * alpha_s - alpha_t * beta_s) / (alpha_s * (alpha_s + self.num_codes * beta_s))
        return alpha, beta, (gamma_t - gamma_s) / (1 - gamma_s)

    def corrupt(self, tokens: Tensor, t: Tensor, seed: Tensor, first_image: int | Tensor = 0) -> Tensor:
        """Sample x_t from q(x_t | x_0).

        Args:
            tokens: x_0 (B, L) int64, codes.
            t: (B,) int64, 1 to T.
            seed: 0-dim int64 tensor.
            first_image: global number of the first image; a token is a function of (seed, image number, position).

        Returns:
            (B, L) int64, codes or the mask N.
        """
        rows = token_rows(tokens, first_image)
        _, beta, gamma = (value[:, None] for value in self.cumulative(t))
        choice, code = (row_words(seed, rows, Stream.CORRUPTION + i) for i in range(2))
        noisy = torch.where(choice < (gamma + self.num_codes * beta) * _WORDS, self._code(code), tokens)
        return torch.where(choice < gamma * _WORDS, self.num_codes, noisy)

    def sample_posterior(
        self, tokens: Tensor, noisy: Tensor, s: Tensor, t: Tensor, seed: Tensor, first_image: int | Tensor = 0
    ) -> Tensor:
        """Sample x_s from q(x_s | x_t, x_0).

        With x_0 from p(x_0 | x_t), this samples from p(x_s | x_t) with a few numbers per token instead of N.

        Args:
            tokens: x_0 (B, L) int64, codes.
            noisy: x_t (B, L) int64.
            s, t: (B,) or 0-dim int64 steps, 0 <= s < t <= T.
            seed, first_image: as in `corrupt`.

        Returns:
            (B, L) int64.
        """
        rows = token_rows(tokens, first_image)
        alpha_s, beta_s, gamma_s = (value.view(-1, 1) for value in self.cumulative(s))
        alpha, beta, gamma = (value.view(-1, 1) for value in self.between(s, t))
        masked, same = noisy == self.num_codes, noisy == tokens
        # (a [k = c] + b) (A_s [k = y] + B_s) is a sum of masses for y, for c, and for all codes.
        to_mask = torch.where(masked, gamma_s, 0.0)
        to_token = torch.where(masked, gamma * alpha_s, (beta + alpha * same) * alpha_s)
        to_noisy = torch.where(masked, 0.0, alpha * beta_s)
        to_any = torch.where(masked, gamma, beta) * self.num_codes * beta_s
        choice, code = (row_words(seed, rows, Stream.POSTERIOR + i) for i in range(2))
        # In fp64: in fp32 the largest words would round to the whole mass, and sample any code even if `to_any` is 0.
        level = (choice.double() + 0.5) / _WORDS * (to_mask + to_token + to_noisy + to_any)
        sampled = torch.where(level < to_mask + to_token + to_noisy, noisy, self._code(code))
        sampled = torch.where(level < to_mask + to_token, tokens, sampled)
        return torch.where(level < to_mask, self.num_codes, sampled)

    def log_posterior(self, logits: Tensor, noisy: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return log p(x_s | x_t), the mean of q(x_s | x_t, x_0) over p(x_0 | x_t) = softmax(logits).

        Args:
            logits: (B, L, N); -inf is allowed.
            noisy: x_t (B, L) int64.
            s, t: (B,) or 0-dim int64 steps, 0 <= s < t <= T.

        Returns:
            (B, L, N + 1), at least fp32, with the mask last.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        alpha_s, beta_s, gamma_s = (value.view(-1, 1) for value in self.cumulative(s))
        alpha_t, beta_t, gamma_t = (value.view(-1, 1) for value in self.cumulative(t))
        alpha, beta, gamma = (value.view(-1, 1) for value in self.between(s, t))
        masked = noisy == self.num_codes
        tilt = torch.where(masked, 0.0, (beta_t / (alpha_t + beta_t)).log()).to(logits.dtype)
        tilted = _tilted(logits, noisy, tilt)
        # W p'_k = exp z'_k / sum exp z; W alone appears only in the term with B_s.
        log_sum = logits.logsumexp(-1)
        log_w = (tilted.logsumexp(-1) - log_sum)[..., None]
        mixed = torch.logaddexp(
            tilted - log_sum[..., None] + alpha_s.log().to(logits.dtype)[..., None],
            log_w + beta_s.log().to(logits.dtype)[..., None],
        )
        factor = torch.where(masked, (gamma / gamma_t).log(), (beta / beta_t).log()).to(logits.dtype)
        stays = ((alpha + beta) / beta).log().to(logits.dtype).expand_as(noisy)
        codes = _tilted(mixed + factor[..., None], noisy, stays)
        mask = torch.where(masked, (gamma_s / gamma_t).log(), -torch.inf).to(logits.dtype)
        return torch.cat([codes, mask[..., None]], dim=-1)

    def terminal_kl(self) -> float:
        """Return KL(q(x_T | x_0) || p(x_T)) in nats a token; p(x_T) masks with probability G_T, else is uniform."""
        alpha, beta, gamma = (value.item() for value in self.cumulative(torch.tensor(self.num_steps)))
        uniform = torch.tensor((1 - gamma) / self.num_codes, dtype=torch.float64)
        masses = torch.tensor([alpha + beta, beta], dtype=torch.float64)
        counts = torch.tensor([1, self.num_codes - 1])
        return (counts * masses * (masses / uniform).log()).sum().item()

    def _code(self, words: Tensor) -> Tensor:
        """Return uniform codes from uniform words."""
        return words * self.num_codes >> 32


class DiffusionTerms(NamedTuple):
    """Terms of the loss of an image at its step t, in nats a token."""

    bound: Tensor
    """(B,) KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)); for t = 1, -log p(x_0 | x_1)."""
    cross_entropy: Tensor
    """(B,) -log p(x_0 | x_t)."""

    def loss(self, t: Tensor, probability: Tensor, num_steps: int, auxiliary_weight: float = 5e-4) -> Tensor:
        """Return the bound, estimated from one step per image, plus the auxiliary term: 0-dim float32 with gradient.

        Args:
            t: (B,) int64.
            probability: (B,) with which t was sampled.
            num_steps: T.
            auxiliary_weight: of the cross-entropy; doubled at the first step, falling linearly to this value at the
                last, as in VQ-Diffusion's configurations for text.
        """
        weight = auxiliary_weight * (2 - (t - 1) / num_steps)
        return ((self.bound + weight * self.cross_entropy) / probability).mean()


def diffusion_terms(
    transition: MaskAndReplace, logits: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor
) -> DiffusionTerms:
    """Return the terms of the variational bound at the steps t (see the module's docstring).

    Computed in fp32, or fp64 for fp64 logits. Memory beyond the logits and their gradient is O(B L) if compiled, and a
    few temporary copies of the logits otherwise. Deterministic. Double backward is not supported.

    Args:
        transition: the chain.
        logits: (B, L, N), of p(x_0 | x_t); they get the gradient.
        tokens: x_0 (B, L) int64.
        noisy: x_t (B, L) int64; the mask is N.
        t: (B,) int64, 1 to T.

    Raises:
        ValueError: shapes that don't fit.
    """
    batch, length = tokens.shape
    if logits.shape != (batch, length, transition.num_codes) or noisy.shape != tokens.shape or t.shape != (batch,):
        raise ValueError(
            f"logits (B, L, {transition.num_codes}), tokens (B, L), noisy (B, L) and t (B,) don't fit: "
            f"{tuple(logits.shape)}, {tuple(tokens.shape)}, {tuple(noisy.shape)}, {tuple(t.shape)}"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    s = t - 1
    alpha_s, beta_s, gamma_s = (value[:, None] for value in transition.cumulative(s))
    alpha_t, beta_t, gamma_t = (value[:, None] for value in transition.cumulative(t))
    alpha, beta, gamma = (value[:, None] for value in transition.between(s, t))
    masked, same = noisy == transition.num_codes, noisy == tokens
    other = ~(masked | same)  # x_t is a code that replaced the token

    tilt = beta_t / (alpha_t + beta_t)  # K
    evidence = torch.where(masked, gamma_t, torch.where(same, alpha_t + beta_t, beta_t))  # q(x_t | x_0)
    reach = torch.where(masked, gamma, beta)  # q(x_t | x_s = k), k not x_t
    q_codes = torch.where(masked, gamma * (1 - gamma_s) / gamma_t, 1.0).to(dtype)
    q_token = ((reach + alpha * same) * (alpha_s + beta_s) / evidence).to(dtype)
    q_noisy = torch.where(other, (alpha + beta) * beta_s / evidence, 0.0).to(dtype)
    q_other = (reach * beta_s / evidence).to(dtype)
    log_tilt = torch.where(masked, 0.0, tilt.log()).to(dtype)
    log_v = torch.where(same, tilt.log(), 0.0).to(dtype)
    log_r = torch.where(s[:, None] == 0, 0.0, (alpha_s / beta_s).log()).to(dtype)  # not used for s = 0

    log_sum, soft_sum, at_token, at_noisy = _token_sums(logits, tokens, noisy, log_tilt, log_r.expand_as(log_tilt))
    rest = torch.where(masked, -torch.inf, torch.log1p(-tilt)).to(dtype)
    whole_sum = torch.logaddexp(log_sum, at_noisy + rest)  # log sum exp z
    l_token = _softplus(at_token + torch.where(same, log_tilt, 0.0) - log_sum + log_r)
    l_noisy = torch.where(other, _softplus(at_noisy + log_tilt - log_sum + log_r), 0.0)
    divergence = (
        q_codes * (log_v - log_sum + whole_sum)
        + q_token * (_softplus(log_r) - l_token)
        - q_noisy * l_noisy
        - q_other * (soft_sum - l_token - l_noisy)
    )
    cross_entropy = whole_sum - at_token
    bound = torch.where(s[:, None] == 0, cross_entropy, divergence)
    return DiffusionTerms(bound.mean(1), cross_entropy.mean(1))


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)


def _tilted(logits: Tensor, noisy: Tensor, tilt: Tensor) -> Tensor:
    """Return logits (B, L, N) with tilt (B, L) added at the codes of noisy (B, L), unless these are the mask."""
    codes = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(codes == noisy[..., None], logits + tilt[..., None], logits)


def _token_sums(logits: Tensor, tokens: Tensor, noisy: Tensor, tilt: Tensor, log_r: Tensor) -> tuple[Tensor, ...]:
    return _TokenSums.apply(logits, tokens, noisy, tilt, log_r)


class _TokenSums(torch.autograd.Function):
    """Sums of each token's logits z: log sum exp z', sum softplus(log p' + log r), z at the token, z at x_t, (B, L).

    It has its own backward pass, so that autograd saves nothing of the size of the logits except the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, noisy: Tensor, tilt: Tensor, log_r: Tensor
    ) -> tuple[Tensor, ...]:
        tilted = _tilted(logits.to(tilt.dtype), noisy, tilt)
        log_sum = tilted.logsumexp(-1)
        soft_sum = _softplus(tilted.add_((log_r - log_sum)[..., None])).sum(-1)
        in_place = noisy.clamp(max=logits.shape[-1] - 1)
        ctx.save_for_backward(logits, tokens, noisy, tilt, log_r, log_sum)
        at_token, at_noisy = (logits.gather(-1, at[..., None])[..., 0].to(tilt.dtype) for at in (tokens, in_place))
        return log_sum, soft_sum, at_token, at_noisy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, noisy, tilt, log_r, log_sum = ctx.saved_tensors
        of_log_sum, of_soft_sum, at_token, at_noisy = gradients
        tilted = _tilted(logits.to(tilt.dtype), noisy, tilt)
        slope = torch.sigmoid(tilted + (log_r - log_sum)[..., None])
        of_log_sum = of_log_sum - of_soft_sum * slope.sum(-1)
        probabilities = tilted.sub_(log_sum[..., None]).exp_()  # p'
        gradient = slope.mul_(of_soft_sum[..., None]).add_(probabilities.mul_(of_log_sum[..., None]))
        gradient = _tilted(_tilted(gradient, tokens, at_token), noisy, at_noisy)
        return gradient.to(logits.dtype), None, None, None, None
