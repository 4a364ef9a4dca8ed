"""VGG-16 and VGG-19 feature maps for the perceptual and the contrastive loss.

Architecture: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
State-dict names and tensor layouts are torchvision's (`features.{i}.weight`, `features.{i}.bias`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from regvq_fast.models.weights import RemoteWeights, check_state_dict, find_weights, read_state_dict, sha256_of

VGGName = Literal["vgg16", "vgg19"]

DEFAULT_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
BLOCK_WIDTHS = (64, 128, 256, 512, 512)
BLOCK_DEPTHS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
IMAGENET_WEIGHTS = {
    "vgg16": RemoteWeights("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "vgg19": RemoteWeights("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d"),
}
RANDOM = Path("random")
"""Value of ``weights`` for random weights of a fixed seed."""


class NoWeightsError(OSError):
    """No file of pre-trained weights was given, none is in the cache, and none could be downloaded."""


class VGGFeatures(nn.Module):
    """The frozen convolutional trunk of VGG-16 or VGG-19, up to the deepest requested layer.

    A new network has He-initialised random weights that depend on `seed` only; the global random state is neither read
    nor changed. `load_vgg_features` loads pre-trained weights. The network stays in evaluation mode; gradients pass to
    the images, but not to its parameters.

    Args:
        net: "vgg16" or "vgg19".
        layers: names relu{block}_{k} of the requested outputs, each once, in order of depth.
        seed: seed of the random weights.

    Attributes:
        source: where the weights came from: "path:...", "cache:...", "download:..." or "random(seed 0)".
        pretrained: whether the weights were loaded.
        imagenet: whether they are torchvision's ImageNet weights, by SHA-256.
        channels: number of channels of each output.

    Raises:
        ValueError: an unknown network or layer, no layers, or layers out of order.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: VGGName = "vgg16", layers: Sequence[str] = DEFAULT_LAYERS, *, seed: int = 0) -> None:
        super().__init__()
        if net not in BLOCK_DEPTHS:
            raise ValueError(f"net must be one of {', '.join(BLOCK_DEPTHS)}, got {net!r}")
        positions, trunk = _trunk(net)
        unknown = [layer for layer in layers if layer not in positions]
        if unknown or not layers:
            raise ValueError(f"layers of {net} are {', '.join(positions)}; got {', '.join(unknown) or 'none'}")
        self._taps = [positions[layer] for layer in layers]
        if self._taps != sorted(set(self._taps)):
            raise ValueError(f"layers must be in order of depth, each once, got {', '.join(layers)}")

        self.net: VGGName = net
        self.layers = tuple(layers)
        self.channels = tuple(BLOCK_WIDTHS[int(layer[4]) - 1] for layer in layers)
        self.source = f"random(seed {seed})"
        self.pretrained = False
        self.imagenet = False
        self._trunk_shapes = {f"features.{name}": tensor.shape for name, tensor in trunk.state_dict().items()}
        self.features = nn.Sequential(*list(trunk)[: self._taps[-1] + 1])
        self.features.to_empty(device="cpu")
        # ImageNet's mean and standard deviation, for values in [-1, 1] instead of [0, 1].
        self.register_buffer("mean", _per_channel(2 * m - 1 for m in (0.485, 0.456, 0.406)), persistent=False)
        self.register_buffer("std", _per_channel(2 * s for s in (0.229, 0.224, 0.225)), persistent=False)
        self._init_weights(seed)
        self.requires_grad_(False)
        self.eval()

    @property
    def label(self) -> str:
        """Name of the network and its weights, for reports of what is measured with it."""
        title = self.net.upper().replace("VGG", "VGG-")
        if not self.pretrained:
            return f"random {title}"
        return f"ImageNet {title}" if self.imagenet else f"{title} of {Path(self.source.partition(':')[2]).name}"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images (B, 3, H, W) in [-1, 1].

        Returns:
            For each layer the output (B, C, H // 2**p, W // 2**p) of its ReLU, after p pooling layers.

        Raises:
            ValueError: not (B, 3, H, W), or too small for the pooling layers.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        smallest = 2 ** (int(self.layers[-1][4]) - 1)
        if min(height, width) < smallest:
            raise ValueError(
                f"images of {height} x {width} pixels vanish in the pooling layers before {self.layers[-1]}: "
                f"at least {smallest} x {smallest} are needed"
            )
        h = (images - self.mean) / self.std
        outputs = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self._taps:
                outputs.append(h)
        return outputs

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the mode of the enclosing model."""
        return super().train(False)

    def load_torchvision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a torchvision state dict; `classifier.*` and layers after the last requested one are ignored.

        Raises:
            ValueError: missing or unexpected names, or wrong shapes, all of them listed; then nothing is loaded.
        """
        given = {name: tensor for name, tensor in state_dict.items() if not name.startswith("classifier.")}
        needed = self.state_dict()
        # Layers not needed are also checked if the file has them: they tell a VGG-19 from a VGG-16.
        expected = {name: shape for name, shape in self._trunk_shapes.items() if name in needed or name in given}
        check_state_dict(given, expected, f"the {self.net} feature network")
        self.load_state_dict({name: given[name] for name in needed})

    def _init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                # He et al., 2015: activations keep their scale from layer to layer.
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()), generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def load_vgg_features(
    net: VGGName, weights: Path | None = None, *, layers: Sequence[str] = DEFAULT_LAYERS, download: bool = True
) -> VGGFeatures:
    """Return a VGG feature network with pre-trained weights, or with random ones on request.

    Args:
        net: "vgg16" or "vgg19".
        weights: a .safetensors, .pth or .pt file with torchvision's names, fp32 or half precision; or `RANDOM`. None:
            torchvision's ImageNet weights, from the torch hub cache or a download, which fails within seconds without a
            network.
        layers: as in `VGGFeatures`.
        download: whether the network may be used.

    Returns:
        The network; its `source`, `pretrained` and `label` name the weights.

    Raises:
        FileNotFoundError: `weights` is not a file.
        NoWeightsError: no `weights` given, nothing in the cache, and no download.
        ValueError: a file can't be read or doesn't fit; the message names it and what is wrong.
    """
    trunk = VGGFeatures(net, layers)
    if weights == RANDOM:
        return trunk
    remote = IMAGENET_WEIGHTS[net]
    try:
        path, source = find_weights(remote, weights, download=download)
    except OSError as error:
        if weights is not None:
            raise
        raise NoWeightsError(f"no ImageNet weights of {net.replace('vgg', 'VGG-')} ({error})") from None
    state_dict = read_state_dict(path)
    try:
        trunk.load_torchvision_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    trunk.source = source
    trunk.pretrained = True
    # File names in the hub's cache contain the hash; other files are hashed.
    trunk.imagenet = weights is None or sha256_of(path).startswith(remote.sha256_prefix)
    return trunk


def _trunk(net: VGGName) -> tuple[dict[str, int], nn.Sequential]:
    """Return the indices of the ReLUs by name, and the whole trunk on the meta device."""
    positions = {}
    modules: list[nn.Module] = []
    width = 3
    with torch.device("meta"):
        for block, (depth, channels) in enumerate(zip(BLOCK_DEPTHS[net], BLOCK_WIDTHS, strict=True), start=1):
            for k in range(1, depth + 1):
                modules += [nn.Conv2d(width, channels, kernel_size=3, padding=1), nn.ReLU()]
                positions[f"relu{block}_{k}"] = len(modules) - 1
                width = channels
            modules.append(nn.MaxPool2d(2))
    return positions, nn.Sequential(*modules)


def _per_channel(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values)).view(3, 1, 1)
