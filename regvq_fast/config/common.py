"""What every training script can be told, and how configurations are parsed, saved and read.

The command line is generated from dataclasses, one a concern; a field's docstring is its help. Flags override the
preset, or the configuration of the run that is resumed.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

PresetName = Literal["scenes", "ade20k", "celebahq", "cub200", "coco"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimization."""

    steps: int | None = None
    """Optimizer steps. None: as many as `epochs` makes."""
    epochs: int = 100
    """Passes over the training images, however many views of each a token cache has.
    They count where steps is None, and where they are given and steps is not."""
    batch_size: int = 16
    """Images a step."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, to save memory.
    Posterior, lambda and batch norm are of a part then, and vq-vae moves its codes once a part."""
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
    """Run folder. Not given: runs/PRESET-KIND-DATE."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; its configuration is the default of all flags then."""
    seed: int = 0
    """Decides weights, data order, masks and noise."""
    device: str = "auto"
    """"cuda", "cpu", "cuda:1" ...; auto takes a GPU where there is one. Under torchrun each process takes its own."""
    workers: int | None = None
    """Processes that load data, of each rank.
    Not given: its share of half of the cores, at most 8; none on two cores, and none for a token cache."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    amp: bool = False
    """Mixed precision: bf16 where the device has it, else fp16 with loss scaling on a GPU and fp32 on a CPU."""
    log_every: int = 10
    """Steps between records."""
    image_every: int = 250
    """Steps between pictures."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end, and when a signal stops the run."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the one that evaluated best."""
    max_skipped: int = 20
    """Steps in a row that may be skipped for a loss or gradient that is not finite; one more stops the run."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each block for backward, and compute the rest again: less memory, more time."""
    deterministic: bool = False
    """On a GPU, the same bits in every run on the same machine, at some cost in speed; a CPU gives them anyway."""
    trace_steps: int = 0
    """Steps to profile into OUT/trace.json (chrome://tracing, Perfetto), from the fourth one of this process on."""
    find_batch_size: bool = False
    """Find the largest batch that the GPU's memory takes, say so, and end."""


@dataclass(frozen=True)
class TrainConfig:
    """A run of a training script; each of them adds sections of its own."""

    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def label(self) -> str:
        """What a run is called where it has no name."""
        return self.run.preset


Config = TypeVar("Config", bound=TrainConfig)


def parse_config(presets: Mapping[str, Config], args: list[str], description: str) -> Config:
    """The configuration of a command line: that of its preset, or of the run it resumes, overridden by its flags.

    Args:
        presets: those of the script, by name; the first is the default.
        args: of the command line, without the script.
        description: heads the help.

    Raises:
        ValueError: ``--resume`` of a folder that holds no run, or a preset of another script.
    """
    import tyro

    kind = type(next(iter(presets.values())))
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],  # type: ignore[misc,valid-type]
        default=_default_of(presets, args),
        args=args,
        description=description,
    )


def _default_of(presets: Mapping[str, Config], args: list[str]) -> Config:
    """What the flags override has to be known before they are parsed."""
    first = next(iter(presets.values()))
    out, name = _value_of("--out", args), _value_of("--preset", args)
    if "--resume" in args and out is not None:
        default = override(read_config(Path(out), type(first)), out=Path(out))
    elif name in get_args(PresetName) and name not in presets:
        raise ValueError(f"--preset {name} is of another script; this one has {', '.join(presets)}")
    else:
        default = presets.get(name or "", first)  # what is no preset at all is reported by the parser, with the choices
    # Steps that a run saved or a preset has must not overrule epochs that are asked for.
    return override(default, steps=None) if _value_of("--epochs", args) else default


def _value_of(name: str, args: list[str]) -> str | None:
    """The value of a flag, the last one where it stands several times."""
    found = None
    for flag, value in zip(args, [*args, ""][1:], strict=True):
        if flag == name:
            found = value
        elif flag.startswith(f"{name}="):
            found = flag.removeprefix(f"{name}=")
    return found


def read_config(folder: Path, kind: type[Config]) -> Config:
    """The configuration in a run's folder.

    Raises:
        ValueError: there is none, or it is not one of a run of this kind.
    """
    path = folder / "config.json"
    try:
        return config_from_dict(json.loads(path.read_bytes()), kind)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no run in {folder}: it has no config.json") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of this script: {error}") from None


