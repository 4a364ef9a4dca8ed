"""Perceptual distance between given feature maps.

LPIPS: Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018. The feature network is not part of the loss, so that this loss and the contrastive one share one pass.
"""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

EPS = 1e-10  # added to the norm, as in the lpips package
LPIPS_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


class FeatureNetwork(Protocol):
    """Feature network of the loss, such as `regvq_fast.models.VGGFeatures`."""

    @property
    def net(self) -> str:
        """Architecture, such as "vgg16"."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs are the features."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels of each."""

    @property
    def imagenet(self) -> bool:
        """True if the weights are torchvision's ImageNet weights."""

    @property
    def label(self) -> str:
        """Name of the network and its weights."""


class LPIPS(nn.Module):
    """Weighted squared distance of channel-normalised features, averaged over positions and summed over layers.

    For feature maps x_k, y_k of layer k, with xhat = x / (|x| + 1e-10) over the channels at each position:

        distance = sum_k mean_hw sum_c w_kc (xhat_kchw - yhat_kchw)^2

    The weights w are fixed. For the features that the LPIPS heads were fitted to (torchvision's ImageNet VGG-16 at
    relu1_2, relu2_2, relu3_3, relu4_3, relu5_3) they are these heads. A head weighs the channels of that one network,
    so for any other features the weights are uniform, 1 / (2 * layers). The distance is then the mean over layers and
    positions of 1 - cos(x, y): in [0, 1] for features after a ReLU, and of the scale of LPIPS, whose fitted weights
    average 0.09. There is no dropout.

    Args:
        network: the feature network.

    Attributes:
        calibrated: whether the weights are the fitted heads.
        name: "LPIPS" if calibrated, else a name with the network and its weights.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        heads = None
        if network.imagenet and network.net == "vgg16" and network.layers == LPIPS_LAYERS:
            heads = _fitted_heads()
        self.calibrated = heads is not None
        self.name = "LPIPS" if self.calibrated else f"perceptual distance ({network.label})"
        self.num_layers = len(network.channels)
        for k, channels in enumerate(network.channels):
            self.add_module(f"lin{k}", _Head(channels, weight=1 / (2 * self.num_layers)))
        if heads is not None:
            self.load_state_dict(heads)
        self.requires_grad_(False)

    def forward(self, features_x: Sequence[Tensor], features_y: Sequence[Tensor]) -> Tensor:
        """Return distances (B,) float32 of two lists of feature maps (B, C_k, H_k, W_k), with gradients to both.

        Raises:
            ValueError: the number of maps is not that of the layers, or two maps have different shapes.
        """
        if not len(features_x) == len(features_y) == self.num_layers:
            raise ValueError(f"expected {self.num_layers} feature maps, got {len(features_x)} and {len(features_y)}")
        distance = torch.zeros((), device=features_x[0].device)
        for k, (x, y) in enumerate(zip(features_x, features_y, strict=True)):
            head = self.get_submodule(f"lin{k}")
            if x.shape != y.shape:
                raise ValueError(f"feature maps {k} have different shapes: {tuple(x.shape)} and {tuple(y.shape)}")
            distance = distance + head((_normalize(x) - _normalize(y)).square())
        return distance


class _Head(nn.Module):
    """Weighted sum over the channels; its state-dict key is the lpips package's `model.1.weight`."""

    def __init__(self, channels: int, weight: float) -> None:
        super().__init__()
        conv = nn.utils.skip_init(nn.Conv2d, channels, 1, kernel_size=1, bias=False)  # uses no random numbers
        nn.init.constant_(conv.weight, weight)
        self.model = nn.Sequential(nn.Identity(), conv)

    def forward(self, squares: Tensor) -> Tensor:
        """(B, C, H, W) to (B,)."""
        # The mean over positions first, then a product that, unlike a convolution, stays float32 under autocast.
        return (squares.mean((2, 3)) * self.get_parameter("model.1.weight").view(-1)).sum(1)


def _normalize(features: Tensor) -> Tensor:
    features = features.float()
    # If all channels are 0, the gradient of vector_norm is finite, that of sqrt(sum x^2) is nan.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)


def _fitted_heads() -> dict[str, Tensor] | None:
    """Return the LPIPS heads for VGG-16 from the torchmetrics package; None if this version has none."""
    spec = find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the LPIPS heads come with torchmetrics, which is not installed: pip install torchmetrics"
        )
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    if not path.is_file():
        warnings.warn(
            f"this torchmetrics has no LPIPS heads ({path}): using uniform ones, which is not LPIPS; install another "
            "version",
            stacklevel=3,
        )
        return None
    return torch.load(path, map_location="cpu", weights_only=True)
