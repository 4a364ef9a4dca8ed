"""Configuration of a tokenizer run, with one dataclass per concern, and its presets."""

import contextlib
import functools
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Annotated, Literal, get_args

from tyro.conf import FlagCreatePairsOff, arg

from regvq_fast.config.sections import (
    UNTITLED,
    OptimizerConfig,
    OptionalFloat,
    OptionalInt,
    OptionalPath,
    PresetName,
    RunConfig,
    TrainConfig,
    check_adamw,
)
from regvq_fast.data.samples import Crop
from regvq_fast.losses.adversarial import ADVERSARIAL_LOSSES
from regvq_fast.quantizers import QUANTIZERS, QuantizerSettings
from regvq_fast.settings import Section, check_at_least

FrozenPart = Literal["encoder", "decoder", "codebook"]

_MIN_IMAGE_SIZE = 16


@dataclass(frozen=True)
class DataConfig(Section):
    """Images."""

    data: OptionalPath = None
    """Folder of images, tar shards or parquet, "a-{0..9}.tar", or hf:ORG/NAME. Default: the embedded scenes."""
    image_size: int = 64
    """Side of the square images in pixels."""
    crop: Crop = "random-resized"
    """Training crop of a folder's images."""
    flip: bool = True
    """Mirror half of the training images."""
    val_images: int = 512
    """Maximum number of validation images."""

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--val-images": self.val_images})
        if self.image_size < _MIN_IMAGE_SIZE:
            raise ValueError(
                f"--image-size must be at least {_MIN_IMAGE_SIZE} (for SSIM and VGG), got {self.image_size}"
            )


@dataclass(frozen=True)
class ModelConfig(Section):
    """Autoencoder and discriminator."""

    init_from: Annotated[str | None, arg(metavar="X")] = None
    """Start from a run, a folder, a hub id or a .ckpt."""
    reset_codebook: FlagCreatePairsOff[bool] = False
    """New codebook, made from the first latents."""
    freeze: Annotated[tuple[FrozenPart, ...], arg(metavar="PART ...")] = ()
    """Parts not to train: encoder, decoder, codebook."""
    ch: int = 32
    """Base width of encoder and decoder."""
    ch_mult: Annotated[tuple[int, ...], arg(metavar="N ...")] = (1, 1, 2)
    """Width of each level, as a multiple of ch."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attn_resolutions: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """Resolutions with attention, besides the lowest."""
    z_channels: int = 64
    """Channels of the encoder's output."""
    dropout: float = 0.0
    """Dropout in residual blocks."""
    norm_groups: OptionalInt = None
    """Groups of GroupNorm; None: 32 or fewer."""
    disc_filters: int = 32
    """Base width of the discriminator."""
    disc_layers: int = 2
    """Down-samplings of the discriminator."""
    disc_norm: Literal["batch", "group", "none"] = "batch"
    """Normalization of the discriminator."""

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--disc-filters": self.disc_filters, "--disc-layers": self.disc_layers})
        unknown = set(self.freeze) - set(get_args(FrozenPart))
        if unknown:
            raise ValueError(f"--freeze takes {', '.join(get_args(FrozenPart))}, got {', '.join(sorted(unknown))}")
        flag = "--reset-codebook" if self.reset_codebook else f"--freeze {' '.join(self.freeze)}"
        if self.init_from is None and (self.reset_codebook or self.freeze):
            raise ValueError(f"{flag} needs the weights of a trained model: name them with --init-from")

    def check_image_size(self, size: int) -> int:
        """Return the side of an image's token map; ValueError if the down-sampling does not divide ``size``."""
        factor = 2 ** (len(self.ch_mult) - 1)
        if size < factor or size % factor:
            raise ValueError(
                f"--image-size {size} is not a multiple of the down-sampling factor {factor}; "
                f"try {max(factor, round(size / factor) * factor)}"
            )
        return size // factor


