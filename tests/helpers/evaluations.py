"""Evaluations of tiny priors and a tokenizer, and what they are measured with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.evaluation.measurement import Measurement
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.priors.maskgit import MaskGIT

CODES, IMAGES = 32, 12


def make_prior() -> TokenTransformer:
    torch.manual_seed(1)
    return TokenTransformer(CODES, 16, token_shape=(8, 8), condition_shape=(4, 4), width=16, depth=1, heads=2).eval()


def make_maskgit() -> MaskGIT:
    torch.manual_seed(3)
    return MaskGIT(CODES, 16, token_shape=(8, 8), width=16, depth=1, heads=2).eval()


def make_diffusion() -> VQDiffusion:
    torch.manual_seed(2)
    encoder = WordEncoder(width=16, depth=1, heads=2, max_words=8, buckets=64, truncate=True)
    return VQDiffusion(CODES, token_shape=(8, 8), text_encoder=encoder, num_steps=4, width=16, depth=1, heads=2).eval()


def save_run(folder: Path, model: Any, config: Any) -> Path:
    """Write the files of a training run: weights without a manifest, configuration and architecture."""
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    content = dataclasses.asdict(config) | {"architecture": model.architecture()}
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


class TinyDistance(nn.Module):
    """Stands for LPIPS."""

    name, hash, min_size = "tiny distance", "0" * 12, 4

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        self.trunk = type("Trunk", (), {"label": "tiny"})()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3))


def measure(out: Path, **settings: Any) -> dict[str, Measurement]:
    config = {"data": Path("scenes"), "val_images": IMAGES, "batch_size": 5, "device": "cpu", "workers": 0, **settings}
    return evaluate(EvaluateConfig(out=out, **config))


def values(found: dict[str, Measurement]) -> dict[str, float]:
    return {key: measurement.value for key, measurement in found.items()}
