"""The stages of a row, each a command of `regvq`: tokenizer, tokens, prior, metrics.

A finished stage is not run again, and an interrupted one continues. The settings of each stage are recorded, so that a
row never mixes stages with different settings.
"""

import json
import os
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regvq_fast.config.command_line import new_spelling
from regvq_fast.files import atomic_path
from regvq_fast.ownership import FolderLock, check_free
from regvq_fast.paper.commands import Commands

_RECORD = "stages.json"
_OUTPUT = "output.txt"
"""Output of a row's commands if rows run side by side."""


class Stage(NamedTuple):
    """A command and its result."""

    name: str
    """Name in messages and in the record."""
    command: str
    """Command of `regvq`, without its flags."""
    settings: tuple[str, ...]
    """Flags that determine its numbers."""
    folder: Path
    """Value of --out."""
    result: Path
    """File that is written last: the stage is done if it exists."""
    trains: bool
    """True if it has checkpoints to resume from."""


class StageFailed(ValueError):
    """A command failed, after printing its error."""


class Pipeline(NamedTuple):
    """The stages of a row, in a folder."""

    folder: Path
    stages: tuple[Stage, ...]

    def by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def measured(self) -> Path | None:
        """Return the file of metrics: the prior's, else the tokenizer's; None if neither is done."""
        paths = self.stages[-1].result, self.stages[0].folder / self.stages[-1].result.name
        return next((path for path in paths if path.exists()), None)

    def record(self) -> dict[str, Any]:
        """Return the record of each stage by name: settings, seconds, and commands, several if it was interrupted."""
        try:
            return json.loads((self.folder / _RECORD).read_bytes())
        except FileNotFoundError:
            return {}

    def check(self) -> None:
        """Raise ValueError if the folder holds stages with other settings."""
        record, folders = self.record(), [stage.folder for stage in self.stages]
        for stage in self.stages:
            made = record.get(stage.name, {}).get("settings")
            own = folders.count(stage.folder) == 1  # metrics are in the folder of another stage
            if not stage.result.exists() and not (own and stage.folder.exists()):
                continue  # it failed before it made anything
            if made is not None and [new_spelling(argument) for argument in made] != list(stage.settings):
                raise ValueError(
                    f"the {stage.name} in {stage.folder} was made with {' '.join(made) or 'no flags'}, not "
                    f"{' '.join(stage.settings) or 'none'}: take another --out, or delete {self.folder}"
                )

    def run(self, stage: Stage, how: Sequence[str], commands: Commands, processes: int = 1) -> None:
        """Run a stage, or the rest of it.

        Args:
            stage: to run.
            how: flags that don't change its numbers, beyond rounding.
            commands: runs it.
            processes: number of processes; several run under torchrun.

        Raises:
            StageFailed: the command failed.
            FileExistsError: another process runs a stage of the row.
        """
        with FolderLock(self.folder, "row"):
            # "--": torchrun would take a command's --run for an abbreviation of its own flags.
            launcher = ["--standalone", "--nproc-per-node", str(processes), "-m", "--"] if processes > 1 else []
            line = [*stage.command.split(), *self._flags(stage, how)]
            typed = shlex.join(["torchrun", *launcher, "regvq_fast", *line] if launcher else ["regvq", *line])
            record = self.record()
            entry = record.setdefault(stage.name, {"commands": [], "seconds": 0.0})
            entry["settings"] = stage.settings
            entry["commands"].append(typed)
            before = entry["seconds"]
            self._write(record)
            begin = time.monotonic()
            output = self.folder / _OUTPUT if commands.side_by_side else None
            try:
                status = commands.run(_command, line, launcher, output)
            finally:
                entry["seconds"] = round(before + time.monotonic() - begin, 1)
                self._write(record)
        if status:
            where = "" if output is None else f"{output} has its output; "
            raise StageFailed(
                f"the {stage.name} of {self.folder} ended with status {status}; {where}run the same command again to "
                f"continue. It was: {typed}"
            )

    def _flags(self, stage: Stage, how: Sequence[str]) -> list[str]:
        """Return the flags that begin a stage, or resume it."""
        out = ["--out", str(stage.folder)]
        if stage.trains and any((stage.folder / "checkpoints").glob("step-*")):
            return ["--resume", *how, *out]
        if stage.trains:  # without a checkpoint there is nothing to resume
            check_free(stage.folder, "run")
            shutil.rmtree(stage.folder, ignore_errors=True)
        return [*stage.settings, *how, *out]

    def _write(self, record: dict[str, Any]) -> None:
        with atomic_path(self.folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _command(line: Sequence[str], launcher: Sequence[str], output: Path | None) -> None:
    """Run a command of `regvq` in this process.

    Args:
        line: words and flags of the command.
        launcher: flags of torchrun; empty: run without it.
        output: file to append all output to; None: the driver's output.
    """
    # In its own session, so that Ctrl-C in a terminal reaches it only through the driver, as other signals do.
    os.setsid()
    if output is not None:
        with output.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    if launcher:
        from torch.distributed.run import main as torchrun

        torchrun([*launcher, "regvq_fast", *line])
        return
    sys.argv[1:] = line
    runpy.run_module("regvq_fast", run_name="__main__")
