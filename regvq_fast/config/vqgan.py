"""Everything a tokenizer run can be told: one dataclass a concern, and the named presets."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regvq_fast.config.common import (
    OptimizerConfig,
    PresetName,
    RunConfig,
    TrainConfig,
    check_at_least,
    check_common,
    check_images,
)
from regvq_fast.quantizers import QUANTIZERS

_MIN_IMAGE_SIZE = 16


@dataclass(frozen=True)
class DataConfig:
    """Images."""

    data: Path | None = None
    """Folder of images or of tar shards (webdataset's layout), searched recursively; or a pattern of shards in quotes.
    An example of a pattern is "shards-{000000..000099}.tar".
    Not given: the embedded scenes, composed of real photographs."""
    image_size: int = 64
    """Side of the square images, in pixels; a multiple of the down-sampling factor."""
    crop: Literal["random-resized", "center"] = "random-resized"
    """Training crop of a folder's images."""
    flip: bool = True
    """Mirror half of the training images of a folder."""
    val_images: int = 512
    """Most validation images an evaluation uses."""


@dataclass(frozen=True)
class ModelConfig:
    """Autoencoder and discriminator."""

    ch: int = 32
    """Base width of encoder and decoder."""
    ch_mult: tuple[int, ...] = (1, 1, 2)
    """Width of each level over the base; one down-sampling by 2 between levels."""
    num_res_blocks: int = 1
    """Residual blocks a level (the decoder has one more)."""
    attn_resolutions: tuple[int, ...] = ()
    """Resolutions with self-attention in every block; the lowest one always has it once."""
    z_channels: int = 64
    """Width of the encoder's output."""
    dropout: float = 0.0
    """Dropout in residual blocks."""
    disc_filters: int = 32
    """Base width of the discriminator."""
    disc_layers: int = 2
    """Down-samplings of the discriminator."""
    disc_norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation of the discriminator."""


@dataclass(frozen=True)
class _QuantizerConfig:
    """Quantizer."""

    quantizer: Literal[tuple(QUANTIZERS)] = next(iter(QUANTIZERS))  # type: ignore[valid-type]
    """Reg-VQ, or a baseline: nearest code (vq-gan), Gumbel-softmax (gumbel-vq), EMA codebook (vq-vae)."""
    num_codes: int = 256
    """Size of the codebook, N."""
    code_dim: int = 32
    """Channels of a code, D."""
    fp32_scores: bool = False
    """Multiply latents and codes in fp32 on a GPU under --amp, too (default: in 16 bits, summed in fp32)."""
    collapse_threshold: float = 0.1
    """Warn where steps between two records use less than this share of the codes that uniform use would; 0: never."""


if TYPE_CHECKING:
    QuantizerConfig = _QuantizerConfig
else:  # with the settings of all quantizers; of several bases, the fields of the last come first
    _SETTINGS = [kind.Settings for kind in reversed(QUANTIZERS.values()) if fields(kind.Settings)]
    _OWN = {"__doc__": _QuantizerConfig.__doc__}
    QuantizerConfig = make_dataclass(
        "QuantizerConfig", (), bases=(*_SETTINGS, _QuantizerConfig), namespace=_OWN, frozen=True
    )


@dataclass(frozen=True)
class LossConfig:
    """Losses."""

    l1_weight: float = 1.0
    """Weight of the absolute error of the pixels."""
    perceptual_weight: float = 1.0
    """Weight of the LPIPS distance."""
    contrastive: Literal["pcl", "cl", "none"] = "pcl"
    """Contrastive loss: probabilistic (Eq. 3), vanilla (Eq. 2) or none."""
    contrastive_weight: float = 0.02
    """Weight of the contrastive loss."""
    contrastive_region: Literal["all", "masked"] = "all"
    """Places with a positive: all of them, or those of stochastic tokens."""
    contrastive_sampling: Literal["dense", "sampled"] = "sampled"
    """Contrast every place of a feature map, or a sample."""
    contrastive_patches: int = 256
    """sampled: places in each image and layer."""
    contrastive_max_places: int = 4096
    """dense: most places of a map; a larger one gives a strided sub-grid."""
    contrastive_layer_weights: tuple[float, ...] = ()
    """Weights of the contrastive loss of each layer of its feature network. Not given: equal."""
    contrastive_net: Literal["same", "vgg16", "vgg19"] = "same"
    """Feature network of the contrastive loss; "same" shares the perceptual one and its forward pass."""
    contrastive_weights: Path | None = None
    """Weights file of the contrastive loss's feature network, where that is one of its own."""
    perceptual_net: Literal["vgg16", "vgg19"] = "vgg16"
    """Feature network of the perceptual distance."""
    perceptual_weights: Path | None = None
    """Weights file of that network (torchvision names), or "random". Default: torch hub cache, else a download.
    Without any, runs of the preset scenes leave out the losses that need them."""
    disc_weight: float = 0.8
    """Weight of the adversarial loss, on top of its adaptive factor."""
    disc_start: int | None = None
    """Step at which the discriminator joins. Not given: never."""

    @property
    def has_contrastive(self) -> bool:
        """Whether there is a contrastive loss: one of weight 0 is left out, and costs nothing."""
        return self.contrastive != "none" and self.contrastive_weight > 0

    @property
    def has_own_contrastive_net(self) -> bool:
        """Whether the contrastive loss has another feature network than the perceptual distance."""
        return self.has_contrastive and self.contrastive_net not in ("same", self.perceptual_net)


@dataclass(frozen=True)
class VQGANConfig(TrainConfig):
    """A run of ``train/vq.py``."""

    data: DataConfig = field(default_factory=DataConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def label(self) -> str:
        return f"{self.run.preset}-{self.quantizer.quantizer}"


def _paper(preset: PresetName, epochs: int) -> VQGANConfig:
    """The paper's setting (section 4.1) on taming's VQGAN: 256 px, 16 x 16 tokens, 1024 codes of 256 channels."""
    return VQGANConfig(
        run=RunConfig(preset=preset, image_every=1000, log_every=50, checkpoint_every=1000),
        data=DataConfig(image_size=256, val_images=5000),
        quantizer=QuantizerConfig(num_codes=1024, code_dim=256),
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


VQGAN_PRESETS: dict[str, VQGANConfig] = {
    # A few minutes on two CPU cores: a small model takes a larger learning rate (docs/sweeps.md).
    "scenes": VQGANConfig(optimizer=OptimizerConfig(steps=600, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1)),
    "ade20k": _paper("ade20k", epochs=100),
    "celebahq": _paper("celebahq", epochs=60),
    "cub200": _paper("cub200", epochs=300),
    "coco": _paper("coco", epochs=50),
}


def check_vqgan_config(config: VQGANConfig) -> None:
    """Raise ValueError for what no single module can see."""
    check_common(config)
    data, loss = config.data, config.loss
    discriminator = {"--disc-filters": config.model.disc_filters, "--disc-layers": config.model.disc_layers}
    check_at_least(1, {"--val-images": data.val_images, **discriminator})
    check_at_least(
        0,
        {
            "--l1-weight": loss.l1_weight,
            "--perceptual-weight": loss.perceptual_weight,
            "--contrastive-weight": loss.contrastive_weight,
            "--disc-weight": loss.disc_weight,
            "--disc-start": loss.disc_start or 0,
        },
    )
    if not 0 <= config.quantizer.collapse_threshold <= 1:
        raise ValueError(f"--collapse-threshold must be between 0 and 1, got {config.quantizer.collapse_threshold}")
    if loss.contrastive != "none":
        for name, places in {
            "--contrastive-patches": loss.contrastive_patches,
            "--contrastive-max-places": loss.contrastive_max_places,
        }.items():
            if places < 2:
                raise ValueError(f"{name} must be at least 2, for there to be negatives, got {places}")
        weights, layers = loss.contrastive_layer_weights, 5
        if weights and (len(weights) != layers or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"--contrastive-layer-weights must be {layers} numbers, none negative and not all 0, got {weights}"
            )
    if loss.contrastive_weights is not None and not loss.has_own_contrastive_net:
        why = f"with --contrastive-net {loss.contrastive_net} the perceptual one serves both; use --perceptual-weights"
        if not loss.has_contrastive:
            why = "there is no contrastive loss; leave it out"
        raise ValueError(f"--contrastive-weights {loss.contrastive_weights} has no network to go to: {why}")
    if data.image_size < _MIN_IMAGE_SIZE:
        raise ValueError(f"--image-size must be at least {_MIN_IMAGE_SIZE} (for SSIM and VGG), got {data.image_size}")
    factor = 2 ** (len(config.model.ch_mult) - 1)
    if data.image_size < factor or data.image_size % factor:
        raise ValueError(
            f"--image-size {data.image_size} is not a multiple of the down-sampling factor {factor}; "
            f"try {max(factor, round(data.image_size / factor) * factor)}"
        )
    if loss.has_contrastive and loss.contrastive_region == "masked":
        section = config.quantizer
        try:
            QUANTIZERS[section.quantizer].settings_of(section).check_mask((data.image_size // factor) ** 2)
        except ValueError as error:
            raise ValueError(
                f"--contrastive-region masked needs stochastic tokens, but with --quantizer {section.quantizer} "
                f"{error}, or use the region all"
            ) from None
    check_images(config, data.data)
