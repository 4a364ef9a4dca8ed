"""The feature networks of metrics: features for Fréchet distances, and a perceptual distance.

Each has a name and the hash of its weights, for reports of what is measured with it.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from regvq_fast.data.transforms import to_float
from regvq_fast.invocation import install
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.models.features import NoWeightsError, VGGFeatures, load_vgg_features
from regvq_fast.models.weights import RemoteWeights, find_weights, read_state_dict, sha256_of, weights_hash

INCEPTION_WEIGHTS = RemoteWeights(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
)
"""The weights of the original FID (TensorFlow, 2015-12-05), converted by torch-fidelity."""

_CHOICES = "inception, inception:PATH, vgg16, vgg16:PATH, random-vgg16, none"
_OTHERS = "other features with --fid-features vgg16:PATH or random-vgg16, or none"
_INSTALL = f"the Inception features of FID need torch-fidelity: {install('fid')}, or give {_OTHERS}"
_SPATIAL_CHANNELS = 7


class NoFeaturesError(OSError):
    """FID's network is not available: no torch-fidelity, or no weights and no download."""


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast, and use deterministic algorithms."""
    with (
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


class FeatureNet(nn.Module, ABC):
    """A frozen network that maps each image to a feature vector, for Fréchet distances.

    It computes in float32, without TF32 and outside autocast, so that a metric does not depend on the model's
    precision. Features do not depend on the other images of the batch, except for rounding if a convolution chooses its
    algorithm by batch size.

    Attributes:
        name: of network, layer and weights, for reports.
        standard: True for the features that define FID.
        num_features: K.
        num_spatial: number of spatial features (`with_spatial`, for sFID); 0 if the network has none.
        classifier: (C, K) weights of the class logits, without a bias, for the Inception Score; None if there are none.
        min_size: smallest side of the images.
        hash: of the weights, 12 hexadecimal digits.
    """

    name: str
    standard = False
    num_features: int
    num_spatial = 0
    min_size = 1
    hash: str

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) uint8 to features (B, K) float32; for subclasses to define."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, K) float32 of images (B, 3, H, W) uint8 on the network's device.

        Raises:
            TypeError: not uint8. ValueError: another shape, or images that are too small.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"feature networks take uint8 images, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < self.min_size:
            height, width = images.shape[2:]
            raise ValueError(f"{self.name} needs images of at least {self.min_size} pixels, got {height} x {width}")
        with _float32(images.device):
            return self.features(images)

    @property
    def classifier(self) -> Tensor | None:
        """See the attributes."""
        return None

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of :meth:`forward`, and spatial ones (B, num_spatial) float32."""
        return self(images), torch.empty(len(images), 0, device=images.device)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def _finish(self) -> None:
        self.hash = weights_hash(self)[:12]
        self.requires_grad_(False)
        self.eval()


class VGGFeatureNet(FeatureNet):
    """The last convolution of VGG-16, relu5_3, averaged over positions: K = 512, at the images' own size."""

    num_features = 512
    min_size = 16  # pooled four times

    def __init__(self, trunk: VGGFeatures) -> None:
        super().__init__()
        self.trunk = trunk
        self.name = f"{trunk.label}, {trunk.layers[-1]} averaged"
        self._finish()

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(to_float(images))[-1].mean(dim=(2, 3))


class InceptionFeatureNet(FeatureNet):
    """torch-fidelity's Inception-v3 before its classifier, K = 2048; it resizes images to 299 as TensorFlow 1 did.

    The spatial features are those of ADM's sFID, TensorFlow's mixed_6/conv: the first 7 channels (17 x 17) of the
    1 x 1 branch of Mixed_6d after its ReLU, channels last. torch-fidelity does not return this layer; a hook reads it.

    Args:
        weights: file of weights, .pth or .safetensors. None: published ones, from the torch hub cache or a download.

    Raises:
        ValueError: the file can't be read or doesn't fit.
        OSError: no such file. NoFeaturesError: torch-fidelity is missing, or there are no weights and no download.
    """

    num_features = 2048
    num_spatial = _SPATIAL_CHANNELS * 17 * 17

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # of torch-fidelity, or of torchvision, built for another PyTorch
            raise NoFeaturesError(f"{_INSTALL} ({error})") from None
        try:
            path, _ = find_weights(INCEPTION_WEIGHTS, weights)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise NoFeaturesError(
                f"no Inception weights ({error}): download {INCEPTION_WEIGHTS.url} on another machine and give it "
                f"with --fid-features inception:PATH, or give {_OTHERS}"
            ) from None
        state = read_state_dict(path)
        # The extractor unpickles the file that it is given: give it one with tensors only.
        with tempfile.TemporaryDirectory() as folder:
            tensors = Path(folder) / "inception.pth"
            torch.save(state, tensors)
            try:
                self.trunk = FeatureExtractorInceptionV3("inception", ["2048"], str(tensors))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{path} doesn't fit Inception-v3: {reason}") from None
        self.standard = sha256_of(path).startswith(INCEPTION_WEIGHTS.sha256_prefix)
        self.name = "Inception-v3 (torch-fidelity)" if self.standard else f"Inception-v3 of {path.name}"
        self._finish()

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)[0]

    @property
    def classifier(self) -> Tensor:
        """(1008, 2048)."""
        return self.trunk.fc.weight

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of :meth:`forward`, and those of sFID (B, 2023)."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            kept.append(output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))

        with self.trunk.Mixed_6d.branch1x1.register_forward_hook(keep):
            features = self(images)
        return features, kept[0]


def load_feature_net(spec: str) -> FeatureNet:
    """Return the feature network that ``--fid-features`` names, on the CPU.

    Args:
        spec: "inception" (FID proper) or "vgg16", with published weights from the torch hub cache or a download;
            with ":PATH" appended, with the weights of a file; "random-vgg16", with random weights of a fixed seed.

    Raises:
        ValueError: another name, or weights that can't be read or don't fit.
        OSError: no such file, or no download. NoFeaturesError: Inception is not available.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in ("inception", "vgg16", "random-vgg16") or bool(colon) != bool(rest) or (kind[0] == "r" and rest):
        raise ValueError(f"--fid-features {spec} is none of {_CHOICES}")
    path = Path(rest) if rest else None
    if kind == "inception":
        return InceptionFeatureNet(path)
    if kind == "random-vgg16":
        return VGGFeatureNet(VGGFeatures("vgg16", ("relu5_3",)))
    try:
        return VGGFeatureNet(load_vgg_features("vgg16", path, layers=("relu5_3",)))
    except NoWeightsError as error:
        raise OSError(
            f"{error}: give a file with --fid-features vgg16:PATH, or use random-vgg16 for random features"
        ) from None


class PerceptualDistance(nn.Module):
    """LPIPS; with weights other than ImageNet's of VGG-16, the same distance under a name that says so.

    It computes in float32, as a :class:`FeatureNet` does.

    Args:
        weights: as in :func:`regvq_fast.models.load_vgg_features`, which raises the errors.
    """

    min_size = 16

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.trunk = load_vgg_features("vgg16", weights)
        self.distance = LPIPS(self.trunk)
        self.name = self.distance.name
        self.hash = weights_hash(self)[:12]
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, 3, H, W) in -1..1."""
        with _float32(x.device):
            return self.distance(self.trunk(x), self.trunk(y))
