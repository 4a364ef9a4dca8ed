"""Audio codecs: the codebooks of EnCodec and DAC, in the original packages and in transformers.

Residual quantizers, projections, losses and k-means remain the library's code.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter
from regvq_fast.ops import segment_sum
from regvq_fast.ops.segment_sum import segment_counts


class TransformersCodebook(Adapter):
    """``EncodecEuclideanCodebook`` of transformers, which only encodes and decodes."""

    methods: ClassVar[tuple[str, ...]] = ("quantize",)
    embed: Tensor  # [N, D]

    @torch.no_grad()
    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Rows (M, D) -> indices (M,)."""
        return self._nearest_codes(hidden_states, self.embed)


class EnCodecCodebook(Adapter):
    """``encodec.quantization.core_vq.EuclideanCodebook``; initialization and dead codes are the library's code."""

    methods: ClassVar[tuple[str, ...]] = ("forward", "quantize")
    codebook_size: int
    decay: float
    epsilon: float
    embed: Tensor  # [N, D]
    embed_avg: Tensor  # [N, D]
    cluster_size: Tensor  # [N]
    init_embed_: Callable[[Tensor], None]
    expire_codes_: Callable[[Tensor], None]

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Rows (M, D) -> indices (M,)."""
        return self._nearest_codes(x, self.embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> codes (..., D), indices (...)."""
        rows = x.flatten(0, -2)
        self.init_embed_(rows)
        indices = self.quantize(rows)
        codes = F.embedding(indices, self.embed).view(x.shape)
        if self.training:
            self.expire_codes_(rows)
            self._update_averages(rows.detach(), indices)
        return codes, indices.view(x.shape[:-1])

    @torch.no_grad()
    def _update_averages(self, rows: Tensor, indices: Tensor) -> None:
        rest = 1 - self.decay
        counts = segment_counts(indices, self.codebook_size).to(self.cluster_size.dtype)
        sums = segment_sum(rows, indices, self.codebook_size)
        self.cluster_size.mul_(self.decay).add_(counts, alpha=rest)
        self.embed_avg.mul_(self.decay).add_(sums, alpha=rest)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        self.embed.copy_(self.embed_avg / smoothed.unsqueeze(1))


class TransformersDacQuantize(Adapter):
    """``DacVectorQuantize`` of transformers: nearest code by cosine."""

    methods: ClassVar[tuple[str, ...]] = ("decode_latents",)
    codebook: nn.Embedding

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        return "a codebook that accelerate offloads isn't covered" if hasattr(module.codebook, "_hf_hook") else None

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, T) -> codes (B, D, T), indices (B, T)."""
        rows = F.normalize(hidden_states.detach().transpose(1, 2).flatten(0, 1))
        indices = self._nearest_codes(rows, F.normalize(self.codebook.weight.detach()))
        indices = indices.view(len(hidden_states), -1)
        return self.codebook(indices).transpose(1, 2), indices


class DacQuantize(TransformersDacQuantize):
    """``dac.nn.quantize.VectorQuantize``."""

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, T) -> codes (B, D, T), indices (B, T)."""
        return TransformersDacQuantize.decode_latents(self, latents)
