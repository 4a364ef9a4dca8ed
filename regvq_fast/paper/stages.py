"""The stages of a row, each a command of `regvq`: tokenizer, tokens, prior, metrics.

A stage that is done is not run again, one that was interrupted continues: its folder tells. What decides its numbers is
written down beside them, so that a row is never mixed from different settings.
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
"""Output of a row's commands, where rows run side by side."""


class Stage(NamedTuple):
    """A command, and what it leaves."""

    name: str
    """File that it makes."""
    command: str
    """Command of `regvq`, without its flags."""
    settings: tuple[str, ...]
    """Flags that decide its numbers."""
    folder: Path
    """--out"""
    result: Path
    """Written last: where it is, the stage is done."""
    trains: bool
    """True if it has checkpoints to resume from."""


class StageFailed(ValueError):
    """A command ended with an error, which it has told by itself."""


class Pipeline(NamedTuple):
    """The stages of a row, in a folder."""

    folder: Path
    stages: tuple[Stage, ...]

    def by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def measured(self) -> Path | None:
        """Return the file of metrics: with those of the prior, else of the tokenizer alone; None if neither is done."""
        paths = self.stages[-1].result, self.stages[0].folder / self.stages[-1].result.name
        return next((path for path in paths if path.exists()), None)

    def record(self) -> dict[str, Any]:
        """Return the record of each stage by its name: settings, commands (of one that was
        interrupted, several) and seconds."""
        try:
            return json.loads((self.folder / _RECORD).read_bytes())
        except FileNotFoundError:
            return {}

    def check(self) -> None:
        """Raise ValueError where the folder holds stages of other settings."""
        record, folders = self.record(), [stage.folder for stage in self.stages]
        for stage in self.stages:
            made = record.get(stage.name, {}).get("settings")
            own = folders.count(stage.folder) == 1  # metrics lie with what they are of
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
            how: flags that don't decide its numbers (beyond rounding).
            commands: runs it.
            processes: more than one run under torchrun.

        Raises:
            StageFailed: its command failed. FileExistsError: another process runs a stage of the row.
        """
        with FolderLock(self.folder, "row"):
            # "--": the launcher takes a command's --run for an abbreviation of its own flags.
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
                f"the {stage.name} of {self.folder} ended with status {status}; {where}what is done is kept, the same "
                f"command goes on from there. It was: {typed}"
            )

    def _flags(self, stage: Stage, how: Sequence[str]) -> list[str]:
        """Those that begin a stage, or resume it."""
        out = ["--out", str(stage.folder)]
        if stage.trains and any((stage.folder / "checkpoints").glob("step-*")):
            return ["--resume", *how, *out]
        if stage.trains:  # what was stopped before its first checkpoint has nothing to continue from
            check_free(stage.folder, "run")
            shutil.rmtree(stage.folder, ignore_errors=True)
        return [*stage.settings, *how, *out]

    def _write(self, record: dict[str, Any]) -> None:
        with atomic_path(self.folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _command(line: Sequence[str], launcher: Sequence[str], output: Path | None) -> None:
    """Be the process of a command of `regvq`.

    Args:
        line: its words and flags.
        launcher: flags of torchrun, which runs it; empty: none.
        output: a file to append all output to; None: that of the driver.
    """
    # In a session of its own: Ctrl-C in a terminal then reaches it through the driver alone, as any signal does.
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
