"""Reg-VQ: regularized vector quantization (Zhang et al., CVPR 2023, section 3)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.losses.prior import PriorScope, posterior_groups, prior_kl, scoped_posterior
from regvq_fast.ops import assign_codes, vector_quantize
from regvq_fast.ops.vector_quantize import CodebookGrad
from regvq_fast.padding import Padding
from regvq_fast.quantizers.mask import MaskMode, stochastic_mask
from regvq_fast.quantizers.quantizer import (
    CodebookQuantizer,
    CodeMap,
    NearestCodes,
    QuantizerOutput,
    QuantizerSettings,
    sample_seed,
    wide,
)
from regvq_fast.quantizers.statistics import (
    FITTED_ROWS,
    MAX_LOG_SCALE,
    log_scale_that_perturbs,
    softmax_of_some_rows,
)
from regvq_fast.ranks import mean_over_ranks
from regvq_fast.settings import arg

LogitKind = Literal["cosine", "distance", "linear"]

_RATE = 0.1
"""Change of the log of the scale per step, divided by the previous step's error of the perturbed fraction."""
_JITTER = 0.1
"""Standard deviation per channel of the noise added to latents that become codes; the latents have 1."""
_SPREAD = 0.5
"""The same of the copies of a latent that becomes several codes."""


@dataclass(frozen=True)
class RegularizedSettings(QuantizerSettings):
    """Settings of Reg-VQ."""

    logits: LogitKind = "cosine"
    """Form of the logits (paper: linear)."""
    mask_ratio: float = 0.4
    """Fraction of stochastic positions."""
    perturbed: float = 0.6
    """Fraction of stochastic ones off their best code."""
    mask_mode: MaskMode = "exact"
    """Exact number per image, or independently."""
    tau: float = 0.9
    """Gumbel-softmax temperature."""
    prior_weight: Annotated[float, arg(name="kl-weight")] = 0.1
    """Weight of KL from the uniform prior."""
    prior_scope: Annotated[PriorScope, arg(name="kl-scope")] = "batch"
    """Images that share a posterior."""
    codebook_grad: CodebookGrad = "soft"
    """Gradient to the codes (paper: soft)."""

    def check(self) -> None:
        super().check()
        if not 0 < self.perturbed < 1:
            raise ValueError(f"perturbed must be above 0 and below 1, got {self.perturbed}")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if not self.tau > 0:
            raise ValueError(f"tau must be greater than 0, got {self.tau}")
        if not self.prior_weight >= 0:
            raise ValueError(f"prior_weight must not be negative, got {self.prior_weight}")

    def check_mask(self, positions: int) -> None:
        expected = self.mask_ratio * positions
        if expected == 0 or (self.mask_mode == "exact" and expected + 1e-9 < 1):  # which rounds down
            raise ValueError(f"--mask-ratio {self.mask_ratio:g} gives an image of {positions} tokens none: raise it")


