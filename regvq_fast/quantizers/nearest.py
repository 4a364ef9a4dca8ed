"""VQ-GAN: nearest code, straight-through identity, commitment (van den Oord et al., 2017; Esser et al., 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ops import assign_codes
from regvq_fast.quantizers.quantizer import (
    CodebookQuantizer,
    QuantizerOutput,
    QuantizerSettings,
    straight_through,
    wide,
)
from regvq_fast.settings import check_at_least


@dataclass(frozen=True)
class CommitmentSettings(QuantizerSettings):
    """Settings of quantizers that pull latents to their codes."""

    commitment: float = 0.25
    """Weight of the commitment loss."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"commitment": self.commitment})


@dataclass(frozen=True)
class NearestSettings(CommitmentSettings):
    """Settings of quantizers that select the nearest code."""

    rotation_trick: bool = False
    """Rotate and scale the gradient from code to latent."""


class NearestQuantizer(CodebookQuantizer):
    """Nearest code of each position, with the identity as gradient to the encoder, or with the rotation trick.

    ``loss = mean |sg(z) - q|^2 + commitment * mean |z - sg(q)|^2``; only the first term has a gradient to the codebook
    (taming-transformers' ``VectorQuantizer2`` with ``legacy=False``). Codes start uniform in [-1/N, 1/N], as there.

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`NearestSettings`, and ``channels_last``. With ``rotation_trick`` the gradient to the
            encoder is that of the rotation and scaling of its output to the code (Fifty et al., 2024).

    Raises:
        ValueError: a setting that is out of range.
    """

    Settings = NearestSettings
    settings: NearestSettings

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        torch.nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding, dtype = self._padding(valid, z), self._score_dtype(z)
            rows = padding.clear(self._wide_rows(z))
            codebook = wide(self.codes())
            indices = assign_codes(rows.to(dtype), codebook.to(dtype))
            codes = F.embedding(indices, codebook)
            quantized = straight_through(rows, codes, rotation_trick=self.settings.rotation_trick)
            commitment = padding.mean_squared_error(rows, codes.detach())
            loss = padding.mean_squared_error(codes, rows.detach()) + self.settings.commitment * commitment
            return self._deterministic(z, quantized, indices, loss, {"commitment": commitment.detach()}, padding)