@dataclass(frozen=True)
class QuantizerConfig(Section):
    """Settings of all quantizers. `quantizer_section` adds those of one quantizer; sizes are then its actual ones."""

    quantizer: Literal[tuple(QUANTIZERS)] = next(iter(QUANTIZERS))  # type: ignore[valid-type]
    """Reg-VQ or baseline; add --help for its flags."""
    num_codes: int = 256
    """Codebook size N."""
    code_dim: int = 32
    """Channels D of a code; ignored by fsq, lfq and bsq."""
    fp32_scores: bool = False
    """Scores in fp32 on a GPU even under --amp."""
    collapse_threshold: Annotated[float, arg(metavar="X")] = 0.1
    """Warn below this fraction of uniform use; 0: off."""

    def __post_init__(self) -> None:
        if not isinstance(self, QuantizerSettings):
            return
        with contextlib.suppress(ValueError):  # `check` raises it, when all flags are set
            num_codes, code_dim = self.sizes(self.num_codes, self.code_dim)
            object.__setattr__(self, "num_codes", num_codes)
            object.__setattr__(self, "code_dim", code_dim)

    def check(self) -> None:
        super().check()
        if not 0 <= self.collapse_threshold <= 1:
            raise ValueError(f"--collapse-threshold must be between 0 and 1, got {self.collapse_threshold}")
        settings = self.settings()
        settings.check()
        settings.sizes(self.num_codes, self.code_dim)

    def settings(self) -> QuantizerSettings:
        """Return the quantizer's own settings."""
        return QUANTIZERS[self.quantizer].settings_of(self)

    def changed_to(self, quantizer: str) -> "QuantizerConfig":
        """Return the section of another quantizer, which keeps the settings that both have."""
        if quantizer == self.quantizer and isinstance(self, QUANTIZERS[quantizer].Settings):
            return self
        kind = quantizer_section(quantizer)
        shared = {item.name: getattr(self, item.name) for item in fields(kind) if hasattr(self, item.name)}
        return kind(**shared | {"quantizer": quantizer})


@functools.cache
def quantizer_section(quantizer: str) -> type[QuantizerConfig]:
    """Return the class of a quantizer's section: the common settings and its own, as flags."""
    # With several bases, the fields of the last one come first.
    bases = QUANTIZERS[quantizer].Settings, QuantizerConfig
    own = {"__doc__": "Quantizer.", "check": QuantizerConfig.check}
    name = ("quantizer", QuantizerConfig.__annotations__["quantizer"], quantizer)
    return make_dataclass("QuantizerConfig", (name,), bases=bases, namespace=own, frozen=True)


@dataclass(frozen=True)
class LossConfig(Section):
    """Losses."""

    l1_weight: float = 1.0
    """Weight of the mean absolute pixel error."""
    l2_weight: float = 0.0
    """Weight of the mean squared pixel error."""
    perceptual_weight: Annotated[float, arg(metavar="X")] = 1.0
    """Weight of LPIPS."""
    perceptual_net: Literal["vgg16", "vgg19"] = "vgg16"
    """Feature network of LPIPS."""
    perceptual_weights: OptionalPath = None
    """LPIPS weights: file or "random". Default: torch hub."""
    contrastive: Literal["pcl", "cl", "none"] = "pcl"
    """Contrastive loss: Eq. 3 (pcl), Eq. 2 or none."""
    contrastive_weight: Annotated[float, arg(metavar="X")] = 0.02
    """Weight of the contrastive loss."""
    contrastive_region: Literal["all", "masked"] = "all"
    """Positions with a positive: all, or masked ones."""
    contrastive_sampling: Literal["dense", "sampled"] = "sampled"
    """All positions of a feature map, or a sample."""
    contrastive_patches: Annotated[int, arg(metavar="N")] = 256
    """Sampled positions per image and layer."""
    contrastive_net: Literal["same", "vgg16", "vgg19"] = "same"
    """Feature network; same: that of LPIPS."""
    contrastive_weights: OptionalPath = None
    """Weights file of --contrastive-net."""
    disc_weight: float = 0.8
    """Weight of the adversarial loss, times lambda."""
    disc_start: OptionalInt = None
    """First step with the discriminator; None: never."""
    disc_loss: Literal[tuple(ADVERSARIAL_LOSSES)] = next(iter(ADVERSARIAL_LOSSES))  # type: ignore[valid-type]
    """Adversarial loss."""
    disc_lr: OptionalFloat = None
    """Learning rate of the discriminator; None: --lr."""
    disc_betas: Annotated[tuple[float, float] | None, arg(metavar="X X")] = None
    """Betas of the discriminator; None: --betas."""
    lecam_weight: Annotated[float, arg(metavar="X")] = 0.0
    """Weight of LeCAM on the discriminator; 0: off."""
    r1_weight: float = 0.0
    """Weight of R1 on the discriminator; 0: off."""
    r1_every: int = 16
    """Steps between R1 penalties, scaled to match."""

    @property
    def has_contrastive(self) -> bool:
        """True if there is a contrastive loss with a weight above 0; with weight 0 it is not computed."""
        return self.contrastive != "none" and self.contrastive_weight > 0

    @property
    def has_own_contrastive_net(self) -> bool:
        """True if the contrastive loss does not use the perceptual loss's feature network."""
        return self.has_contrastive and self.contrastive_net not in ("same", self.perceptual_net)

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--r1-every": self.r1_every})
        check_at_least(
            0,
            {
                "--l1-weight": self.l1_weight,
                "--l2-weight": self.l2_weight,
                "--perceptual-weight": self.perceptual_weight,
                "--contrastive-weight": self.contrastive_weight,
                "--disc-weight": self.disc_weight,
                "--disc-start": self.disc_start or 0,
                "--lecam-weight": self.lecam_weight,
                "--r1-weight": self.r1_weight,
            },
        )
        check_adamw("--disc-lr", self.disc_lr, "--disc-betas", self.disc_betas)
        if self.contrastive != "none" and self.contrastive_patches < 2:
            raise ValueError(
                f"--contrastive-patches must be at least 2, since one has no negatives, got {self.contrastive_patches}"
            )
        if self.contrastive_weights is not None and not self.has_own_contrastive_net:
            serves = f"with --contrastive-net {self.contrastive_net} the perceptual one serves both"
            why = f"{serves}; use --perceptual-weights" if self.has_contrastive else "there is no contrastive loss"
            raise ValueError(f"--contrastive-weights {self.contrastive_weights} is not used: {why}")


