"""Everything a tokenizer run can be told: one dataclass a concern, and the named presets.

The command line is generated from these classes; a field's docstring is its help. Flags override the preset, or the
configuration of the run that is resumed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

_MIN_IMAGE_SIZE = 16

QuantizerName = Literal["reg-vq", "vq-gan", "gumbel-vq", "vq-vae"]
PresetName = Literal["scenes", "ade20k", "celebahq", "cub200", "coco"]


@dataclass(frozen=True)
class DataConfig:
    """Images."""

    data: Path | None = None
    """Folder of images or of tar shards (webdataset's layout), searched recursively; or shards, as in
    'shards-{000000..000099}.tar'. Not given: the embedded scenes, composed of real photographs."""
    image_size: int = 64
    """Side of the square images, in pixels; a multiple of the down-sampling factor."""
    crop: Literal["random-resized", "center"] = "random-resized"
    """Training crop of a folder's images."""
    flip: bool = True
    """Mirror half of the training images of a folder."""
    val_images: int = 512
    """Most validation images an evaluation uses."""
    workers: int | None = None
    """Processes that load images. Not given: half of the cores, none on two."""


@dataclass(frozen=True)
class ModelConfig:
    """Autoencoder, discriminator and feature network."""

    ch: int = 32
    """Base width of encoder and decoder."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 4)
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
class QuantizerConfig:
    """Quantizer."""

    quantizer: QuantizerName = "reg-vq"
    """Reg-VQ, or a baseline: nearest code (vq-gan), Gumbel-softmax (gumbel-vq), EMA codebook (vq-vae)."""
    num_codes: int = 256
    """Size of the codebook, N."""
    code_dim: int = 32
    """Channels of a code, D."""
    logits: Literal["distance", "linear", "cosine"] = "distance"
    """reg-vq: what scores a code."""
    logit_std: float = 4.0
    """reg-vq: spread of the fresh logits over the codes; the Gumbel noise's is 1.28."""
    mask_ratio: float = 0.4
    """reg-vq: share of positions that are selected with noise."""
    mask_mode: Literal["exact", "bernoulli"] = "exact"
    """reg-vq: exactly that share of every image, or each position with that probability."""
    tau: float = 0.9
    """reg-vq: Gumbel-softmax temperature."""
    prior_weight: float = 0.1
    """reg-vq: weight of the KL divergence from the uniform prior, per nat."""
    prior_scope: Literal["image", "batch", "global"] = "batch"
    """reg-vq: the posterior of each image, of the batch, or of the batches of all ranks."""
    codebook_grad: Literal["soft", "hard", "none"] = "soft"
    """reg-vq: gradient of the look-up to the codes (Algorithm 1: soft)."""


@dataclass(frozen=True)
class LossConfig:
    """Losses."""

    l1_weight: float = 1.0
    """Absolute error of the pixels."""
    perceptual_weight: float = 1.0
    """LPIPS distance."""
    contrastive: Literal["pcl", "cl", "none"] = "pcl"
    """Contrastive loss: probabilistic (Eq. 3), vanilla (Eq. 2) or none."""
    contrastive_weight: float = 0.02
    """Its weight."""
    contrastive_region: Literal["all", "masked"] = "all"
    """Places with a positive: all of them, or those of stochastic tokens."""
    contrastive_sampling: Literal["dense", "sampled"] = "sampled"
    """Contrast every place of a feature map, or a sample."""
    contrastive_patches: int = 256
    """sampled: places in each image and layer."""
    contrastive_max_places: int = 4096
    """dense: most places of a map; a larger one gives a strided sub-grid."""
    contrastive_layer_weights: tuple[float, ...] = ()
    """Weights of the network's layers. Not given: equal."""
    contrastive_net: Literal["same", "vgg16", "vgg19"] = "same"
    """Feature network of the contrastive loss; "same" shares the perceptual one and its forward pass."""
    contrastive_weights: Path | None = None
    """Weights file of that network, if it is one of its own."""
    perceptual_net: Literal["vgg16", "vgg19"] = "vgg16"
    """Feature network of the perceptual distance."""
    perceptual_weights: Path | None = None
    """Its weights file (torchvision names). Not given: torch hub cache, download, else random weights."""
    disc_weight: float = 0.8
    """Adversarial loss, on top of its adaptive factor."""
    disc_start: int | None = None
    """Step at which the discriminator joins. Not given: never."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimization."""

    steps: int | None = None
    """Optimizer steps. Not given: as many as `epochs` makes."""
    epochs: int = 100
    """Passes over the training images where `steps` is not given."""
    batch_size: int = 16
    """Images a step."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, to save memory; posterior, lambda and batch norm are of a part then."""
    lr: float = 1.5e-4
    """Learning rate of AdamW after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices and kernels only."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_lr_fraction: float = 1.0
    """Cosine decay of the learning rate to this fraction at the end; 1 keeps it constant."""
    clip_grad: float = 1.0
    """Norm to which gradients are clipped; 0 turns it off."""
    ema: float = 0.0
    """Decay of averaged weights, which then serve evaluation and the saved model; 0 turns them off."""


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    preset: PresetName = "scenes"
    """Named set of defaults."""
    out: Path | None = None
    """Run folder. Not given: runs/PRESET-QUANTIZER-DATE."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; its configuration is the default of all flags then."""
    seed: int = 0
    """Decides weights, data order, masks and noise."""
    device: str = "auto"
    """"cuda", "cpu", "cuda:1" ...; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    amp: bool = False
    """Mixed precision: bf16 where the device has it, else fp16 with loss scaling."""
    log_every: int = 10
    """Steps between records."""
    image_every: int = 250
    """Steps between pictures of reconstructions."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end, and when a signal stops the run."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the one that evaluated best."""
    max_skipped: int = 20
    """Steps in a row that may be skipped for a loss or gradient that is not finite; one more stops the run."""
    collapse_threshold: float = 0.1
    """Warn when a record window uses less than this share of the codes that uniform use would reach; 0: never."""


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``train/vq.py``."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def _paper(preset: PresetName, epochs: int) -> TrainConfig:
    """The paper's setting (section 4.1) on taming's VQGAN: 256 px, 16 x 16 tokens, 1024 codes of 256 channels."""
    return TrainConfig(
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


PRESETS: dict[str, TrainConfig] = {
    # A few minutes on two CPU cores: a small model takes a larger learning rate (docs/sweeps.md).
    "scenes": TrainConfig(optimizer=OptimizerConfig(steps=400, lr=1e-3, warmup_steps=50, final_lr_fraction=0.1)),
    "ade20k": _paper("ade20k", epochs=100),
    "celebahq": _paper("celebahq", epochs=60),
    "cub200": _paper("cub200", epochs=300),
    "coco": _paper("coco", epochs=50),
}


def parse_train_config(args: list[str], description: str) -> TrainConfig:
    """The configuration of a command line: that of its preset, or of the run it resumes, overridden by its flags.

    Raises:
        ValueError: ``--resume`` of a folder that holds no run.
    """
    import tyro

    return tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig], default=_default_of(args), args=args, description=description
    )


def _default_of(args: list[str]) -> TrainConfig:
    """What the flags override has to be known before they are parsed."""
    out = _value_of("--out", args)
    if "--resume" in args and out is not None:
        saved = read_config(Path(out))
        # A run saves its number of steps; new epochs are to decide it anew.
        return override(saved, out=Path(out), steps=None if _value_of("--epochs", args) else saved.optimizer.steps)
    # An unknown name is reported by the parser, with the choices.
    return PRESETS.get(_value_of("--preset", args) or "scenes", PRESETS["scenes"])


def _value_of(name: str, args: list[str]) -> str | None:
    """The value of a flag, the last one where it stands several times."""
    found = None
    for flag, value in zip(args, [*args, ""][1:], strict=True):
        if flag == name:
            found = value
        elif flag.startswith(f"{name}="):
            found = flag.removeprefix(f"{name}=")
    return found


def read_config(folder: Path) -> TrainConfig:
    """The configuration in a run's folder.

    Raises:
        ValueError: there is none, or it is not one of a run.
    """
    path = folder / "config.json"
    try:
        return config_from_dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no run to resume in {folder}: it has no config.json") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from None


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that was saved as ``dataclasses.asdict`` in JSON; fields that are missing have their defaults.

    Raises:
        ValueError, TypeError: not such a configuration.
    """
    if not isinstance(values, Mapping) or not values.keys() & {section.name for section in fields(TrainConfig)}:
        raise ValueError("it has none of its sections")
    sections: dict[str, Any] = {}
    for section in fields(TrainConfig):
        kind = get_type_hints(TrainConfig)[section.name]
        hints = get_type_hints(kind)
        saved = dict(values[section.name]) if section.name in values else {}
        if unknown := saved.keys() - hints.keys():
            raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
        for name, value in saved.items():
            if isinstance(value, list):
                saved[name] = tuple(value)
            elif value is not None and Path in get_args(hints[name]):
                saved[name] = Path(value)
        sections[section.name] = kind(**saved)
    return replace(TrainConfig(**sections), run=replace(sections["run"], resume=False))


def check_config(config: TrainConfig) -> None:
    """Raise ValueError for what no single module can see."""
    optimizer, data, loss = config.optimizer, config.data, config.loss
    for name, value in {
        "--batch-size": optimizer.batch_size,
        "--accumulate": optimizer.accumulate,
        "--epochs": optimizer.epochs,
        "--val-images": data.val_images,
        "--log-every": config.run.log_every,
        "--image-every": config.run.image_every,
        "--keep-checkpoints": config.run.keep_checkpoints,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, number in {
        "--l1-weight": loss.l1_weight,
        "--perceptual-weight": loss.perceptual_weight,
        "--contrastive-weight": loss.contrastive_weight,
        "--disc-weight": loss.disc_weight,
        "--clip-grad": optimizer.clip_grad,
        "--warmup-steps": optimizer.warmup_steps,
        "--disc-start": loss.disc_start or 0,
        "--eval-every": config.run.eval_every,
        "--checkpoint-every": config.run.checkpoint_every,
        "--max-skipped": config.run.max_skipped,
        "--workers": data.workers or 0,
        "--weight-decay": optimizer.weight_decay,
        "--final-lr-fraction": optimizer.final_lr_fraction,
    }.items():
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")
    if optimizer.steps is not None and optimizer.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {optimizer.steps}")
    if not optimizer.lr > 0:
        raise ValueError(f"--lr must be greater than 0, got {optimizer.lr}")
    if not 0 <= config.run.collapse_threshold <= 1:
        raise ValueError(f"--collapse-threshold must be between 0 and 1, got {config.run.collapse_threshold}")
    if not 0 <= optimizer.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {optimizer.ema}")
    if optimizer.batch_size % optimizer.accumulate:
        raise ValueError(
            f"--accumulate must divide --batch-size, got {optimizer.accumulate} and {optimizer.batch_size}"
        )
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
    if loss.contrastive_region == "masked" and config.quantizer.quantizer != "reg-vq":
        raise ValueError(
            f"--contrastive-region masked needs stochastic tokens, which --quantizer {config.quantizer.quantizer} "
            "has not: use reg-vq, or the region all"
        )
    own_net = loss.contrastive_net not in ("same", loss.perceptual_net) and loss.contrastive != "none"
    if loss.contrastive_weights is not None and not own_net:
        raise ValueError(
            f"--contrastive-weights {loss.contrastive_weights} has no network to go to: with --contrastive-net "
            f"{loss.contrastive_net} the perceptual one serves both; use --perceptual-weights"
        )
    if data.image_size < _MIN_IMAGE_SIZE:
        raise ValueError(f"--image-size must be at least {_MIN_IMAGE_SIZE} (for SSIM and VGG), got {data.image_size}")
    factor = 2 ** (len(config.model.ch_mult) - 1)
    if data.image_size < factor or data.image_size % factor:
        raise ValueError(
            f"--image-size {data.image_size} is not a multiple of the down-sampling factor {factor}; "
            f"try {max(factor, round(data.image_size / factor) * factor)}"
        )
    if config.run.preset != "scenes" and data.data is None:
        raise ValueError(f"--preset {config.run.preset} needs its images: give their folder with --data PATH")


def override(config: TrainConfig, **changes: object) -> TrainConfig:
    """A copy with fields of any section replaced by name: ``override(config, steps=3, num_codes=16)``."""
    sections: dict[str, object] = {}
    for section in ("run", "data", "quantizer", "model", "loss", "optimizer"):
        part = getattr(config, section)
        own = {name: value for name, value in changes.items() if hasattr(part, name)}
        sections[section] = replace(part, **own)
        changes = {name: value for name, value in changes.items() if name not in own}
    if changes:
        raise ValueError(f"no such field: {', '.join(changes)}")
    return TrainConfig(**sections)  # type: ignore[arg-type]
