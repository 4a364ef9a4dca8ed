"""vector-quantize-pytorch: ``VectorQuantize``, alone or in a residual quantizer, and the ``Codebook`` inside it.

Known: the interface of release 1.32. Heads, masks, projections and losses are the library's own code; what is swapped
is the look-up of its ``Codebook``, and the sums of its moving averages.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter
from regvq_fast.ops import assign_codes, segment_sum, vector_quantize
from regvq_fast.ops.segment_sum import segment_counts


class VectorQuantize(Adapter):
    """Swap its codebook, and flag calls in which the library's own code reads the distances."""

    _codebook: "Codebook"

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        codebook = module._codebook
        assert isinstance(codebook, nn.Module)
        if reason := Codebook.unlike(codebook):
            return reason
        sample = codebook.gumbel_sample
        if not isinstance(sample, partial) or "stochastic" not in sample.keywords:
            return "a gumbel_sample of your own isn't covered"
        uncovered = {
            "stochastic_sample_codes, noise on every distance,": sample.keywords["stochastic"],
            "straight_through, the gradient of a softmax of distances,": sample.keywords.get("straight_through"),
            "commitment_use_cross_entropy_loss, a softmax of distances,": module.commitment_use_cross_entropy_loss,
            "codebook_diversity_loss_weight, a softmax of distances,": module.has_codebook_diversity_loss,
            "affine_param": codebook.affine_param,
            "vq_bridge": codebook.vq_bridge is not None,
        }
        for option, is_used in uncovered.items():
            if is_used:
                return f"{option} isn't covered"
        return None

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        codebook = module._codebook
        assert isinstance(codebook, nn.Module)
        if not isinstance(codebook, Codebook):  # not shared with a module that was swapped
            Codebook.swap(codebook)
        super().swap(module)

    def forward(self, x: Tensor, indices: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """The library's; with ``indices``, the cross entropy to which reads all distances, with its look-up too."""
        self._codebook.gives_distances = indices is not None
        return super().forward(x, indices, *args, **options)


class Codebook(Adapter):
    """Nearest codes by distance or cosine, in training with the library's updates, without rows of N numbers."""

    embed: Tensor  # [H, N, D], H codebooks
    embed_avg: Tensor  # [H, N, D]
    cluster_size: Tensor  # [H, N]
    codebook_size: int
    decay: float
    learnable_codebook: bool
    use_cosine_sim: bool
    init_embed_: Callable[..., None]
    update_codebook: Callable[..., None]
    all_reduce_fn: Callable[[Tensor], Any]

    gives_distances = False
    """Return whether the library's own forward must run, since its caller reads the distances."""

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, T, D), or (H, B, T, D) -> codes, indices, None (the library: distances)."""
        if self.gives_distances or topk is not None or codebook_transform_fn is not None:
            return super().forward(
                x,
                sample_codebook_temp,
                mask,
                freeze_codebook,
                codebook_transform_fn,
                ema_update_weight,
                accum_ema_update,
                ema_update,
                topk,
                update_usage,
            )
        with torch.autocast(x.device.type, enabled=False):
            has_codebook_dim = x.ndim == 4
            rows = x.float() if has_codebook_dim else x.float().unsqueeze(0)
            shape, rows = rows.shape, rows.flatten(1, 2)  # [H, M, D]
            if mask is not None:  # (B, T), of a batch that heads may multiply
                heads = rows.shape[1] // mask.numel()
                mask = mask.repeat_interleave(heads, 0).reshape(1, -1).expand(len(rows), -1)
            self.init_embed_(rows, mask=mask)
            codebooks = (self.embed if self.learnable_codebook else self.embed.detach()).float()
            pairs = list(zip(rows, codebooks, strict=True))
            indices = torch.stack([self._nearest(one_rows, codes) for one_rows, codes in pairs])  # [H, M]
            quantized = torch.stack([F.embedding(i, codes) for i, codes in zip(indices, codebooks, strict=True)])
            if self.training and update_usage and not freeze_codebook:
                self.update_codebook(
                    rows,
                    indices,
                    mask=mask,
                    ema_update_weight=ema_update_weight,
                    accum_ema_update=accum_ema_update,
                    ema_update=ema_update,
                )
        quantized, indices = quantized.view(shape), indices.view(shape[:-1])
        return (quantized, indices, None) if has_codebook_dim else (quantized.squeeze(0), indices.squeeze(0), None)

    def _nearest(self, rows: Tensor, codes: Tensor) -> Tensor:
        if not self.use_cosine_sim:
            return assign_codes(rows, codes)
        # The largest product, as in the library: codes that a user sets need not have unit length.
        return vector_quantize(rows.detach(), codes.detach(), weight=codes.detach()).indices

    @torch.no_grad()
    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
    ) -> None:
        """The library's moving averages. Rows (H, M, D); one-hot rows (H, M, N) from it, indices (H, M) from us."""
        if embed_onehot.ndim == 3:
            arguments = (flatten, embed_onehot, mask, ema_update_weight, accum_ema_update)
            super().track_cluster_size_and_embed_avg(*arguments)  # type: ignore[misc]
            return
        num_codes = self.codebook_size
        if mask is not None:  # masked rows go to a code too many
            embed_onehot = embed_onehot.masked_fill(~mask, num_codes)
        counts = [segment_counts(indices, num_codes + 1)[:-1].to(flatten.dtype) for indices in embed_onehot]
        pairs = zip(flatten, embed_onehot, strict=True)
        sums = [segment_sum(rows, indices, num_codes + 1)[:-1] for rows, indices in pairs]
        cluster_size, embed_sum = torch.stack(counts), torch.stack(sums)
        self.all_reduce_fn(cluster_size)
        self.all_reduce_fn(embed_sum)
        weight = ema_update_weight(embed_sum, cluster_size) if callable(ema_update_weight) else ema_update_weight
        library = sys.modules[type(self).__module__]
        for average, new in ((self.cluster_size, cluster_size), (self.embed_avg, embed_sum)):
            if accum_ema_update:
                library.accum_grad_(average, new)
            else:
                library.ema_inplace(average, new, self.decay, weight)
