"""Configuration of the masked prior, and its named presets."""

from dataclasses import dataclass, field
from typing import Annotated

from regvq_fast.config.sections import UNTITLED
from regvq_fast.priors.class_ids import ClassIdModelConfig
from regvq_fast.priors.config import PriorConfig, PriorOptimizerConfig, PriorRunConfig
from regvq_fast.settings import check_probabilities


@dataclass(frozen=True)
class MaskGITModelConfig(ClassIdModelConfig):
    """Bidirectional transformer."""

    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""

    def check(self) -> None:
        super().check()
        check_probabilities({"--label-smoothing": self.label_smoothing})


@dataclass(frozen=True)
class MaskGITConfig(PriorConfig):
    """A run of ``regvq train maskgit``."""

    model: Annotated[MaskGITModelConfig, UNTITLED] = field(default_factory=MaskGITModelConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-maskgit"


MASKGIT_PRESETS: dict[str, MaskGITConfig] = {
    # For ten minutes on two CPU cores, estimated from 17 images/s on one core.
    "scenes": MaskGITConfig(
        model=MaskGITModelConfig(label_smoothing=0.0),
        optimizer=PriorOptimizerConfig(steps=1000, batch_size=16, lr=2e-3, warmup_steps=50, final_lr_fraction=0.1),
    ),
    # Section 4.1 of the MaskGIT paper; warm-up and weight decay are from its code.
    "imagenet": MaskGITConfig(
        run=PriorRunConfig(preset="imagenet", image_every=1000, log_every=50, checkpoint_every=1000),
        model=MaskGITModelConfig(width=768, depth=24, heads=8, dropout=0.1),
        optimizer=PriorOptimizerConfig(
            epochs=300, batch_size=256, lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045, warmup_steps=5000
        ),
    ),
}
