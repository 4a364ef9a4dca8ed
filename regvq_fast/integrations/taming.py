"""Quantizers of taming-transformers' ``taming.modules.vqvae.quantize``, one of which is also in diffusers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter, codes_and_loss, to_rows
from regvq_fast.matmul import score_dtype
from regvq_fast.ops import softmax_statistics, vector_quantize
from regvq_fast.quantizers.quantizer import sample_seed


class DiffusersVectorQuantizer(Adapter):
    """``VectorQuantizer`` of diffusers' ``VQModel``, also used by its MoVQ and by Paella, with all options."""

    embedding: nn.Embedding
    beta: float
    legacy: bool
    remap: str | None
    sane_index_shape: bool
    remap_to_used: Callable[[Tensor], Tensor]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> codes (B, D, H, W), loss, (None, None, indices (B * H * W,) by default)."""
        rows = to_rows(z)
        indices = self._nearest_codes(rows.flatten(0, 2), self.embedding.weight)
        quantized, loss = codes_and_loss(rows, self.embedding(indices).view(rows.shape), self.beta, self.legacy)
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(rows.shape[:3])
        return quantized, loss, (None, None, indices)


class VectorQuantizer2(DiffusersVectorQuantizer):
    """``VectorQuantizer2`` of taming's ``VQModel``, with all options."""

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> codes, loss, (None, None, indices); the other arguments are GumbelQuantize's."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                f"temp={temp}, rescale_logits={rescale_logits}, return_logits={return_logits} apply to GumbelQuantize: "
                "VectorQuantizer2 takes the nearest code, leave them out"
            )
        return DiffusersVectorQuantizer.forward(self, z)


class VectorQuantizer(Adapter):
    """taming's older ``VectorQuantizer``. Its one-hot matrix (M, N) stays, since it is an output."""

    embedding: nn.Embedding
    n_e: int
    beta: float

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """z (B, D, H, W) -> codes, loss, (perplexity, one-hot rows (M, N), indices (M, 1))."""
        rows = to_rows(z)
        indices = self._nearest_codes(rows.flatten(0, 2), self.embedding.weight)
        quantized, loss = codes_and_loss(rows, self.embedding(indices).view(rows.shape), self.beta, legacy=True)
        one_hot = rows.new_zeros(len(indices), self.n_e).scatter_(1, indices.unsqueeze(1), 1)
        fractions = one_hot.mean(0)
        perplexity = (-(fractions * (fractions + 1e-10).log()).sum()).exp()
        return quantized, loss, (perplexity, one_hot, indices.unsqueeze(1))


class GumbelQuantize(Adapter):
    """Hard Gumbel-softmax of logits from a 1x1 convolution; it also samples in evaluation, as the library does.

    The noise comes from this package's generator, seeded from PyTorch's: other numbers, the same distribution.
    """

    proj: nn.Conv2d
    embed: nn.Embedding
    n_embed: int
    straight_through: bool
    temperature: float
    kl_weight: float
    use_vqinterface: bool
    remap: str | None

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        assert isinstance(module.proj, nn.Conv2d)
        assert isinstance(module.embed, nn.Embedding)
        if module.remap is not None:
            return "remap, noise for some of the codes, isn't covered"
        if not module.straight_through:
            return "straight_through=False, mixtures of all codes, isn't covered"
        if module.proj.in_channels != module.embed.embedding_dim:
            return (
                f"num_hiddens={module.proj.in_channels} other than embedding_dim={module.embed.embedding_dim} "
                "isn't covered"
            )
        return None

    def forward(self, z: Tensor, temp: float | Tensor | None = None, return_logits: bool = False) -> Any:
        """z (B, D, H, W) -> codes, KL loss, (None, None, indices (B, H, W)); with ``return_logits`` the library's."""
        if return_logits:
            return super().forward(z, temp, return_logits)
        with torch.autocast(z.device.type, enabled=False):
            rows = to_rows(z).to(self.embed.weight.dtype)
            weight = self.proj.weight.flatten(1)  # [N, D]
            dtype = score_dtype(z, weight, self.fp32_scores)
            out = vector_quantize(
                rows.to(dtype),
                self.embed.weight.to(dtype),
                weight=weight.to(dtype),
                bias=None if self.proj.bias is None else self.proj.bias.to(dtype),
                mask=torch.ones(rows.shape[:3], dtype=torch.bool, device=z.device),
                seed=sample_seed(z.device),
                tau=self.temperature if temp is None else temp,
                codebook_grad="hard",
            )
            loss = rows.new_zeros(())
            if self.kl_weight != 0:  # sum of p log(N p)
                entropy, _ = softmax_statistics(rows.flatten(0, 2), weight, self.proj.bias)
                loss = self.kl_weight * (math.log(self.n_embed) - entropy)
        quantized = out.quantized.permute(0, 3, 1, 2)
        return (quantized, loss, (None, None, out.indices) if self.use_vqinterface else out.indices)
