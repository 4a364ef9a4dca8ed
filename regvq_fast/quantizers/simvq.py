"""SimVQ: a frozen random codebook times a learned linear layer (Zhu et al., 2024)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.quantizers.nearest import NearestQuantizer, NearestSettings
from regvq_fast.quantizers.quantizer import CodeMap, wide


@dataclass(frozen=True)
class SimVQSettings(NearestSettings):
    """Settings of SimVQ."""

    rotation_trick: bool = True
    """Rotate and scale the gradient from code to latent."""


class SimVQQuantizer(NearestQuantizer):
    """Nearest of the codes ``embedding proj^T``: one linear layer moves all codes, selected or not.

    Loss and gradients are those of :class:`NearestQuantizer`, but only the layer learns: ``embedding`` keeps its first
    values, normal with variance 1/D (vector-quantize-pytorch's ``SimVQ``, with its default settings).

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`SimVQSettings`, and ``channels_last``.

    Raises:
        ValueError: a setting that is out of range.
    """

    Settings = SimVQSettings

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        nn.init.normal_(self.embedding.weight, std=code_dim**-0.5)
        self.embedding.weight.requires_grad_(False)
        self.proj = nn.Linear(code_dim, code_dim, bias=False)

    def codes(self) -> Tensor:
        with torch.autocast(self.embedding.weight.device.type, enabled=False):
            return F.linear(wide(self.embedding.weight), wide(self.proj.weight))

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        """Start from codes (N, D) as ``embedding``, with the identity as the layer."""
        nn.init.eye_(self.proj.weight)
        return super().adopt(codes, z)
