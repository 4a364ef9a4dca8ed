"""Configuration of the diffusion prior, and its named presets."""

from dataclasses import dataclass, field
from typing import Annotated

from regvq_fast.config.sections import UNTITLED, PresetName
from regvq_fast.priors.config import PriorConfig, PriorOptimizerConfig, PriorRunConfig, TransformerConfig
from regvq_fast.settings import check_at_least


@dataclass(frozen=True)
class DiffusionModelConfig(TransformerConfig):
    """Diffusion network and its condition."""

    text_encoder: str = "words"
    """Caption encoder: words (trained with the prior), or a frozen model of transformers."""
    diffusion_steps: int = 100
    """Diffusion steps T."""
    auxiliary_weight: float = 5e-4
    """Weight of the cross-entropy of x_0, added to the variational bound."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"--auxiliary-weight": self.auxiliary_weight})
        if self.diffusion_steps < 2:
            raise ValueError(f"--diffusion-steps must be at least 2, got {self.diffusion_steps}")


@dataclass(frozen=True)
class DiffusionConfig(PriorConfig):
    """A run of ``regvq train diffusion``."""

    model: Annotated[DiffusionModelConfig, UNTITLED] = field(default_factory=DiffusionModelConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-diffusion"


def _vq_diffusion_b(preset: PresetName) -> DiffusionConfig:
    """Return the paper's setting (section 4.1): VQ-Diffusion-B with CLIP's text features."""
    return DiffusionConfig(
        run=PriorRunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        model=DiffusionModelConfig(text_encoder="openai/clip-vit-base-patch32", width=1024, depth=19, heads=16),
        # VQ-Diffusion averages weights by 0.99 every 25 steps: 0.99 ** (1 / 25) in every step.
        optimizer=PriorOptimizerConfig(epochs=100, batch_size=40, warmup_steps=1000, ema=0.9996),
    )


DIFFUSION_PRESETS: dict[str, DiffusionConfig] = {
    # For two CPU cores. So few steps sample each noise level too rarely to learn from the bound alone
    # (docs/failed-ideas.md).
    "scenes": DiffusionConfig(
        model=DiffusionModelConfig(auxiliary_weight=1.0),
        optimizer=PriorOptimizerConfig(
            steps=2000, batch_size=16, lr=2e-3, warmup_steps=50, final_lr_fraction=0.1, muon=True
        ),
    ),
    "cub200": _vq_diffusion_b("cub200"),
    "coco": _vq_diffusion_b("coco"),
    "imagenet": _vq_diffusion_b("imagenet"),  # by label
}
