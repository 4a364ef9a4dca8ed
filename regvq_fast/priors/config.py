"""Base of the configurations of priors: the source of their tokens."""

from dataclasses import dataclass, field
from pathlib import Path

from regvq_fast.config.common import (
    TrainConfig,
    changed_flags,
    check_at_least,
    check_common,
    check_images,
)
from regvq_fast.data.samples import Crop


@dataclass(frozen=True)
class TokensConfig:
    """Source of the tokens."""

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


def check_prior_config(config: PriorConfig) -> None:
    """Raise ValueError if the common sections or the source of the tokens contradict themselves."""
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


def check_probabilities(values: dict[str, float]) -> None:
    """Raise ValueError if one of the values, by flag, is not a probability."""
    for flag, probability in values.items():
        if not 0 <= probability <= 1:
            raise ValueError(f"{flag} is a probability and must lie in [0, 1], got {probability}")
