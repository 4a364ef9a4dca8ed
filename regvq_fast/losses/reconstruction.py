"""Reconstruction loss of a tokenizer: pixels, perceptual distance, contrastive loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss


class ReconstructionLoss(nn.Module):
    """Weighted sum of L1, L2 (mean squared error), LPIPS and PCL of an image and its reconstruction.

    The feature network runs once on each image, and the perceptual and the contrastive loss share its maps, unless the
    contrastive loss has its own network. Terms of weight 0, or without a module, are skipped; L1 is always recorded.

    Args:
        features: images (B, 3, H, W) in [-1, 1] -> list of feature maps; frozen.
        perceptual: (maps, maps) -> (B,) distances.
        contrastive: the contrastive loss, or None.
        contrastive_features: its own feature network, or None to share ``features``.
        l1_weight, l2_weight, perceptual_weight, contrastive_weight: weights of the terms.
    """

    def __init__(
        self,
        features: nn.Module,
        perceptual: nn.Module,
        contrastive: ProbabilisticContrastiveLoss | None,
        contrastive_features: nn.Module | None = None,
        *,
        l1_weight: float = 1.0,
        l2_weight: float = 0.0,
        perceptual_weight: float = 1.0,
        contrastive_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.features, self.perceptual = features, perceptual
        self.contrastive = contrastive if contrastive_weight > 0 else None
        self.contrastive_features = contrastive_features if self.contrastive is not None else None
        self.l1_weight, self.l2_weight = l1_weight, l2_weight
        self.perceptual_weight, self.contrastive_weight = perceptual_weight, contrastive_weight

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor,
        perturbation: Tensor,
        seed: Tensor,
        first_image: int | Tensor = 0,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum (0-dim) and the terms by name (detached, unweighted).

        Args:
            images: (B, 3, H, W) in [-1, 1], no gradient.
            reconstruction: (B, 3, H, W); gets the gradient.
            perturbation: (B, h, w), the token weights of the contrastive loss.
            seed, first_image: for the contrastive loss's sampled positions.
            mask: (B, h, w) bool, the stochastic tokens, for a contrastive loss of the masked region.
        """
        l1 = F.l1_loss(reconstruction.float() if self.l1_weight > 0 else reconstruction.detach().float(), images)
        # An empty sum: 0 with a gradient of 0, even if a pixel is inf.
        loss = self.l1_weight * l1 if self.l1_weight > 0 else reconstruction[:0].float().sum()
        terms = {"l1": l1.detach()}
        if self.l2_weight > 0:
            l2 = F.mse_loss(reconstruction.float(), images)
            loss, terms["l2"] = loss + self.l2_weight * l2, l2.detach()
        original: list[Tensor] = []
        reconstructed: list[Tensor] = []
        shares_trunk = self.contrastive is not None and self.contrastive_features is None
        if self.perceptual_weight > 0 or shares_trunk:
            original, reconstructed = self.features(images.detach()), self.features(reconstruction)
        if self.perceptual_weight > 0:
            perceptual = self.perceptual(original, reconstructed).mean()
            loss, terms["perceptual"] = loss + self.perceptual_weight * perceptual, perceptual.detach()
        if self.contrastive is not None:
            if self.contrastive_features is not None:
                original = self.contrastive_features(images.detach())
                reconstructed = self.contrastive_features(reconstruction)
            contrastive = self.contrastive(original, reconstructed, perturbation, seed, first_image, mask)
            loss, terms["contrastive"] = loss + self.contrastive_weight * contrastive, contrastive.detach()
        return loss, terms
