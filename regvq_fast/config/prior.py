"""Everything a run of a prior over tokens can be told, and the named presets."""

from dataclasses import dataclass, field
from pathlib import Path

from regvq_fast.config.common import (
    OptimizerConfig,
    PresetName,
    RunConfig,
    TrainConfig,
    changed_flags,
    check_at_least,
    check_common,
    check_images,
)
from regvq_fast.data.samples import Crop


@dataclass(frozen=True)
class TokensConfig:
    """Where tokens come from."""

    cache: Path | None = None
    """Token cache, made by train/cache_tokens.py."""
    on_the_fly: bool = False
    """Make tokens of images in every step instead; needs `tokenizer`."""
    tokenizer: Path | None = None
    """Trained tokenizer: a run of train/vq.py, a checkpoint, or a folder of VQGAN.save_pretrained.
    Not given: the one that the cache names."""
    data: Path | None = None
    """on the fly: folder of images, or tar shards. Not given: the embedded scenes."""
    crop: Crop = "center"
    """on the fly: training crop of a folder's images; center is that of FID's reference images."""
    flip: bool = True
    """on the fly: mirror half of the training images of a folder."""
    val_images: int = 512
    """on the fly: most validation images an evaluation uses."""


@dataclass(frozen=True)
class PriorConfig(TrainConfig):
    """A run of a prior; each of them adds its network."""

    tokens: TokensConfig = field(default_factory=TokensConfig)


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
    """Share of the images that lose their condition, for classifier-free guidance."""


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
    """Share of the images that lose their caption, for classifier-free guidance."""


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


def _check_shared(config: PriorConfig) -> None:
    """Raise ValueError for what is wrong with the common sections, or with the source of the tokens."""
    check_common(config)
    tokens = config.tokens
    check_at_least(1, {"--val-images": tokens.val_images})
    if tokens.on_the_fly and tokens.cache is not None:
        raise ValueError(f"--on-the-fly and --cache {tokens.cache} exclude each other: take one")
    if not tokens.on_the_fly and tokens.cache is None:
        raise ValueError(
            "give a token cache with --cache (train/cache_tokens.py makes one), or --on-the-fly with --tokenizer"
        )
    if tokens.on_the_fly and tokens.tokenizer is None:
        raise ValueError("--on-the-fly needs a tokenizer: give the run of train/vq.py with --tokenizer")
    if tokens.on_the_fly:
        check_images(config, tokens.data)
        return
    if flags := changed_flags(tokens, ("data", "crop", "flip", "val_images")):
        raise ValueError(f"{flags[0]} is for --on-the-fly: the cache {tokens.cache} was made of images of its own")


def check_ar_config(config: ARConfig) -> None:
    """Raise ValueError for what no single module can see."""
    _check_shared(config)
    _check_probabilities({"--keep": config.model.keep, "--condition-dropout": config.model.condition_dropout})


def check_diffusion_config(config: DiffusionConfig) -> None:
    """Raise ValueError for what no single module can see."""
    _check_shared(config)
    check_at_least(0, {"--auxiliary-weight": config.model.auxiliary_weight})
    _check_probabilities({"--caption-dropout": config.model.caption_dropout})
    if config.model.diffusion_steps < 2:
        raise ValueError(f"--diffusion-steps must be at least 2, got {config.model.diffusion_steps}")


def _check_probabilities(values: dict[str, float]) -> None:
    for flag, probability in values.items():
        if not 0 <= probability <= 1:
            raise ValueError(f"{flag} is a probability and must lie in [0, 1], got {probability}")
