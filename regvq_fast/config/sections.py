"""Sections of every training run: the run itself and its optimization. A field's docstring is its help."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, arg

from regvq_fast.config.runtime import CompileConfig, DeviceConfig, LoadingConfig, SeedConfig
from regvq_fast.settings import Section, check_at_least, check_finite

PresetName = Literal["scenes", "ade20k", "celebahq", "cub200", "coco", "imagenet"]
OptionalPath = Annotated[Path | None, arg(metavar="PATH")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
UNTITLED = arg(help="")
"""Marks a section without a description in the help."""


def check_adamw(lr_flag: str, lr: float | None, betas_flag: str, betas: tuple[float, float] | None) -> None:
    """Raise ValueError for a learning rate or betas that AdamW does not accept; None is accepted."""
    if lr is not None and not lr > 0:
        raise ValueError(f"{lr_flag} must be greater than 0, got {lr}")
    if betas is not None and not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{betas_flag} must be in [0, 1), got {betas}")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """Optimization."""

    steps: OptionalInt = None
    """Optimizer steps; None: set by --epochs."""
    epochs: int = 100
    """Passes over the images, unless --steps is given."""
    batch_size: int = 16
    """Images per step, over all ranks."""
    accumulate: Annotated[int, arg(name="grad-accum-steps", metavar="N")] = 1
    """Micro-batches per step, each with its own statistics."""
    lr: float = 1.5e-4
    """Learning rate after warm-up."""
    betas: Annotated[tuple[float, float], arg(metavar="X X")] = (0.9, 0.95)
    """Betas of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions."""
    warmup_steps: int = 100
    """Linear warm-up steps."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay of the learning rate after warm-up."""
    final_lr_fraction: Annotated[float, arg(metavar="X")] = 1.0
    """Final fraction of --lr; 1: no decay."""
    decay_fraction: Annotated[float, arg(metavar="X")] = 0.2
    """wsd: fraction of the steps with decay."""
    clip_grad: float = 1.0
    """Maximum gradient norm; 0: off."""
    ema: float = 0.0
    """Decay of averaged weights; 0: off."""

    @property
    def decays(self) -> bool:
        """True if the learning rate depends on the number of steps of the run."""
        return self.schedule != "constant" and self.final_lr_fraction != 1

    def check(self) -> None:
        super().check()
        check_at_least(
            1,
            {
                "--steps": 1 if self.steps is None else self.steps,
                "--batch-size": self.batch_size,
                "--grad-accum-steps": self.accumulate,
                "--epochs": self.epochs,
            },
        )
        check_at_least(
            0,
            {
                "--clip-grad": self.clip_grad,
                "--warmup-steps": self.warmup_steps,
                "--weight-decay": self.weight_decay,
                "--final-lr-fraction": self.final_lr_fraction,
            },
        )
        check_adamw("--lr", self.lr, "--betas", self.betas)
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"--decay-fraction must be in (0, 1], got {self.decay_fraction}")
        if self.schedule in ("linear", "wsd") and not self.decays:
            raise ValueError(
                f"--schedule {self.schedule} with --final-lr-fraction {self.final_lr_fraction:g} does not decay: give "
                "a smaller fraction, such as 0, or --schedule constant"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be in [0, 1), got {self.ema}")
        if self.batch_size % self.accumulate:
            divisors = [str(k) for k in range(1, self.batch_size + 1) if self.batch_size % k == 0]
            raise ValueError(
                f"--grad-accum-steps {self.accumulate} does not divide --batch-size {self.batch_size}; "
                f"use one of {', '.join(divisors)}"
            )


@dataclass(frozen=True)
class FolderConfig(Section):
    """Origin and folder of a run."""

    preset: PresetName = "scenes"
    """Defaults; --preset NAME --help shows them."""
    config: OptionalPath = None
    """Start a new run with the settings of this config.json."""
    out: OptionalPath = None
    """Run folder; default: runs/PRESET-KIND-DATE."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run in --out."""


@dataclass(frozen=True)
class RunConfig(CompileConfig, LoadingConfig, DeviceConfig, SeedConfig, FolderConfig):
    """Run."""

    compile: bool = False
    """torch.compile; on a CPU from 5000 steps on."""
    deterministic: bool = False
    """Reproducible GPU runs; CPU runs always are."""
    activation_checkpointing: bool = False
    """Recompute activations: less memory, slower."""
    find_batch_size: FlagCreatePairsOff[bool] = False
    """Print the largest batch that fits a GPU; exit."""
    trace_steps: int = 0
    """Steps to profile into OUT/trace.json."""
    log: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("tensorboard",)
    """tensorboard, wandb, trackio, or none."""
    log_every: int = 10
    """Steps between log records."""
    image_every: int = 250
    """Steps between saved images."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    checkpoint_every: Annotated[int, arg(metavar="N")] = 500
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: Annotated[int, arg(metavar="N")] = 2
    """Newest checkpoints kept, besides the best."""
    max_skipped: int = 20
    """Non-finite steps in a row; more are an error."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers, separated by spaces or commas in `log`; empty for "none"."""
        return tuple(name for name in dict.fromkeys(",".join(self.log).split(",")) if name != "none")

    def check(self) -> None:
        super().check()
        check_at_least(
            1,
            {
                "--log-every": self.log_every,
                "--image-every": self.image_every,
                "--keep-checkpoints": self.keep_checkpoints,
            },
        )
        check_at_least(
            0,
            {
                "--eval-every": self.eval_every,
                "--checkpoint-every": self.checkpoint_every,
                "--max-skipped": self.max_skipped,
                "--trace-steps": self.trace_steps,
            },
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run; each command adds its sections."""

    run: Annotated[RunConfig, UNTITLED] = field(default_factory=RunConfig)
    optimizer: Annotated[OptimizerConfig, UNTITLED] = field(default_factory=OptimizerConfig)

    @property
    def label(self) -> str:
        """Beginning of the default name of the run's folder."""
        return self.run.preset

    def check(self) -> None:
        """Raise ValueError for invalid settings or combinations of settings."""
        for section in (getattr(self, item.name) for item in fields(self)):
            check_finite(section)
            section.check()

    def check_images(self, data: Path | None) -> None:
        """Raise ValueError if a data set's preset has no ``data``, which would mean the embedded scenes."""
        if self.run.preset != "scenes" and data is None:
            raise ValueError(f"--preset {self.run.preset} needs its images: give their folder with --data PATH")


Config = TypeVar("Config", bound=TrainConfig)
