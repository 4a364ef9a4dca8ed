"""``VectorQuantizer`` of LlamaGen and TiTok (1d-tokenizer): nearest code, optionally of normalised rows and codes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter, to_rows, two_losses
from regvq_fast.quantizers.statistics import softmax_entropies

_ENTROPY_TEMPERATURE = 0.01  # default of LlamaGen's function, which its quantizer does not change


class LlamaGenQuantizer(Adapter):
    """``tokenizer.tokenizer_image.vq_model.VectorQuantizer`` with all options; entropies are computed in tiles."""

    embedding: nn.Embedding
    n_e: int
    beta: float
    entropy_loss_ratio: float
    l2_norm: bool
    show_usage: bool

    def forward(self, z: Tensor) -> tuple[Tensor, tuple, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> codes, losses, (None, None, indices (B * H * W,)).

        Losses are (codebook, commitment, entropy, fraction of codes in use); in evaluation (None, None, None, 0).
        """
        rows, codebook = to_rows(z), self.embedding.weight
        if self.l2_norm:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        indices = self._nearest_codes(rows.flatten(0, 2), codebook)
        codes = F.embedding(indices, codebook).view(rows.shape)
        losses: tuple = (None, None, None, 0)
        if self.training:
            usage = self._usage(indices) if self.show_usage else 0
            commitment, loss = two_losses(rows, codes)
            losses = (loss, self.beta * commitment, self._entropy_loss(rows.flatten(0, 2), codebook, loss), usage)
        quantized = rows + (codes - rows).detach()
        return quantized.permute(0, 3, 1, 2), losses, (None, None, indices)

    def _entropy_loss(self, rows: Tensor, codebook: Tensor, loss: Tensor) -> Tensor:
        """Return the ratio times (mean entropy of the rows' softmax - entropy of their mean softmax)."""
        if self.entropy_loss_ratio == 0:
            return 0 * loss  # has a gradient, as the library's
        with torch.autocast(rows.device.type, enabled=False):
            bias = -codebook.square().sum(1)
            entropy, mean_entropy = softmax_entropies(
                rows.to(codebook.dtype), 2 * codebook, bias, temperature=_ENTROPY_TEMPERATURE
            )
            return self.entropy_loss_ratio * (entropy - mean_entropy)

    @torch.no_grad()
    def _usage(self, indices: Tensor) -> float:
        """Add indices (M,) to the last 65536; return the fraction of codes among these. It synchronizes."""
        used = self.codebook_used
        assert isinstance(used, Tensor)
        used.copy_(torch.cat([used, indices.to(used.dtype)])[-len(used) :])
        return len(used.unique()) / self.n_e


class TiTokQuantizer(Adapter):
    """``modeling.quantizer.quantizer.VectorQuantizer`` of 1d-tokenizer, in fp32 under autocast, as the library."""

    embedding: nn.Embedding
    commitment_cost: float
    use_l2_norm: bool

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        if getattr(module, "clustering_vq", False):
            return "clustering_vq, the nearest row of every code, isn't covered"
        return None

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """z (B, D, H, W) -> codes and a dict of losses and ``min_encoding_indices`` (B, H, W)."""
        with torch.autocast(z.device.type, enabled=False):
            rows, codebook = to_rows(z.float()), self.embedding.weight
            if self.use_l2_norm:
                rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
            indices = self._nearest_codes(rows.flatten(0, 2), codebook)
            codes = F.embedding(indices, codebook).view(rows.shape)
            commitment, codebook_loss = two_losses(rows, codes)
            commitment = self.commitment_cost * commitment
            quantized = rows + (codes - rows).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), {
            "quantizer_loss": commitment + codebook_loss,
            "commitment_loss": commitment,
            "codebook_loss": codebook_loss,
            "min_encoding_indices": indices.view(rows.shape[:3]),
        }
