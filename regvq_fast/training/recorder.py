"""Output of a run: its folder, metrics.jsonl, trackers, progress bar."""

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regvq_fast.config import TrainConfig
from regvq_fast.console import Items, progress_bar, say, stage
from regvq_fast.files import LineFile, atomic_path, check_new_folder
from regvq_fast.models.pretrained import WEIGHTS
from regvq_fast.number_formats import evaluation_items, progress_items, result
from regvq_fast.ownership import FolderLock, check_free
from regvq_fast.ranks import rank
from regvq_fast.training.checkpoint import Checkpoint
from regvq_fast.training.trackers import Trackers
from regvq_fast.version import __version__

_SUMMARY = "summary.json"


def new_run_folder(config: TrainConfig) -> Path:
    """Return the folder of a new run; nothing is created yet.

    Raises:
        FileExistsError: the folder named by ``--out`` is not empty, or another process's: runs don't mix.
    """
    out = config.run.out
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{config.label}-{stamp}"
        candidates = (Path("runs") / (name + suffix) for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
        return next(path for path in candidates if not path.exists())
    check_free(out, "run")
    check_new_folder(out, "name a new one, or continue its run with --resume")
    return out


def own_new_folder(out: Path) -> FolderLock:
    """Take the folder of a new run; FileExistsError if another process was faster."""
    lock = FolderLock(out, "run")
    try:
        check_new_folder(out, "another run began there just now: name a new one")
    except OSError:
        lock.release()
        raise
    for leftover in out.glob(".config.*.json"):  # of a process that was killed
        leftover.unlink()
    return lock


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """nan and infinities as None: JSON has none."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


def reason(error: OSError) -> str:
    """Return the reason of a file error without its number and a temporary name."""
    return error.strerror or str(error)


class Recorder:
    """Writes a run's numbers to ``folder``; a context manager. On ranks other than 0 it does nothing.

    A disk that is full doesn't end a run: numbers wait in memory until there is room, trackers' are lost. Nor does
    a run folder that is removed: it is made anew with the records, and `removed` is set.

    Args:
        config: saved as config.json with ``metadata``, ``architecture`` and versions; its ``out``, the run folder, is
            created here.
        metadata: of the run: device, precision, weights of the feature network ...
        architecture: what the model is built with; see ``Model.architecture``.
        start: where a resumed run continues: records that were made after it are removed.
        lock: of the folder, released at the end.
    """

    def __init__(
        self,
        config: TrainConfig,
        metadata: Mapping[str, str],
        architecture: Mapping[str, Any],
        start: Checkpoint | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        if config.run.out is None or config.optimizer.steps is None:
            raise ValueError("the recorder takes a resolved configuration: run.out and optimizer.steps are needed")
        self.begun = time.monotonic()
        """Start of this process's part of the run, on the monotonic clock."""
        self.folder = folder = config.run.out
        self._lock = lock
        self.removed: int | None = None
        """Step at which the folder was last found to be removed."""
        self.steps = steps = config.optimizer.steps
        self._writes = rank() == 0
        self.console = Console(quiet=not self._writes)
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.description: dict[str, Any] = {
            **dataclasses.asdict(config),
            "started_in": str(Path.cwd()),
            "facts": dict(metadata),
            "architecture": dict(architecture),
            "versions": {
                "regvq_fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        """Contents of config.json."""
        self.save_json("config.json", self.description)
        for name, value in metadata.items():
            say(self.console, name, value)
        self._start = start.step if start else 0
        if start is not None:
            for note in start.notes:
                self.warn(note)
            if start.folder is not None:
                say(self.console, "resuming", f"from {start.folder}")
        keep = start.state.get("metrics_bytes", 0) if start else 0
        self._lines = LineFile(folder / "metrics.jsonl", keep) if self._writes else None
        self._failing: set[str] = set()
        trackers = config.run.trackers if self._writes else ()
        self._trackers = Trackers(trackers, folder, start.step if start else None, self.warn)
        self._num_codes: int | None = self.description.get("quantizer", {}).get("num_codes")
        self._below = Items()
        self._trained: Sequence[str] = ()  # numbers of the last training record
        self._progress = progress_bar(self.console, self._below)
        self._task = self._progress.add_task("step", total=steps, completed=self._start)

    def __enter__(self) -> Self:
        if not self._writes:
            return self
        self._trackers.open()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is None:
            return
        self._progress.stop()
        with self.surviving_a_full_disk("metrics.jsonl"):
            self._lines.sync()
        self._lines.close()
        self._trackers.close()
        if self._lock is not None:
            self._lock.release()

    def check_folder(self, step: int) -> None:
        """Make the run folder anew if it was removed; OSError if it is another process's by now."""
        if self._lock is not None:
            self._lock.check()
        if self._lines is None or (self.folder / "config.json").exists():
            return
        with self.surviving_a_full_disk("config.json"):
            self.save_json("config.json", self.description)
            self.removed = step
            self.warn(
                f"{self.folder} was removed; it is recreated with the records, without earlier checkpoints and images"
            )

    def advance(self, step: int) -> None:
        """Move the bar to the number of steps done."""
        self._progress.update(self._task, completed=step)

    def status(self, text: str) -> None:
        """Show what the run is doing below the bar; without a terminal on a line of its own."""
        self._show([text])
        if not self.console.is_terminal:
            self._print(text)

    def _show(self, items: Sequence[str]) -> None:
        self._below.items = items
        self._progress.refresh()

    def _print(self, text: str) -> None:
        """Print a line that stays; a file gets it unbroken, a terminal wraps it between words."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show progress of an evaluation below that of the steps: `regvq_fast.console.stage`."""
        return stage(self._progress, name)

    def warn(self, text: str) -> None:
        """Print a warning on a line that stays."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    @contextmanager
    def surviving_a_full_disk(self, what: str) -> Iterator[None]:
        """Turn an OSError of the block, which writes ``what``, into a warning: one until it succeeds again."""
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self.warn(f"{what} could not be written ({reason(error)}); the run continues")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl with all records so far."""
        return self._lines.size if self._lines else 0

    def sync(self) -> None:
        """Wait until the disk has all records so far; OSError where it can't."""
        if self._lines:
            self._lines.restore()
            self._lines.sync()

    def record(self, step: int, values: Mapping[str, float | str], prefix: str = "train") -> None:
        """Write numbers of a step to metrics.jsonl and the trackers, and the main ones of training below the bar."""
        if self._lines is None:
            return
        self.check_folder(step)
        with self.surviving_a_full_disk("metrics.jsonl"):
            self._lines.restore()
            self._lines.write(json.dumps({"step": step, "split": prefix, **_finite(values)}, allow_nan=False))
        numbers = {f"{prefix}/{name}": value for name, value in values.items() if not isinstance(value, str)}
        self._trackers.numbers(step, numbers)
        if prefix == "train":
            self._trained = progress_items(values)
            self._show(self._trained)
            if not self.console.is_terminal:
                self._print(f"step {step}/{self.steps}  {' · '.join(self._trained)}")

    def record_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of an evaluation as :meth:`record` does, and print the main ones on a line that stays."""
        self.record(step, values, prefix="val")
        items = evaluation_items(values, self._num_codes)
        self._print(f"step {step}/{self.steps}  evaluation: {' · '.join(items)}")
        self._show(self._trained)

    def image_path(self, name: str, step: int | None = None) -> Path:
        """Return the path of an image in the run folder."""
        return self.folder / "pictures" / (f"{name}.png" if step is None else f"{name}-{step:07d}.png")

    def show_image(self, path: Path, step: int) -> None:
        """Show a saved image in the trackers."""
        self._trackers.image(step, path.stem.split("-")[0], path)

    def save_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON file into the run folder, whole or not at all."""
        if not self._writes:
            return
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(
                json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8"
            )

    def remove_results(self) -> None:
        """Remove what only a run at its end has: its model and its summary."""
        if self._writes:
            for name in (WEIGHTS, _SUMMARY):
                (self.folder / name).unlink(missing_ok=True)

    def summarize(self, title: str, rows: Mapping[str, object]) -> None:
        """Save summary.json and print it: numbers with their units as a table, below it whole paths, to be copied."""
        self.save_json(_SUMMARY, rows)
        table = Table(title=Text(title), show_header=False, title_justify="left", min_width=len(title))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            if isinstance(value, Path):
                continue
            table.add_row(*map(Text, result(name, value, self._num_codes)))
        self._progress.stop()
        self.console.print(table)
        for name, value in rows.items():
            if isinstance(value, Path):
                self.console.print(Text.assemble((f"{name:>15}  ", "bold"), str(value)), soft_wrap=True)
