"""The stages of a row, each a command of `regvq`: tokenizer, tokens, prior, metrics.

A stage that is done is not run again, one that was interrupted continues: its folder tells. What decides its numbers is
written down beside them, so that a row is never mixed from different settings.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regvq_fast.config.command_line import new_spelling
from regvq_fast.files import atomic_path
from regvq_fast.ownership import FolderLock, check_free

_RECORD = "stages.json"


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

    def run(self, stage: Stage, how: Sequence[str], processes: int = 1) -> None:
        """Run a stage, or the rest of it.

        Args:
            how: flags that don't decide its numbers (beyond rounding).
            processes: more than one run under torchrun.

        Raises:
            StageFailed: its command failed. FileExistsError: another process runs a stage of the row.
        """
        with FolderLock(self.folder, "row"):
            self._run(stage, how, processes)

    def _run(self, stage: Stage, how: Sequence[str], processes: int) -> None:
        # "--": the launcher takes a command's --run for an abbreviation of its own flags.
        under = ["--standalone", "--nproc-per-node", str(processes), "-m", "--"] if processes > 1 else []
        start = ["-m", "torch.distributed.run", *under] if under else ["-m"]
        line = ["regvq_fast", *stage.command.split(), *self._flags(stage, how)]
        typed = shlex.join(["torchrun", *under, *line] if under else ["regvq", *line[1:]])
        record = self.record()
        entry = record.setdefault(stage.name, {"commands": [], "seconds": 0.0})
        entry["settings"] = stage.settings
        entry["commands"].append(typed)
        before = entry["seconds"]
        self._write(record)
        begin = time.monotonic()
        try:
            status = _run([sys.executable, *start, *line])
        finally:
            entry["seconds"] = round(before + time.monotonic() - begin, 1)
            self._write(record)
        if status:
            raise StageFailed(
                f"the {stage.name} of {self.folder} ended with status {status}; what is done is kept, the same "
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


def _run(command: Sequence[str]) -> int:
    """Run a command that gets the signals which would stop this process; return its status.

    SIGINT, SIGTERM and a closed terminal's SIGHUP let the command save its work, then stop this process, too.
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int) -> None:
        if process is not None:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)  # which saves what is done

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        pass_on(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
        numbers.append(signal.SIGHUP)
    # Before the command starts: a signal between the two would leave it behind, without this process.
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        # In a session of its own: Ctrl-C in a terminal then reaches it through this process alone, as any signal does.
        with subprocess.Popen(command, start_new_session=True) as process:
            for number in received:  # while it started
                pass_on(number)
            status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        if received[-1] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + received[-1])
    return status