@dataclass(frozen=True)
class VQGANConfig(TrainConfig):
    """A run of ``regvq train vq``."""

    data: Annotated[DataConfig, UNTITLED] = field(default_factory=DataConfig)
    quantizer: Annotated[QuantizerConfig, UNTITLED] = field(default_factory=quantizer_section(next(iter(QUANTIZERS))))
    model: Annotated[ModelConfig, UNTITLED] = field(default_factory=ModelConfig)
    loss: Annotated[LossConfig, UNTITLED] = field(default_factory=LossConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-{self.quantizer.quantizer}"

    def check(self) -> None:
        super().check()
        section, loss = self.quantizer, self.loss
        side = self.model.check_image_size(self.data.image_size)
        if loss.has_contrastive and loss.contrastive_region == "masked":
            try:
                section.settings().check_mask(side**2)
            except ValueError as error:
                raise ValueError(
                    f"--contrastive-region masked needs stochastic tokens, but with --quantizer {section.quantizer} "
                    f"{error}, or use the region all"
                ) from None
        self.check_images(self.data.data)


def _paper(preset: PresetName, epochs: int) -> VQGANConfig:
    """Return the paper's setting (section 4.1) for taming's VQGAN: 256 px, 16 x 16 tokens, 1024 codes, D = 256."""
    return VQGANConfig(
        run=RunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        data=DataConfig(image_size=256, val_images=5000),
        quantizer=quantizer_section("reg-vq")(num_codes=1024, code_dim=256),
        model=ModelConfig(
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            z_channels=256,
            disc_filters=64,
            disc_layers=3,
        ),
        loss=LossConfig(contrastive_net="vgg19", disc_start=10_000),
        optimizer=OptimizerConfig(steps=None, epochs=epochs, batch_size=40, warmup_steps=1000),
    )


def _imagenet() -> VQGANConfig:
    """Return the paper's model with the codebook size and schedule of LlamaGen's tokenizers (Sun et al. 2024)."""
    config = _paper("imagenet", epochs=40)
    return replace(
        config,
        quantizer=replace(config.quantizer, num_codes=16384),
        loss=replace(config.loss, disc_start=20_000),
        optimizer=replace(config.optimizer, batch_size=128, lr=1e-4, betas=(0.9, 0.95)),
    )


VQGAN_PRESETS: dict[str, VQGANConfig] = {
    # A few minutes on two CPU cores; the small model needs a larger learning rate (docs/sweeps.md).
    "scenes": VQGANConfig(optimizer=OptimizerConfig(steps=600, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1)),
    "ade20k": _paper("ade20k", epochs=100),
    "celebahq": _paper("celebahq", epochs=60),
    "cub200": _paper("cub200", epochs=300),
    "coco": _paper("coco", epochs=50),
    "imagenet": _imagenet(),
}
