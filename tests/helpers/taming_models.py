"""taming-transformers' own `VQModel` and `GumbelVQ`, without Lightning, OmegaConf and torchvision."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn


def taming_model(
    kind: str = "VQModel",
    *,
    ch: int = 32,
    ch_mult: tuple[int, ...] = (1, 2),
    resolution: int = 32,
    attn_resolutions: tuple[int, ...] = (16,),
    z_channels: int = 16,
    code_dim: int = 16,
    num_codes: int = 64,
    seed: int = 0,
) -> Any:
    """One of taming's models with random weights and spread codes, in evaluation mode; its loss has a discriminator."""
    pytest.importorskip("einops")
    pytest.importorskip("taming")
    stand_ins: dict[str, Any] = {
        "pytorch_lightning": SimpleNamespace(LightningModule=nn.Module),
        "taming.main": SimpleNamespace(instantiate_from_config=lambda build: build()),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        models = importlib.import_module("taming.models.vqgan")
    sizes = {"in_channels": 3, "out_ch": 3, "double_z": False, "num_res_blocks": 1, "dropout": 0.0}
    sizes |= {"ch": ch, "ch_mult": ch_mult, "resolution": resolution, "attn_resolutions": attn_resolutions}
    extra = {"temperature_scheduler_config": lambda: None} if kind == "GumbelVQ" else {}
    torch.manual_seed(seed)
    model = getattr(models, kind)(sizes | {"z_channels": z_channels}, _Loss, num_codes, code_dim, **extra)
    embedding = model.quantize.embed if kind == "GumbelVQ" else model.quantize.embedding
    nn.init.normal_(embedding.weight, std=0.5)
    for norm in model.modules():  # trained ones have these
        if isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    return model.eval()


def tokens_and_images(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, h, w) of one of taming's models and its reconstruction of them, without the noise of `GumbelVQ`."""
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(images))
        batch, channels, height, width = latents.shape
        if hasattr(model.quantize, "proj"):
            tokens = model.quantize.proj(latents).argmax(1)
            codes = model.quantize.get_codebook_entry(tokens.flatten(), (batch, height, width, channels))
            return tokens, model.decode(codes)
        codes, _, (_, _, tokens) = model.quantize(latents)
        return tokens.view(batch, height, width), model.decode(codes)


class _Loss(nn.Module):
    """The parts of taming's loss that leave weights in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        discriminators = importlib.import_module("taming.modules.discriminator.model")
        self.discriminator = discriminators.NLayerDiscriminator(ndf=8, n_layers=2).apply(discriminators.weights_init)
        self.perceptual_loss = nn.Linear(2, 2)
