"""Configuration of the autoregressive prior, and its named presets."""

from dataclasses import dataclass, field
from typing import Annotated

from regvq_fast.config.sections import UNTITLED, PresetName
from regvq_fast.priors.autoregressive.model import Arch
from regvq_fast.priors.class_ids import ClassIdModelConfig
from regvq_fast.priors.config import PriorConfig, PriorOptimizerConfig, PriorRunConfig
from regvq_fast.settings import check_probabilities


@dataclass(frozen=True)
class ARModelConfig(ClassIdModelConfig):
    """Autoregressive transformer."""

    arch: Arch = "taming"
    """Blocks and position embeddings of taming-transformers or of LlamaGen."""
    keep: float = 1.0
    """Probability of keeping an input token instead of a random one (taming's pkeep)."""

    def check(self) -> None:
        super().check()
        check_probabilities({"--keep": self.keep})


@dataclass(frozen=True)
class ARConfig(PriorConfig):
    """A run of ``regvq train ar``."""

    model: Annotated[ARModelConfig, UNTITLED] = field(default_factory=ARModelConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-ar"


def _paper(preset: PresetName, num_classes: int) -> ARConfig:
    """Return the paper's setting (section 4.1), with the sizes of taming's transformer for semantic synthesis."""
    return ARConfig(
        run=PriorRunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        model=ARModelConfig(num_classes=num_classes, width=1024, depth=24, heads=16, condition_dropout=0.0),
        optimizer=PriorOptimizerConfig(epochs=50, batch_size=40, warmup_steps=1000),
    )


AR_PRESETS: dict[str, ARConfig] = {
    # About ten minutes on two CPU cores: 256 positions of the map and 256 tokens an image.
    "scenes": ARConfig(
        optimizer=PriorOptimizerConfig(steps=600, batch_size=16, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1)
    ),
    "ade20k": _paper("ade20k", num_classes=151),
    "celebahq": _paper("celebahq", num_classes=19),
    # By label; sizes and schedule of LlamaGen-L (Sun et al. 2024).
    "imagenet": ARConfig(
        run=PriorRunConfig(preset="imagenet", image_every=1000, log_every=50, checkpoint_every=1000),
        model=ARModelConfig(arch="llama", width=1024, depth=24, heads=16, dropout=0.1),
        optimizer=PriorOptimizerConfig(epochs=300, batch_size=256, lr=1e-4, weight_decay=0.05, warmup_steps=1000),
    ),
}
