"""The PatchGAN discriminator of pix2pix (Isola et al., CVPR 2017), as in taming-transformers.

Module names are those of taming's `NLayerDiscriminator` (`main.N.*`), so that its weights load by `load_state_dict`.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from regvq_fast.models.layers import group_norm

Norm = Literal["batch", "group", "none"]

# Identity without normalisation, so that the convolutions keep their indices, and keys, in `main`.
_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": group_norm, "none": nn.Identity}


class PatchDiscriminator(nn.Module):
    """Real/fake logits of overlapping patches (70 x 70 pixels at the default depth).

    `num_layers` 4x4 convolutions of stride 2, then two of stride 1. Widths double from `filters` up to 8 * filters.
    Convolution weights start as N(0, 0.02), normalisation weights as N(1, 0.02).

    Args:
        in_channels: channels of the images.
        filters: width of the first convolution.
        num_layers: convolutions of stride 2.
        norm: "batch" (pix2pix, taming), "group" (independent of the batch, for small batches), or "none"; there is
            none after the first and the last convolution.

    Raises:
        ValueError: a size that is not positive, or an unknown `norm`.
    """

    def __init__(self, in_channels: int = 3, filters: int = 64, num_layers: int = 3, norm: Norm = "batch") -> None:
        super().__init__()
        for name, size in {"in_channels": in_channels, "filters": filters, "num_layers": num_layers}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        self.in_channels = in_channels
        self.num_layers = num_layers

        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, filters, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        width = filters
        for i in range(1, num_layers + 1):
            previous, width = width, filters * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(previous, width, kernel_size=4, stride=stride, padding=1, bias=norm == "none"),
                _NORMS[norm](width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width, 1, kernel_size=4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    @property
    def min_size(self) -> int:
        """Smallest side of an image in pixels, which gives one logit."""
        return 3 * 2**self.num_layers  # each convolution of stride 1 removes one pixel

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, H // 2**num_layers - 2, W // 2**num_layers - 2) of images (B, in_channels, H, W).

        Raises:
            ValueError: not (B, in_channels, H, W), or a side below `min_size`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for a discriminator of {self.num_layers} layers, "
                f"which needs {self.min_size} or more: use fewer layers or larger images"
            )
        return self.main(images)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
