"""Command lines, generated from dataclasses."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

from regvq_fast.config.saved import override, read_config
from regvq_fast.config.sections import Config, PresetName
from regvq_fast.invocation import as_typed, command
from regvq_fast.precision import is_out_of_memory
from regvq_fast.quantizers import QUANTIZERS
from regvq_fast.ranks import local_rank, reported_by_rank_0
from regvq_fast.settings import flag_of
from regvq_fast.termination import removes_unfinished

Settings = TypeVar("Settings")

_RENAMED = {"--accumulate": "--grad-accum-steps", "--prior-weight": "--kl-weight", "--prior-scope": "--kl-scope"}


@dataclass(frozen=True)
class _Start:
    """Flags that determine the defaults of the others."""

    preset: str = ""
    config: Path | None = None
    resume: bool = False
    out: Path | None = None
    epochs: int | None = None
    init_from: str | None = None
    quantizer: str | None = None


def parse_config(
    presets: Mapping[str, Config],
    args: Sequence[str],
    usage: str = "",
    name: str = "",
    begin: Callable[[Config, str, str | None], tuple[Config, Callable[[Config], Config]]] | None = None,
) -> Config:
    """Parse the flags of a training command, which override a preset or the settings of a run.

    Args:
        presets: of the command, by name; the first is the default.
        args: after the command. Old names of flags are accepted, and reported on stderr.
        usage, name: as in `run_command`.
        begin: `Recipe.begin`, for ``--init-from``.

    Raises:
        OSError, ValueError: ``--resume`` or ``--config`` names no run, the preset is of another command, or the weights
            can't be used.
    """
    given, args = args, [new_spelling(argument) for argument in args]
    for old, new in zip(given, args, strict=True):
        if old != new and local_rank() == 0:
            print(f"{old.partition('=')[0]} is now {new.partition('=')[0]}", file=sys.stderr)
    # Two passes: tyro's presets are subcommands, which would have to come before all flags.
    start, _ = tyro.cli(_Start, args=args, return_unknown_args=True, add_help=False)
    kind = type(next(iter(presets.values())))
    defaults, complete = _defaults(presets, start), None
    if begin is not None and start.init_from is not None and not start.resume:
        defaults, complete = begin(defaults, start.init_from, start.quantizer)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],  # type: ignore[misc,valid-type]
        default=defaults,
        args=args,
        prog=command(name),
        description=as_typed(usage),
    )
    config = override(config, config=None)
    return config if complete is None else complete(config)


def new_spelling(argument: str) -> str:
    """Return an argument of a command line with the current name of its flag."""
    flag, equals, value = argument.partition("=")
    return _RENAMED.get(flag, flag) + equals + value


def _defaults(presets: Mapping[str, Config], start: _Start) -> Config:
    first = next(iter(presets.values()))
    if start.resume and start.config is not None:
        raise ValueError(f"--resume continues a run with its own settings: leave out --config {start.config}")
    if start.resume and start.out is not None:
        default = override(read_checked(start.out, type(first)), out=start.out)
    elif start.config is not None:
        if start.preset:
            raise ValueError(f"--preset {start.preset} and --config {start.config} exclude each other: give one")
        default = override(read_checked(start.config, type(first)), out=None)
    elif start.preset in get_args(PresetName) and start.preset not in presets:
        raise ValueError(f"--preset {start.preset} belongs to another command; this one has {', '.join(presets)}")
    else:
        default = presets.get(start.preset, first)  # the parser reports an unknown one, with the choices
    if start.quantizer in QUANTIZERS:  # the parser reports an unknown one
        default = override(default, quantizer=start.quantizer)
    # --epochs takes precedence over the steps of a saved run or a preset.
    return default if start.epochs is None else override(default, steps=None)


def read_checked(path: Path, kind: type[Config]) -> Config:
    """Read a configuration as `read_config`; ValueError that names the file for settings out of range, too."""
    config = read_config(path, kind)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"the configuration in {path} is not valid: {error}") from None
    return config


def typed_command(name: str, settings: Any) -> str:
    """Return the command line of a command with given settings: "regvq evaluate --run runs/vq --amp".

    Args:
        name: of the command.
        settings: a dataclass whose fields all have defaults; fields with their defaults are left out.
    """
    words = ["regvq", *name.split()]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        flag = flag_of(type(settings), field.name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def run_command(
    name: str,
    kind: type[Settings],
    work: Callable[[Settings], Any],
    usage: str,
    args: Sequence[str],
    *,
    stopped: str = "stopped",
) -> None:
    """Run a command from one config dataclass: parse its flags and do the work; on failure, print a sentence and exit.

    Args:
        name: of the command, such as "train vq".
        kind: a dataclass; its fields are the flags, and their docstrings the help.
        work: what the command does. A ValueError or OSError, whose message is one sentence, gives exit status 1, Ctrl-C
            gives 130, SIGTERM 143 and SIGHUP 129. Rank 0 prints errors of all ranks. After a failed allocation the
            message names --batch-size.
        usage: text at the top of the help; commands in it ("regvq sample") appear as the user types them.
        args: after the command.
        stopped: printed after Ctrl-C, with fields in braces: "stopped; the images so far are in {out}".
    """
    settings = None
    try:
        with removes_unfinished():
            settings = tyro.cli(kind, args=args, prog=command(name), description=as_typed(usage))
            work(settings)
    except (ValueError, OSError) as error:
        sys.exit(1 if reported_by_rank_0(error) else as_typed(f"error: {error}"))
    except KeyboardInterrupt:
        print("stopped" if settings is None else stopped.format_map(vars(settings)), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        batch_size = getattr(settings, "batch_size", 1)
        advice = f"use a --batch-size below {batch_size}" if batch_size > 1 else "use a smaller model or --device cpu"
        sys.exit(f"error: out of memory; {advice}")