class RegularizedQuantizer(CodebookQuantizer):
    """Stochastic-mask quantization with a straight-through softmax gradient and a prior-distribution regularizer.

    The effect of the noise depends on the scale of the logits, and the right scale depends on the size of the codebook
    and changes while the encoder learns. The scale is therefore a buffer, not a setting: a slow controller moves it in
    each training step, such that noise would give a fraction ``perturbed`` of the rows another code than their best
    one. A row sampled from ``p = softmax(s)`` takes another code with probability ``1 - max p``, which is measured on a
    few rows of each image, independent of the mask and the noise. All micro-batches of a step have the same seed and
    the same scale.

    - "cosine" (default): ``-scale |x - z|^2`` of latents and codes divided by their root mean square, so that each has
      length sqrt(D);
    - "linear": ``scale (x . w + b)`` of such latents, a predicted token distribution as in the paper; the codebook is
      divided likewise;
    - "distance": ``-scale |x - z|^2`` of latents and codes as they are.

    Call :meth:`initialize` once on a new model: it turns latents into codes. Without it, codes start in random
    directions, far from the latents.

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`RegularizedSettings`, and ``channels_last``.

    Raises:
        ValueError: a setting that is out of range, or an unknown choice.
    """

    Settings = RegularizedSettings
    settings: RegularizedSettings
    log_scale: Tensor
    error: Tensor
    micro_batches: Tensor
    last_seed: Tensor
    shift: Tensor
    gain: Tensor

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        logits = self.settings.logits
        # Uniform selection takes another code than the best one for 1 - 1 / N of the rows: no scale gives more.
        self._target = min(self.settings.perturbed, 0.95 * (1 - 1 / num_codes))
        if logits == "linear":
            self.proj = nn.Linear(code_dim, num_codes)
        self._set_codes(torch.randn(num_codes, code_dim))
        # Logits of a standard deviation of 4 over random codes, to start from.
        self.register_buffer("log_scale", torch.tensor(math.log(4 if logits == "linear" else 2 / math.sqrt(code_dim))))
        self.register_buffer("error", torch.zeros(()))  # of the step, the mean over its micro-batches so far
        self.register_buffer("micro_batches", torch.zeros(()), persistent=False)
        self.register_buffer("last_seed", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(code_dim))
        self.register_buffer("gain", torch.ones(code_dim))

    @torch.no_grad()
    def _set_codes(self, directions: Tensor) -> None:
        """Set the directions of codes (N, D), and with linear logits of their weights.

        Adam moves each channel of a code by the learning rate, whatever its length. Embeddings that are normalised
        before use have length 1, so that they turn sqrt(D) times as fast as with length sqrt(D).
        """
        directions = F.normalize(directions, dim=1)
        length = math.sqrt(self.code_dim) if self.settings.logits == "distance" else 1.0
        self.embedding.weight.copy_(length * directions)
        if self.settings.logits == "linear":  # the best code is the nearest one, until they have learned otherwise
            self.proj.weight.copy_(directions)
            self.proj.bias.zero_()

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Fit a new quantizer to latents of an encoder that is new itself.

        A fixed shift and gain give the channels mean 0 and variance 1. Codes become randomly chosen latents with a
        little noise (PyTorch's global generator of the CPU). If there are more codes than latents, copies of a latent
        are spread in the directions in which latents differ. The scale is set to perturb the target fraction.

        Raises:
            ValueError: a single position, which has no variance; otherwise as :meth:`forward`.
        """
        rows = self._wide_rows(z)
        if len(rows) < 2:
            raise ValueError(f"a single latent has no variance: give at least two, got latents {tuple(z.shape)}")
        std, mean = torch.std_mean(rows, dim=0)
        self.shift.copy_(mean)
        self.gain.copy_(1 / std.clamp(min=1e-6))
        rows = self._standardized(rows)
        # Half of the latents become codes, repeatedly if there are too few; the scale is fitted to the others.
        order = torch.randperm(len(rows)).to(rows.device)
        half, others = order[: len(rows) // 2], order[len(rows) // 2 :][:FITTED_ROWS]
        chosen = rows[half.repeat(-(-self.num_codes // len(half)))[: self.num_codes]]
        chosen = chosen + _JITTER * torch.randn(chosen.shape).to(rows)
        # Copies that start close together get the same gradients and stay together. Differences of latents spread them
        # in the directions that latents have.
        copies = chosen[len(half) :]
        first, second = rows[half[torch.randint(len(half), (2, len(copies))).to(half.device)]]
        copies += _SPREAD / math.sqrt(2) * (first - second)
        self._set_codes(chosen)
        self._fit_scale(rows[others])

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        """Start from codes (N, D) of a trained decoder; with "distance" codes and their selection stay the same.

        "cosine" and "linear" standardize codes and latents by the latents' mean and deviation in each channel and keep
        the codes' directions. All codes then have the mean length of the codes in use.
        """
        rows = self._wide_rows(z)
        some = rows[torch.randperm(len(rows)).to(rows.device)[:FITTED_ROWS]]
        if self.settings.logits == "distance":
            self.shift.zero_()
            self.gain.fill_(1)
            self.embedding.weight.copy_(codes)
            self._fit_scale(some)
            return None
        std, mean = torch.std_mean(rows, dim=0)
        self.shift.copy_(mean)
        self.gain.copy_(1 / std.clamp(min=1e-6))
        directions = (wide(codes) - mean) * wide(self.gain)
        lengths = directions[assign_codes(rows, wide(codes))].norm(dim=1)
        self._set_codes(directions)
        self._fit_scale(self._standardized(some))
        return CodeMap(lengths.mean() / math.sqrt(self.code_dim) / wide(self.gain), mean)

    def nearest_codes(self) -> NearestCodes | None:
        if self.settings.logits == "linear":
            return None
        return NearestCodes(self.codes().detach(), self.shift, self.gain)

    def _fit_scale(self, rows: Tensor) -> None:
        """Set the scale with which sampling perturbs the target fraction of rows (M, D), which are standardized."""

        def perturbed(log_scale: float) -> Tensor:
            self.log_scale.fill_(log_scale)
            return 1 - softmax_of_some_rows(rows, *self._linear_form())[1]

        self.log_scale.fill_(log_scale_that_perturbs(self._target, perturbed))

    def _standardized(self, rows: Tensor) -> Tensor:
        rows = (rows - wide(self.shift)) * wide(self.gain)
        return rows if self.settings.logits == "distance" else _root_mean_square_norm(rows)

    def codes(self) -> Tensor:
        codes = self.embedding.weight
        return codes if self.settings.logits == "distance" else _root_mean_square_norm(wide(codes))

    def _scale(self) -> Tensor:
        return wide(self.log_scale).exp()

    def _linear_form(self) -> tuple[Tensor, Tensor]:
        scale = self._scale()
        if self.settings.logits == "linear":
            return wide(self.proj.weight.detach()) * scale, wide(self.proj.bias.detach()) * scale
        codes = wide(self.codes().detach())
        return 2 * scale * codes, -scale * codes.square().sum(1)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding = self._padding(valid, z)
            rows = self._standardized(padding.clear(self._wide_rows(z)))
            batch, positions = z.shape[0], rows.shape[0] // z.shape[0]
            settings, mask, found = self.settings, None, {}
            if self.training:
                seed = sample_seed(z.device) if seed is None else seed
                found = self._control(rows.detach().unflatten(0, (batch, -1)), seed, padding)
                if settings.mask_ratio > 0:
                    mask = stochastic_mask(
                        batch,
                        positions,
                        settings.mask_ratio,
                        seed,
                        mode=settings.mask_mode,
                        row_offset=row_offset,
                        valid=padding.valid,
                    )
            linear, scale, dtype = settings.logits == "linear", self._scale(), self._score_dtype(z)
            # Ranks run this together in training only.
            scope = "batch" if settings.prior_scope == "global" and not self.training else settings.prior_scope
            groups = posterior_groups(scope, batch)
            out = vector_quantize(
                rows.to(dtype),
                wide(self.codes()).to(dtype),
                weight=self.proj.weight.to(dtype) if linear else None,
                bias=(wide(self.proj.bias) * scale).to(dtype) if linear else None,
                scale=scale,
                mask=mask,
                valid=padding.valid,
                seed=seed,
                row_offset=row_offset,
                tau=settings.tau,
                groups=groups,
                codebook_grad=settings.codebook_grad,
            )
            group_rows, empty = padding.groups(rows.shape[0], groups)
            posterior, group_rows = scoped_posterior(out.posterior, scope, group_rows)
            kl = prior_kl(posterior, group_rows, empty)
            if mask is None:
                mask = torch.zeros_like(out.indices, dtype=torch.bool)
            metrics = {"kl": kl.detach(), **found}
            if self.training:
                moved = (out.indices != out.best_indices).sum()
                metrics["perturbed"] = moved / mask.sum().clamp(min=1)
            return QuantizerOutput(
                self._from_rows(padding.clear(out.quantized), z),
                self._from_rows(padding.clear(out.indices, -1), z),
                settings.prior_weight * kl,
                metrics,
                self._from_rows(out.perturbation, z),
                self._from_rows(mask, z),
            )

    @torch.no_grad()
    def _control(self, rows: Tensor, seed: Tensor, padding: Padding) -> dict[str, Tensor]:
        """Move the scale by the error of the previous step if a new one begins; measure the softmax of these rows.

        Args:
            rows: (B, H*W, D) of this micro-batch.
            seed: of the step. Its last byte is kept, which 16-bit floats hold; if two successive seeds share it, the
                scale moves a step later.
            padding: of the rows. A micro-batch of padding only has no error to count.
        """
        byte = (seed & 0xFF).to(self.last_seed.dtype)
        is_new = byte != self.last_seed
        self.log_scale.add_(torch.where(is_new, _RATE * self.error, 0)).clamp_(-MAX_LOG_SCALE, MAX_LOG_SCALE)
        self.last_seed.copy_(byte)
        entropy, largest = softmax_of_some_rows(rows, *self._linear_form(), padding)
        error = 1 - mean_over_ranks(largest) - self._target
        counts = 1 if padding.valid is None else (padding.count > 0).to(error.dtype)
        before = torch.where(is_new, 0, self.error)
        self.micro_batches.copy_(torch.where(is_new, 0, self.micro_batches) + counts)
        self.error.copy_(before + counts * (error - before) / self.micro_batches.clamp(min=1))
        return {"entropy": entropy, "largest_p": largest, "logit_scale": self._scale()}

    def extra_repr(self) -> str:
        shown = ("logits", "perturbed", "mask_ratio", "tau", "prior_weight", "prior_scope")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self.settings, name)!r}" for name in shown)])


def _root_mean_square_norm(rows: Tensor) -> Tensor:
    """Return rows (M, D) divided by their root mean square, so that they have length sqrt(D)."""
    return math.sqrt(rows.shape[1]) * F.normalize(rows, dim=1)
