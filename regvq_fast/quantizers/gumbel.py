"""Gumbel-VQ: every position is sampled (Jang et al., 2017; Ramesh et al., 2021; taming's ``GumbelQuantize``)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.ops import softmax_statistics, vector_quantize
from regvq_fast.quantizers.quantizer import (
    CodebookQuantizer,
    CodeMap,
    NearestCodes,
    QuantizerOutput,
    QuantizerSettings,
    random_rows,
    sample_seed,
    wide,
)
from regvq_fast.quantizers.statistics import FITTED_ROWS, log_scale_that_perturbs, softmax_of_some_rows
from regvq_fast.settings import check_at_least

_FIRST_PERTURBED = 0.24
"""Fraction of positions that noise moves to another code when codes are adopted; the same as reg-vq's by default."""


@dataclass(frozen=True)
class GumbelSettings(QuantizerSettings):
    """Settings of Gumbel-VQ."""

    tau_start: float = 1.0
    """Temperature at the start."""
    tau_end: float = 0.0625
    """Temperature at the end."""
    kl_weight: float = 5e-4
    """Weight of KL from the uniform prior."""

    def check(self) -> None:
        super().check()
        if not (self.tau_start > 0 and self.tau_end > 0):
            raise ValueError(f"tau_start and tau_end must be greater than 0, got {self.tau_start} and {self.tau_end}")
        check_at_least(0, {"kl_weight": self.kl_weight})


class GumbelQuantizer(CodebookQuantizer):
    """Hard straight-through Gumbel-softmax over predicted token distributions, at an annealed temperature.

    The loss is ``kl_weight`` (0 skips it) times the KL divergence of each position's softmax from the uniform
    distribution, computed in tiles of rows.

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`GumbelSettings`, and ``channels_last``; the temperature changes exponentially.

    Raises:
        ValueError: a setting that is out of range.
    """

    Settings = GumbelSettings
    settings: GumbelSettings
    scheduled = ("gumbel-vq's tau",)
    tau: Tensor

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        self.proj = nn.Linear(code_dim, num_codes)
        self.register_buffer("tau", torch.tensor(float(self.settings.tau_start)))

    def nearest_codes(self) -> NearestCodes | None:
        return None

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        super().adopt(codes, z)
        rows, codes = self._wide_rows(z), wide(codes)
        some = random_rows(rows, min(FITTED_ROWS, len(rows)))
        weight, bias = 2 * codes, -codes.square().sum(1)  # logits of the squared distance

        def perturbed(log_scale: float) -> Tensor:
            return 1 - softmax_of_some_rows(some, math.exp(log_scale) * weight, math.exp(log_scale) * bias)[1]

        scale = math.exp(log_scale_that_perturbs(_FIRST_PERTURBED, perturbed))
        self.proj.weight.copy_(scale * weight)
        self.proj.bias.copy_(scale * bias)
        return None

    def set_progress(self, fraction: float) -> None:
        # A tensor: a new value does not recompile a compiled step.
        start, end = self.settings.tau_start, self.settings.tau_end
        self.tau.fill_(start * (end / start) ** fraction)

    def _linear_form(self) -> tuple[Tensor, Tensor]:
        return wide(self.proj.weight.detach()), wide(self.proj.bias.detach())

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding, dtype = self._padding(valid, z), self._score_dtype(z)
            rows = padding.clear(self._wide_rows(z))
            weight, bias = wide(self.proj.weight), wide(self.proj.bias)
            mask = padding.clear(torch.full(rows.shape[:1], self.training, dtype=torch.bool, device=z.device))
            if self.training and seed is None:
                seed = sample_seed(z.device)
            out = vector_quantize(
                rows.to(dtype),
                self.embedding.weight.to(dtype),
                weight=weight.to(dtype),
                bias=bias.to(dtype),
                mask=mask if self.training else None,
                seed=seed,
                row_offset=row_offset,
                tau=self.tau,
                codebook_grad="hard",
            )
            loss, metrics = rows.new_zeros(()), {"tau": self.tau.clone()}
            if self.settings.kl_weight > 0:
                entropy, _ = softmax_statistics(rows, weight, bias, valid=padding.valid)
                kl = padding.mean_of_ranks(math.log(self.num_codes) - entropy)
                loss, metrics["kl"] = self.settings.kl_weight * kl, kl.detach()
            if self.training:
                some = rows.detach().unflatten(0, (z.shape[0], -1))
                metrics["entropy"], metrics["largest_p"] = softmax_of_some_rows(
                    some, weight.detach(), bias.detach(), padding
                )
                metrics["perturbed"] = padding.mean((out.indices != out.best_indices).float())
            return QuantizerOutput(
                self._from_rows(padding.clear(out.quantized), z),
                self._from_rows(padding.clear(out.indices, -1), z),
                loss,
                metrics,
                self._from_rows(out.perturbation, z),
                self._from_rows(mask, z),
            )
