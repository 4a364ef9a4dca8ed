"""The training step of taming-transformers, from its own modules: what ``bench_step.py`` measures ours against.

``pip install --no-deps taming-transformers-rom1504`` is enough. What else its modules import is for downloads and
pre-trained weights, and einops, for a transposition; stand-ins serve where these are missing. (This file isn't called
taming.py, since scripts beside it would import it in the package's place.)
"""

import contextlib
import importlib
import io
import sys
from dataclasses import asdict
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peers
from torch import Tensor, nn

from regvq_fast.config import VQGANConfig
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.layers import group_norm
from regvq_fast.precision import Precision
from regvq_fast.training.optimization import build_optimizer


class TamingStep:
    """``VQModel.training_step`` and what Lightning makes of it with two optimizers, the discriminator active.

    For the first optimizer the batch is encoded, quantized, decoded and judged: L1, LPIPS, adversarial loss with its
    adaptive weight by two walks back to the last layer, codebook loss. For the second it is encoded, quantized and
    decoded again, LPIPS included, and the discriminator is trained on the result. While one takes its turn, the
    parameters of the other take no gradients (``toggle_optimizer``).

    Where the published training leaves a choice, or would cost more, it gets what ours has: AdamW with the fused
    update, random VGG weights of the same seed with the same heads, LPIPS without the dropout that training mode
    switches on in it, and below 128 channels our number of groups in GroupNorm (its own would be of one channel).
    """

    def __init__(self, config: VQGANConfig, precision: Precision) -> None:
        self.precision, self.scaler = precision, precision.scaler()
        with contextlib.redirect_stdout(io.StringIO()):  # they announce themselves
            self.autoencoder = _Autoencoder(config).to(precision.device)
            self.loss = _build_loss(config).to(precision.device)
        self.discriminator: nn.Module = self.loss.discriminator
        self._turns = [(m, build_optimizer(m, config.optimizer)) for m in (self.autoencoder, self.discriminator)]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """One step on a batch (B, 3, H, W) in [-1, 1]; the logged numbers, by taming's names."""
        metrics: dict[str, Tensor] = {}
        for index, (module, optimizer) in enumerate(self._turns):
            for other, _ in self._turns:
                other.requires_grad_(other is module)
            with self.precision.autocast():
                reconstruction, codebook_loss = self.autoencoder(images)
                last_layer = self.autoencoder.decoder.conv_out.weight
                loss, log = self.loss(codebook_loss, images, reconstruction, index, 0, last_layer=last_layer)
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            metrics |= log
        return metrics


class _Autoencoder(nn.Module):
    """taming's ``VQModel``, which is a LightningModule, as a plain module."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        size = {"resolution": config.data.image_size, "in_channels": 3, "out_ch": 3, "double_z": False}
        shared = asdict(config.model) | size  # they ignore what they don't know
        codes, width, z_channels = config.quantizer.num_codes, config.quantizer.code_dim, config.model.z_channels
        networks = taming_module("diffusionmodules.model")
        self.encoder, self.decoder = networks.Encoder(**shared), networks.Decoder(**shared)
        self.quantize = taming_module("vqvae.quantize").VectorQuantizer2(codes, width, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z_channels, width, 1), nn.Conv2d(width, z_channels, 1)
        for norm in self.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.num_groups = group_norm(norm.num_channels).num_groups

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction and the codebook loss."""
        quantized, loss, _ = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(quantized)), loss


def _build_loss(config: VQGANConfig) -> Any:
    """``VQLPIPSWithDiscriminator`` without its downloads."""
    features = VGGFeatures("vgg16")
    for layer in features.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True  # as in torchvision's network
    torchvision_models = SimpleNamespace(vgg16=lambda pretrained: features)
    lpips, model = taming_module("losses.lpips"), config.model
    with mock.patch.object(lpips, "models", torchvision_models), mock.patch.object(lpips.LPIPS, "load_from_pretrained"):
        loss = taming_module("losses.vqperceptual").VQLPIPSWithDiscriminator(
            0, disc_num_layers=model.disc_layers, disc_ndf=model.disc_filters, disc_weight=config.loss.disc_weight
        )
    loss.perceptual_loss.load_state_dict(LPIPS(features).state_dict(), strict=False)
    return loss


def _rearrange(tensor: Tensor, pattern: str) -> Tensor:
    """einops' function, where nothing is merged or split."""
    before, after = (side.split() for side in pattern.split("->"))
    return tensor.permute([before.index(name) for name in after])


_STAND_INS: dict[str, Any] = {
    "torchvision": SimpleNamespace(models=None),
    "requests": SimpleNamespace(),
    "tqdm": SimpleNamespace(tqdm=None),
    "einops": SimpleNamespace(rearrange=_rearrange),
}


def taming_module(module: str) -> Any:
    """A module of the package, imported only where it is measured; stand-ins are there for so long."""
    missing = [name for name in _STAND_INS if name not in sys.modules and find_spec(name) is None]
    sys.modules.update({name: _STAND_INS[name] for name in missing})
    try:
        return importlib.import_module(f"taming.modules.{module}")
    except ImportError as error:
        name = "taming-transformers-rom1504"
        raise peers.SkippedError(f"{name} is not installed: pip install --no-deps {name} ({error})") from error
    finally:
        for name in missing:
            del sys.modules[name]