def config_from_dict(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """The configuration that was saved as ``dataclasses.asdict`` in JSON; fields that are missing have their defaults.

    Raises:
        ValueError, TypeError: not such a configuration.
    """
    if not isinstance(values, Mapping) or (
        missing := [section.name for section in fields(kind) if not isinstance(values.get(section.name), Mapping)]
    ):
        raise ValueError(f"it has no section {missing[0]!r}" if isinstance(values, Mapping) else "it has no sections")
    sections: dict[str, Any] = {}
    for section in fields(kind):
        part = get_type_hints(kind)[section.name]
        hints = get_type_hints(part)
        saved = dict(values[section.name])
        if unknown := saved.keys() - hints.keys():
            raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
        for name, value in saved.items():
            if isinstance(value, list):
                saved[name] = tuple(value)
            elif value is not None and Path in (hints[name], *get_args(hints[name])):
                saved[name] = Path(value)
        sections[section.name] = part(**saved)
    config = kind(**sections)
    return replace(config, run=replace(config.run, resume=False))


def check_common(config: TrainConfig) -> None:
    """Raise ValueError for what is wrong with ``run`` and ``optimizer``, and for any number that is not finite."""
    run, optimizer = config.run, config.optimizer
    check_at_least(
        1,
        {
            "--batch-size": optimizer.batch_size,
            "--accumulate": optimizer.accumulate,
            "--epochs": optimizer.epochs,
            "--log-every": run.log_every,
            "--image-every": run.image_every,
            "--keep-checkpoints": run.keep_checkpoints,
        },
    )
    check_at_least(
        0,
        {
            "--clip-grad": optimizer.clip_grad,
            "--warmup-steps": optimizer.warmup_steps,
            "--weight-decay": optimizer.weight_decay,
            "--final-lr-fraction": optimizer.final_lr_fraction,
            "--eval-every": run.eval_every,
            "--checkpoint-every": run.checkpoint_every,
            "--max-skipped": run.max_skipped,
            "--trace-steps": run.trace_steps,
            "--workers": run.workers or 0,
        },
    )
    if optimizer.steps is not None and optimizer.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {optimizer.steps}")
    if not optimizer.lr > 0:
        raise ValueError(f"--lr must be greater than 0, got {optimizer.lr}")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"--betas must be in [0, 1), got {optimizer.betas}")
    if not 0 <= optimizer.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {optimizer.ema}")
    if optimizer.batch_size % optimizer.accumulate:
        raise ValueError(
            f"--accumulate must divide --batch-size, got {optimizer.accumulate} and {optimizer.batch_size}"
        )
    check_seed(run.seed)
    for section in fields(config):
        for name, value in vars(getattr(config, section.name)).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise ValueError(f"--{name.replace('_', '-')} must be finite, got {value}")


def check_images(config: TrainConfig, data: Path | None) -> None:
    """Raise ValueError where the preset of a data set would train on the embedded scenes, which are ``data`` None."""
    if config.run.preset != "scenes" and data is None:
        raise ValueError(f"--preset {config.run.preset} needs its images: give their folder with --data PATH")


def check_at_least(least: int, values: Mapping[str, float]) -> None:
    """Raise ValueError where one of the values, by flag, is below ``least`` (0 or 1)."""
    for flag, value in values.items():
        if not value >= least:
            raise ValueError(f"{flag} must {'be at least 1' if least else 'not be negative'}, got {value}")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that no int64 holds."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed must be an integer of 64 bits, got {seed}")


def changed_flags(config: object, names: Iterable[str]) -> list[str]:
    """Of some fields of a configuration those without their defaults, as flags: "--crop center", "--no-flip"."""
    values = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(type(config), name)}
    flags = {name.replace("_", "-"): value for name, value in values.items()}
    return [f"--no-{flag}" if value is False else f"--{flag} {value}" for flag, value in flags.items()]


def override(config: Config, **changes: object) -> Config:
    """A copy with fields of any section replaced by name: ``override(config, steps=3, num_codes=16)``."""
    sections: dict[str, object] = {}
    for section in fields(config):
        part = getattr(config, section.name)
        own = {name: value for name, value in changes.items() if hasattr(part, name)}
        sections[section.name] = replace(part, **own)
        changes = {name: value for name, value in changes.items() if name not in own}
    if changes:
        raise ValueError(f"no such field: {', '.join(changes)}")
    return replace(config, **sections)  # type: ignore[arg-type]
