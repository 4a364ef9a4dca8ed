"""BSQ: binary spherical quantization (Zhao, Xiong, Krähenbühl, 2024)."""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from regvq_fast.quantizers.lfq import LFQQuantizer, LFQSettings
from regvq_fast.settings import arg


@dataclass(frozen=True)
class BSQSettings(LFQSettings):
    """Settings of BSQ; the defaults are those of the authors' ImageNet models at 128 px, without their ramp-up."""

    commitment: float = 0.0
    """Weight of the commitment loss."""
    temperature: float = 1.0
    """Temperature of their soft assignment."""
    group_bits: Annotated[int, arg(metavar="N")] = 9
    """Most bits that share one entropy of the mean."""


class BSQQuantizer(LFQQuantizer):
    """LFQ on the unit sphere: latents are divided by their length, and codes are -1 and 1 over sqrt(D).

    The gradient is the identity to the latents on the sphere. The entropy of the mean is a sum over groups of
    ``group_bits`` bits, as in the paper, whose factorized approximation is ``group_bits`` 1.

    Args:
        num_codes: N, a power of two.
        code_dim: D = log2(N).
        settings: fields of :class:`BSQSettings`, and ``channels_last``.

    Raises:
        ValueError: a size or a setting that is out of range.
    """

    Settings = BSQSettings
    settings: BSQSettings

    def _magnitude(self) -> float:
        return self.code_dim**-0.5

    def _bounded(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=1)
