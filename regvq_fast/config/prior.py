"""Configurations of the priors over tokens, and the named presets."""

from dataclasses import dataclass, field
from typing import Annotated

from regvq_fast.config.sections import (
    UNTITLED,
    OptimizerConfig,
    OptionalInt,
    OptionalPath,
    PresetName,
    RunConfig,
    TrainConfig,
)
from regvq_fast.data.pictures import Crop
from regvq_fast.settings import Section, changed_flags, check_at_least, check_probabilities


@dataclass(frozen=True)
class TokensConfig(Section):
    """Source of the tokens."""

    cache: OptionalPath = None
    """Token cache, made by train/cache_tokens.py."""
    on_the_fly: bool = False
    """Make tokens of images in each step, by --tokenizer."""
    tokenizer: OptionalPath = None
    """Tokenizer: run, checkpoint or folder of VQGAN.save_pretrained. Default: the cache's."""
    data: OptionalPath = None
    """on the fly: images, as for train/vq.py. Default: the embedded scenes."""
    crop: Crop = "center"
    """on the fly: training crop of a folder's images."""
    flip: bool = True
    """on the fly: mirror half of a folder's training images."""
    val_images: int = 512
    """on the fly: largest number of validation images."""

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--val-images": self.val_images})
        if self.on_the_fly and self.cache is not None:
            raise ValueError(f"--on-the-fly and --cache {self.cache} exclude each other: take one")
        if not self.on_the_fly and self.cache is None:
            raise ValueError(
                "give a token cache with --cache (train/cache_tokens.py makes one), or --on-the-fly with --tokenizer"
            )
        if self.on_the_fly and self.tokenizer is None:
            raise ValueError("--on-the-fly needs a tokenizer: give the run of train/vq.py with --tokenizer")
        if not self.on_the_fly and (flags := changed_flags(self, ("data", "crop", "flip", "val_images"))):
            raise ValueError(f"{flags[0]} is for --on-the-fly: the cache {self.cache} was made of images of its own")


@dataclass(frozen=True)
class PriorConfig(TrainConfig):
    """A run of a prior; each of them adds its network."""

    tokens: Annotated[TokensConfig, UNTITLED] = field(default_factory=TokensConfig)

    def check(self) -> None:
        super().check()
        if self.tokens.on_the_fly:
            self.check_images(self.tokens.data)


@dataclass(frozen=True)
class TransformerConfig(Section):
    """Autoregressive transformer."""

    num_classes: OptionalInt = None
    """Class ids of the maps. Default: those of the cache or data set."""
    width: int = 192
    """Channels."""
    depth: int = 4
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and MLP."""
    keep: float = 1.0
    """Probability that an input token is not replaced by a random one (taming's pkeep)."""
    condition_dropout: float = 0.1
    """Fraction of images without their condition, for classifier-free guidance."""

    def check(self) -> None:
        super().check()
        check_probabilities({"--keep": self.keep, "--condition-dropout": self.condition_dropout})


@dataclass(frozen=True)
class DiffusionModelConfig(Section):
    """Diffusion network and its condition."""

    text_encoder: str = "words"
    """words (trained with the prior), or a frozen one of transformers, by name or folder."""
    diffusion_steps: int = 100
    """Diffusion steps T."""
    width: int = 192
    """Channels."""
    depth: int = 4
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    dropout: float = 0.0
    """Dropout of attention and MLP."""
    auxiliary_weight: float = 5e-4
    """Weight of the cross-entropy of x_0, besides the variational bound."""
    caption_dropout: float = 0.1
    """Fraction of images without their caption, for classifier-free guidance."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"--auxiliary-weight": self.auxiliary_weight})
        check_probabilities({"--caption-dropout": self.caption_dropout})
        if self.diffusion_steps < 2:
            raise ValueError(f"--diffusion-steps must be at least 2, got {self.diffusion_steps}")


@dataclass(frozen=True)
class ARConfig(PriorConfig):
    """A run of ``train/ar.py``."""

    model: Annotated[TransformerConfig, UNTITLED] = field(default_factory=TransformerConfig)

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


@dataclass(frozen=True)
class DiffusionConfig(PriorConfig):
    """A run of ``train/diffusion.py``."""

    model: Annotated[DiffusionModelConfig, UNTITLED] = field(default_factory=DiffusionModelConfig)

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
