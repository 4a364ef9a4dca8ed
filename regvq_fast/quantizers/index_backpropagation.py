"""IBQ: index backpropagation, a straight-through gradient of the softmax over all codes (Shi et al., 2024)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ops import assign_codes, vector_quantize
from regvq_fast.quantizers.quantizer import (
    CodebookQuantizer,
    CodeMap,
    NearestCodes,
    QuantizerOutput,
    QuantizerSettings,
    wide,
)
from regvq_fast.quantizers.statistics import softmax_entropies
from regvq_fast.settings import check_at_least


@dataclass(frozen=True)
class IBQSettings(QuantizerSettings):
    """Settings of IBQ."""

    codebook_weight: float = 0.25
    """Weight of the loss that moves codes to latents."""
    entropy_weight: float = 0.05
    """Weight of the entropy terms; 0 skips them."""
    entropy_temperature: float = 0.01
    """Temperature of their softmax."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"codebook_weight": self.codebook_weight, "entropy_weight": self.entropy_weight})
        if not self.entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be greater than 0, got {self.entropy_temperature}")


class IBQQuantizer(CodebookQuantizer):
    """Code of the largest product with the latent; the gradient is that of the softmax of all products.

    ``loss = mean |z - q|^2 + mean |z - sg(q)|^2 + codebook_weight * mean |sg(z) - q|^2 + entropy_weight * (H - H')``.
    In the first term q has the softmax's gradient, so that every code learns; in the third that of the look-up. H is
    the mean entropy of a position's softmax at ``entropy_temperature``, H' the entropy of their mean, both in training
    only. Terms and weights are those of SEED-Voken's ``IndexPropagationQuantize`` and its configurations. No M x N
    matrix is kept.

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`IBQSettings`, and ``channels_last``.

    Raises:
        ValueError: a setting that is out of range.
    """

    Settings = IBQSettings
    settings: IBQSettings

    def nearest_codes(self) -> NearestCodes | None:
        return None

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        """Start from codes (N, D) rescaled to one length, with which the largest product is that of the nearest code.

        The length is the mean over the codes nearest to the latents.
        """
        codes = wide(codes)
        length = codes[assign_codes(self._wide_rows(z), codes)].norm(dim=1).mean()
        self.embedding.weight.copy_(length * F.normalize(codes, dim=1))
        return None

    def _linear_form(self) -> tuple[Tensor, Tensor]:
        codes = wide(self.codes().detach())
        return codes, torch.zeros_like(codes[:, 0])

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            settings, padding, dtype = self.settings, self._padding(valid, z), self._score_dtype(z)
            rows = padding.clear(self._wide_rows(z))
            codebook = wide(self.embedding.weight)
            narrow = codebook.to(dtype)
            out = vector_quantize(rows.to(dtype), narrow, weight=narrow, codebook_grad="hard")
            quantized, codes = out.quantized.to(rows.dtype), F.embedding(out.indices, codebook)
            commitment = padding.mean_squared_error(rows, codes.detach())
            loss = padding.mean_squared_error(quantized, rows) + commitment
            loss = loss + settings.codebook_weight * padding.mean_squared_error(codes, rows.detach())
            metrics = {"commitment": commitment.detach()}
            if self.training and settings.entropy_weight > 0:
                entropy, of_mean = softmax_entropies(
                    rows, codebook, temperature=settings.entropy_temperature, padding=padding
                )
                loss = loss + settings.entropy_weight * (entropy - of_mean)
                metrics |= {"entropy": entropy.detach(), "entropy_of_mean": of_mean.detach()}
            return self._deterministic(z, quantized, out.indices, loss, metrics, padding)
