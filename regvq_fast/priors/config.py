"""Base classes of the configurations of priors."""

from dataclasses import dataclass, field
from typing import Annotated

from regvq_fast.config.sections import UNTITLED, OptimizerConfig, OptionalPath, RunConfig, TrainConfig
from regvq_fast.data.samples import Crop
from regvq_fast.priors.conditions import Condition
from regvq_fast.settings import Section, changed_flags, check_at_least, check_probabilities


@dataclass(frozen=True)
class TokensConfig(Section):
    """Source of the tokens."""

    cache: OptionalPath = None
    """Token cache, made by regvq tokens."""
    on_the_fly: bool = False
    """Encode images in every step with --tokenizer, without a cache."""
    tokenizer: OptionalPath = None
    """Tokenizer: run, checkpoint, folder or ORGANIZATION/NAME on the hub. Default: the cache's."""
    condition: Condition | None = None
    """Condition of an image. Default: the first kind that 95 % of the images have."""
    data: OptionalPath = None
    """on the fly: images, as for regvq train vq. Default: the embedded scenes."""
    crop: Crop = "center"
    """on the fly: training crop of a folder's images."""
    flip: bool = True
    """on the fly: mirror half of a folder's training images."""
    val_images: int = 512
    """on the fly: maximum number of validation images."""

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--val-images": self.val_images})
        if self.on_the_fly and self.cache is not None:
            raise ValueError(f"--on-the-fly and --cache {self.cache} exclude each other: give one")
        if not self.on_the_fly and self.cache is None:
            raise ValueError(
                "give a token cache with --cache (`regvq tokens` makes one), or --on-the-fly with --tokenizer"
            )
        if self.on_the_fly and self.tokenizer is None:
            raise ValueError("--on-the-fly needs a tokenizer: give the run of `regvq train vq` with --tokenizer")
        if not self.on_the_fly and (flags := changed_flags(self, ("data", "crop", "flip", "val_images"))):
            raise ValueError(f"{flags[0]} is for --on-the-fly: the images of the cache {self.cache} are fixed")


@dataclass(frozen=True)
class TransformerConfig(Section):
    """Transformer of a prior."""

    width: int = 192
    """Channels."""
    depth: int = 4
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    dropout: float = 0.0
    """Dropout rate."""
    condition_dropout: float = 0.1
    """Fraction of images trained without condition, for classifier-free guidance."""

    def check(self) -> None:
        super().check()
        check_probabilities({"--condition-dropout": self.condition_dropout})


@dataclass(frozen=True)
class PriorRunConfig(RunConfig):
    """Run."""

    shard: bool = False
    """Split weights and optimizer states among the ranks (FSDP)."""

    def check(self) -> None:
        super().check()
        if self.shard and self.find_batch_size:
            raise ValueError("--find-batch-size measures one GPU with the whole model: leave out --shard")


@dataclass(frozen=True)
class PriorOptimizerConfig(OptimizerConfig):
    """Optimization."""

    muon: bool = False
    """Muon instead of AdamW for the matrices of the Transformer blocks."""


@dataclass(frozen=True)
class PriorConfig(TrainConfig):
    """A run of a prior; each prior adds its network."""

    run: Annotated[PriorRunConfig, UNTITLED] = field(default_factory=PriorRunConfig)
    optimizer: Annotated[PriorOptimizerConfig, UNTITLED] = field(default_factory=PriorOptimizerConfig)
    tokens: Annotated[TokensConfig, UNTITLED] = field(default_factory=TokensConfig)

    def check(self) -> None:
        super().check()
        if self.run.shard and self.optimizer.muon:
            raise ValueError("--shard splits the matrices that --muon needs whole: give --no-muon or leave out --shard")
        if self.tokens.on_the_fly:
            self.check_images(self.tokens.data)
