"""SEED-Voken's IBQ, index backpropagation quantization.

Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization", 2024: a straight-through gradient of
the softmax over all codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter, to_rows
from regvq_fast.matmul import score_dtype
from regvq_fast.ops import vector_quantize
from regvq_fast.quantizers.statistics import softmax_entropies


class IndexPropagationQuantize(Adapter):
    """``IndexPropagationQuantize``: linear logits with the codebook as weight."""

    embedding: nn.Embedding
    beta: float
    use_entropy_loss: bool
    entropy_temperature: float
    sample_minimization_weight: float
    batch_maximization_weight: float
    remap: str | None

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        return None if module.remap is None else "remap, a softmax of some of the codes, isn't covered"

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> Any:
        """z (B, D, H, W) -> codes, loss, (None, None, indices (B * H * W,)); the library ignores the other arguments.

        With ``use_entropy_loss`` the loss is (codebook loss, mean entropy, entropy of the mean, their weighted sum).
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = self.embedding.weight  # [N, D]
            rows = to_rows(z).to(codebook.dtype)
            dtype = score_dtype(z, codebook, self.fp32_scores)
            narrow = codebook.to(dtype)
            out = vector_quantize(rows.to(dtype), narrow, weight=narrow, codebook_grad="hard")
            codes = self.embedding(out.indices)
            loss = ((out.quantized - rows) ** 2).mean() + ((codes.detach() - rows) ** 2).mean()
            loss = loss + self.beta * ((codes - rows.detach()) ** 2).mean()
            quantized, info = out.quantized.permute(0, 3, 1, 2), (None, None, out.indices.flatten())
            if not self.use_entropy_loss:
                return quantized, loss, info
            entropy, mean_entropy = softmax_entropies(
                rows.flatten(0, 2), codebook, temperature=self.entropy_temperature
            )
            balance = self.sample_minimization_weight * entropy - self.batch_maximization_weight * mean_entropy
            return quantized, (loss, entropy, mean_entropy, balance), info
