"""Probabilistic contrastive loss between an image and its reconstruction (Reg-VQ, section 3.3)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.noise import Stream, row_words


class ProbabilisticContrastiveLoss(nn.Module):
    """InfoNCE between features of both images: the positive is at the same position, the negatives at all others.

    With ``weighted`` (PCL, Eq. 3) a position's positive is weighted by the perturbation of its token, normalised over
    the image's positions in use: the farther the sampled code is from the best one, the weaker the pull. Without any
    perturbation the weights are uniform. Without ``weighted`` it is vanilla contrastive learning (CL, Eq. 2). Both are
    means over positions, Eq. 3 divided by their number, so that one loss weight fits both.

    Args:
        weighted: PCL, else CL.
        num_patches: positions sampled in each image and layer, the same in both images; a smaller map uses all of its
            positions. None uses every position (dense).
        max_positions: most positions of a dense map; a larger map uses a strided sub-grid, shifted by the seed. None:
            no limit. Memory grows with the number of positions, time with its square.
        region: "all": every position has a positive. "masked": only stochastic tokens have one, and these are sampled
            first. The negatives are the same.
        layer_weights: weights of the layers in the weighted mean. None: equal weights.
        tau: temperature.

    Raises:
        ValueError: a setting that is out of range.
    """

    def __init__(
        self,
        *,
        weighted: bool = True,
        num_patches: int | None = 256,
        max_positions: int | None = 4096,
        region: Literal["all", "masked"] = "all",
        layer_weights: Sequence[float] | None = None,
        tau: float = 0.07,
    ) -> None:
        super().__init__()
        for name, value in (("num_patches", num_patches), ("max_positions", max_positions)):
            if value is not None and value < 2:
                raise ValueError(f"{name} must be at least 2, since one position has no negatives, got {value}")
        if region not in ("all", "masked"):
            raise ValueError(f"region must be 'all' or 'masked', got {region!r}")
        if layer_weights is not None and not (min(layer_weights, default=0) >= 0 and sum(layer_weights) > 0):
            raise ValueError(f"layer_weights must not be negative, nor all 0, got {tuple(layer_weights)}")
        if not tau > 0:
            raise ValueError(f"tau must be greater than 0, got {tau}")
        self.weighted, self.num_patches, self.max_positions, self.tau = weighted, num_patches, max_positions, tau
        self.region = region
        self.layer_weights = None if layer_weights is None else tuple(layer_weights)

    def forward(
        self,
        original: list[Tensor],
        reconstruction: list[Tensor],
        perturbation: Tensor,
        seed: Tensor,
        first_image: int | Tensor = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted mean over layers of the mean over images and positions.

        Args:
            original: feature maps (B, C_l, H_l, W_l) of the original; no gradient.
            reconstruction: those of the reconstruction, which get the gradient.
            perturbation: (B, h, w) of the tokens, >= 0; mapped to each layer by nearest neighbour.
            seed: 0-dim int64 tensor for the sampled positions.
            first_image: global number of the first image: sampled positions depend on (seed, number of the image) only.
            mask: (B, h, w) bool, the stochastic tokens; needed for the region "masked".

        Returns:
            0-dim float32; 0 without positives.

        Raises:
            ValueError: no mask for the region "masked", no maps or empty ones, or maps, layer weights, perturbation and
                mask whose numbers or shapes don't fit.

        Maps are normalised in fp32. On CUDA, 16-bit maps are multiplied in 16 bits, with fp32 sums.
        """
        if self.region == "masked" and mask is None:
            raise ValueError("region='masked' needs the mask of the stochastic tokens")
        weights = self.layer_weights or (1.0,) * len(original)
        if len(weights) != len(original):
            raise ValueError(f"layer_weights has {len(weights)} weights for {len(original)} feature maps")
        shapes, others = ([tuple(maps.shape) for maps in side] for side in (original, reconstruction))
        if shapes != others:
            raise ValueError(f"feature maps of the two images have different shapes: {shapes} and {others}")
        if not shapes or any(0 in shape for shape in shapes):
            raise ValueError(f"feature maps must not be missing or empty, got shapes {shapes}")
        for name, tokens in (("perturbation", perturbation), ("mask", mask)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[0] != shapes[0][0]):
                raise ValueError(f"{name} must be (B, h, w) of {shapes[0][0]} images, got {tuple(tokens.shape)}")
        losses = [
            weight * self._layer(layer, x.detach(), z, perturbation.detach(), seed, first_image, mask)
            for layer, (weight, x, z) in enumerate(zip(weights, original, reconstruction, strict=True))
            if weight > 0
        ]
        return torch.stack(losses).sum() / sum(weights)

    def _layer(
        self,
        layer: int,
        x: Tensor,
        z: Tensor,
        perturbation: Tensor,
        seed: Tensor,
        first_image: int | Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        counted = _at_positions(mask.float(), x) if mask is not None and self.region == "masked" else None  # (B, L)
        weight = _at_positions(perturbation, x)
        positions = self._positions(layer, x, counted, seed, first_image)
        query, key = x.flatten(2).mT, z.flatten(2).mT  # (B, L, C)
        if positions is not None:
            weight = weight.gather(1, positions)
            counted = None if counted is None else counted.gather(1, positions)
            index = positions.unsqueeze(2).expand(-1, -1, query.shape[2])
            query, key = query.gather(1, index), key.gather(1, index)
        with torch.autocast(x.device.type, enabled=False):
            # 16 bits for the tensor cores; a CPU multiplies in fp32 anyway.
            dtype = x.dtype if x.is_cuda else torch.float32
            loss = weighted_info_nce(
                F.normalize(query.float(), dim=2).to(dtype),
                F.normalize(key.float(), dim=2).to(dtype),
                _normalized(weight, counted) if self.weighted else None,
                tau=self.tau,
            )
        if counted is None:
            return loss.mean()
        return (loss * counted).sum() / counted.sum().clamp(min=1)

    def _positions(
        self, layer: int, x: Tensor, counted: Tensor | None, seed: Tensor, first_image: int | Tensor
    ) -> Tensor | None:
        """Return the positions (B, P) of a map that are used, each once; None: all of them."""
        batch, _, height, width = x.shape
        length, stream = height * width, Stream.CONTRASTIVE_POSITIONS + layer
        if self.num_patches is not None:
            if self.num_patches >= length:
                return None
            rows = torch.arange(batch * length, device=x.device) + first_image * length
            words = row_words(seed, rows, stream).view(batch, length)
            if counted is not None:
                words = words + counted.long() * 2**32  # counted positions first
            return words.topk(self.num_patches, dim=1).indices
        if self.max_positions is None or length <= self.max_positions:
            return None
        stride = math.ceil(math.sqrt(length / self.max_positions))
        while math.ceil(height / stride) * math.ceil(width / stride) > self.max_positions:
            stride += 1
        down = across = stride
        if stride >= max(height, width):  # a single position would have no negatives: take two of the longer side
            down, across = (math.ceil(height / 2), width) if height > width else (height, math.ceil(width / 2))
        # The shift wraps around, so that every position is used for some seed.
        shift = row_words(seed, torch.arange(2, device=x.device), stream)
        ys = (torch.arange(0, height, down, device=x.device) + shift[0]) % height
        xs = (torch.arange(0, width, across, device=x.device) + shift[1]) % width
        return (ys[:, None] * width + xs[None, :]).flatten().expand(batch, -1)


def _at_positions(tokens: Tensor, x: Tensor) -> Tensor:
    """Return values of tokens (B, h, w) at the positions of a map by nearest neighbour: (B, L)."""
    return F.interpolate(tokens.unsqueeze(1), size=x.shape[2:], mode="nearest").flatten(1)


def _normalized(weight: Tensor, counted: Tensor | None) -> Tensor:
    """Return weights (B, P) with sum 1; or with ``counted``, mean 1 / P over the counted positions and 0 elsewhere.

    Without any perturbation the weights are uniform, with which PCL is CL.
    """
    num_positions = weight.shape[1]
    if counted is None:
        total = weight.sum(1, keepdim=True)
        return torch.where(total > 0, weight / total, 1 / num_positions)
    weight = weight * counted
    total = weight.sum(1, keepdim=True)
    fraction = counted.sum(1, keepdim=True) / num_positions
    return torch.where(total > 0, weight / total * fraction, counted / num_positions)
