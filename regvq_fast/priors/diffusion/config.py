"""Configuration of the diffusion prior, and its named presets."""

from dataclasses import dataclass, field

from regvq_fast.config.common import OptimizerConfig, PresetName, RunConfig, check_at_least
from regvq_fast.priors.config import PriorConfig, check_prior_config, check_probabilities


@dataclass(frozen=True)
class DiffusionModelConfig:
    """Diffusion network and its condition."""

    text_encoder: str = "words"
    """"words": an encoder of words that learns with the prior.
    Else a frozen one of Hugging Face's transformers, by name or folder (the paper's: openai/clip-vit-base-patch32)."""
    diffusion_steps: int = 100
    """Steps T of the diffusion."""
    width: int = 192
    """Channels."""
    depth: int = 4
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    dropout: float = 0.0
    """Dropout behind attention and MLP."""
    auxiliary_weight: float = 5e-4
    """Weight of the cross-entropy of x_0 beside the variational bound."""
    caption_dropout: float = 0.1
    """Fraction of the images that lose their caption, for classifier-free guidance."""


@dataclass(frozen=True)
class DiffusionConfig(PriorConfig):
    """A run of ``train/diffusion.py``."""

    model: DiffusionModelConfig = field(default_factory=DiffusionModelConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-diffusion"


def _vq_diffusion_b(preset: PresetName) -> DiffusionConfig:
    """The paper's setting (section 4.1): VQ-Diffusion-B under CLIP's text features."""
    return DiffusionConfig(
        run=RunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        model=DiffusionModelConfig(text_encoder="openai/clip-vit-base-patch32", width=1024, depth=19, heads=16),
        # VQ-Diffusion averages weights by 0.99 every 25 steps: 0.99 ** (1 / 25) in every step.
        optimizer=OptimizerConfig(epochs=100, batch_size=40, warmup_steps=1000, ema=0.9996),
    )


DIFFUSION_PRESETS: dict[str, DiffusionConfig] = {
    # For two CPU cores. So few steps see each kind of noise too seldom to learn from the bound alone
    # (docs/failed-ideas.md).
    "scenes": DiffusionConfig(
        model=DiffusionModelConfig(auxiliary_weight=0.1),
        optimizer=OptimizerConfig(steps=1000, batch_size=16, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1),
    ),
    "cub200": _vq_diffusion_b("cub200"),
    "coco": _vq_diffusion_b("coco"),
}


def check_diffusion_config(config: DiffusionConfig) -> None:
    """Raise ValueError if the configuration contradicts itself."""
    check_prior_config(config)
    check_at_least(0, {"--auxiliary-weight": config.model.auxiliary_weight})
    check_probabilities({"--caption-dropout": config.model.caption_dropout})
    if config.model.diffusion_steps < 2:
        raise ValueError(f"--diffusion-steps must be at least 2, got {config.model.diffusion_steps}")
