"""Probabilistic contrastive loss between an image and its reconstruction (Reg-VQ, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.noise import row_words

_FIRST_STREAM = 16  # of the patches' draws; one stream a layer


class ProbabilisticContrastiveLoss(nn.Module):
    """InfoNCE between features of the same places, other places of the image being the negatives.

    With ``weighted`` (PCL, Eq. 3) a place's positive is weighted by the perturbation of its token, normalised over
    the image's places: the farther the sampled code lies from the best one, the weaker the pull; an image without any
    perturbation has uniform weights. Without it, vanilla
    contrastive learning (CL, Eq. 2). Both are averaged over places, so that one loss weight fits both: the value is
    Eq. 3 divided by the number of places.

    Args:
        weighted: PCL or CL.
        num_patches: places sampled in each image and layer, the same in both images (a smaller map gives all of its
            places); None takes every place of every map.
        tau: temperature.
    """

    def __init__(self, *, weighted: bool = True, num_patches: int | None = 256, tau: float = 0.07) -> None:
        super().__init__()
        if num_patches is not None and num_patches < 2:
            raise ValueError(f"num_patches must be at least 2, for there to be negatives, got {num_patches}")
        if not tau > 0:
            raise ValueError(f"tau must be greater than 0, got {tau}")
        self.weighted, self.num_patches, self.tau = weighted, num_patches, tau

    def forward(
        self,
        original: list[Tensor],
        reconstruction: list[Tensor],
        perturbation: Tensor,
        seed: Tensor,
        first_image: int | Tensor = 0,
    ) -> Tensor:
        """Mean over layers, images and places.

        Args:
            original: feature maps (B, C_l, H_l, W_l) of the original; no gradient.
            reconstruction: the same of the reconstruction; they get the gradient.
            perturbation: (B, h, w) of the tokens, >= 0; mapped to each layer by nearest neighbour.
            seed: 0-dim int64 tensor, the draw of the places.
            first_image: global number of the first image: an image's places depend on (seed, number) alone.

        Returns:
            0-dim float32.
        """
        losses = [
            self._layer(layer, x.detach(), z, perturbation, seed, first_image)
            for layer, (x, z) in enumerate(zip(original, reconstruction, strict=True))
        ]
        return torch.stack(losses).mean()

    def _layer(
        self, layer: int, x: Tensor, z: Tensor, perturbation: Tensor, seed: Tensor, first_image: int | Tensor
    ) -> Tensor:
        batch, _, height, width = x.shape
        weight = F.interpolate(perturbation.detach().unsqueeze(1), size=(height, width), mode="nearest").flatten(1)
        query, key = x.flatten(2).mT, z.flatten(2).mT  # (B, L, C)
        length = height * width
        if self.num_patches is not None and self.num_patches < length:
            rows = torch.arange(batch * length, device=x.device) + first_image * length
            words = row_words(seed, rows, stream=_FIRST_STREAM + layer).view(batch, length)
            places = words.topk(self.num_patches, dim=1).indices  # (B, P), no place twice
            weight = weight.gather(1, places)
            index = places.unsqueeze(2).expand(-1, -1, query.shape[2])
            query, key = query.gather(1, index), key.gather(1, index)
        # Without any perturbation nothing tells the places apart: uniform weights, with which PCL is CL.
        total = weight.sum(1, keepdim=True)
        weight = torch.where(total > 0, weight / total, 1 / weight.shape[1])
        loss = weighted_info_nce(
            F.normalize(query.float(), dim=2),
            F.normalize(key.float(), dim=2),
            weight if self.weighted else None,
            tau=self.tau,
        )
        return loss.mean()
