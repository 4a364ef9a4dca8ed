"""Configuration of the autoregressive prior, and its named presets."""

from dataclasses import dataclass, field

from regvq_fast.config.common import OptimizerConfig, PresetName, RunConfig
from regvq_fast.priors.config import PriorConfig, check_prior_config, check_probabilities


@dataclass(frozen=True)
class TransformerConfig:
    """Autoregressive transformer."""

    num_classes: int | None = None
    """Ids of the semantic maps. Not given: as many as the cache or the data set has."""
    width: int = 192
    """Channels."""
    depth: int = 4
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    dropout: float = 0.0
    """Dropout on embeddings and behind attention and MLP."""
    keep: float = 1.0
    """Probability that the network sees a true token; otherwise it sees a random one (taming's pkeep)."""
    condition_dropout: float = 0.1
    """Fraction of the images that lose their condition, for classifier-free guidance."""


@dataclass(frozen=True)
class ARConfig(PriorConfig):
    """A run of ``train/ar.py``."""

    model: TransformerConfig = field(default_factory=TransformerConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-ar"


def _paper(preset: PresetName, num_classes: int) -> ARConfig:
    """The paper's setting (section 4.1), with the sizes of taming's transformer for semantic synthesis."""
    return ARConfig(
        run=RunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        model=TransformerConfig(num_classes=num_classes, width=1024, depth=24, heads=16, condition_dropout=0.0),
        optimizer=OptimizerConfig(epochs=50, batch_size=40, warmup_steps=1000),
    )


AR_PRESETS: dict[str, ARConfig] = {
    # About ten minutes on two CPU cores: 256 positions of the map and 256 tokens an image.
    "scenes": ARConfig(
        optimizer=OptimizerConfig(steps=600, batch_size=16, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1)
    ),
    "ade20k": _paper("ade20k", num_classes=151),
    "celebahq": _paper("celebahq", num_classes=19),
}


def check_ar_config(config: ARConfig) -> None:
    """Raise ValueError if the configuration contradicts itself."""
    check_prior_config(config)
    check_probabilities({"--keep": config.model.keep, "--condition-dropout": config.model.condition_dropout})
