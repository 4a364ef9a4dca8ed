"""VQ-GAN: nearest code, straight-through identity, commitment (van den Oord et al., 2017; Esser et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ops import assign_codes
from regvq_fast.quantizers.quantizer import CodebookQuantizer, QuantizerOutput, straight_through, wide


class NearestQuantizer(CodebookQuantizer):
    """Nearest code of each position, with the identity as gradient to the encoder.

    ``loss = mean |sg(z) - q|^2 + commitment * mean |z - sg(q)|^2``, the codebook's only gradient being the first term
    (taming-transformers' ``VectorQuantizer2`` with ``legacy=False``). Codes start uniform in [-1/N, 1/N], as there.

    Args:
        num_codes: N.
        code_dim: D.
        commitment: weight of the second term.

    Raises:
        ValueError: a setting that is out of range.
    """

    def __init__(self, num_codes: int, code_dim: int, *, commitment: float = 0.25) -> None:
        super().__init__(num_codes, code_dim)
        if not commitment >= 0:
            raise ValueError(f"commitment must not be negative, got {commitment}")
        self.commitment = commitment
        torch.nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            rows, dtype = self._wide_rows(z), self._score_dtype(z)
            codebook = wide(self.embedding.weight)
            indices = assign_codes(rows.to(dtype), codebook.to(dtype))
            codes = F.embedding(indices, codebook)
            quantized = straight_through(rows, codes)
            commitment = F.mse_loss(rows, codes.detach())
            loss = F.mse_loss(codes, rows.detach()) + self.commitment * commitment
            return self._deterministic(z, quantized, indices, loss, {"commitment": commitment.detach()})
