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
from regvq_fast.files import LineFile, atomic_path
from regvq_fast.models.hub import PICTURES
from regvq_fast.models.pretrained import WEIGHTS
from regvq_fast.number_formats import evaluation_items, progress_items, result
from regvq_fast.ownership import FolderLock
from regvq_fast.ranks import rank
from regvq_fast.training.checkpoint import Checkpoint
from regvq_fast.training.trackers import Trackers
from regvq_fast.version import __version__

_SUMMARY = "summary.json"


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with NaN and infinities, which JSON lacks, as None."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


def reason(error: OSError) -> str:
    """Return the reason of a file error, without its number and file name."""
    return error.strerror or str(error)


class Recorder:
    """Writes a run's numbers to its folder; a context manager. On ranks other than 0 it does nothing.

    The run goes on if the disk is full: records wait in memory until there is room, and trackers lose theirs. It also
    goes on if its folder is removed: the folder is made anew with the records, and `removed` is set.

    Args:
        config: saved as config.json with ``metadata``, ``architecture`` and versions. Its ``out``, the run folder, is
            created here.
        metadata: of the run: device, precision, weights of the feature network ...
        architecture: see ``Model.architecture``.
        start: where a resumed run continues; later records are removed.
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
        """Time on the monotonic clock at which this process began."""
        self.folder = folder = config.run.out
        self._lock = lock
        self.removed: int | None = None
        """Step at which the folder was last found removed; None: never."""
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
        """Make the run folder anew if it was removed; OSError if another process owns it by now."""
        if self._lock is not None:
            self._lock.check()
        if self._lines is None or (self.folder / "config.json").exists():
            return
        with self.surviving_a_full_disk("config.json"):
            self.save_json("config.json", self.description)
            self.removed = step
            self.warn(
                f"{self.folder} was removed; it is made anew with the records, without earlier checkpoints and images"
            )

    def advance(self, step: int) -> None:
        """Set the progress bar to the number of steps done."""
        self._progress.update(self._task, completed=step)

    def status(self, text: str) -> None:
        """Show what the run is doing: below the bar, or without a terminal on its own line."""
        self._show([text])
        if not self.console.is_terminal:
            self._print(text)

    def _show(self, items: Sequence[str]) -> None:
        self._below.items = items
        self._progress.refresh()

    def _print(self, text: str) -> None:
        """Print a permanent line, wrapped between words on a terminal and unwrapped in a file."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show the progress of an evaluation below that of the steps: see `regvq_fast.console.stage`."""
        return stage(self._progress, name)

    def warn(self, text: str) -> None:
        """Print a warning on a permanent line."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    @contextmanager
    def surviving_a_full_disk(self, what: str) -> Iterator[None]:
        """Turn an OSError in the block, which writes ``what``, into a warning; repeat it only after a success."""
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self.warn(f"{what} could not be written ({reason(error)}); the run goes on")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl in bytes with all records so far."""
        return self._lines.size if self._lines else 0

    def sync(self) -> None:
        """Flush all records to the disk; OSError if that fails."""
        if self._lines:
            self._lines.restore()
            self._lines.sync()

    def record(self, step: int, values: Mapping[str, float | str], prefix: str = "train") -> None:
        """Write numbers of a step to metrics.jsonl and the trackers; show the main ones of training below the bar."""
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
        """Write the numbers of an evaluation as :meth:`record` does; print the main ones on a permanent line."""
        self.record(step, values, prefix="val")
        items = evaluation_items(values, self._num_codes)
        self._print(f"step {step}/{self.steps}  evaluation: {' · '.join(items)}")
        self._show(self._trained)

    def image_path(self, name: str, step: int | None = None) -> Path:
        """Return the path of an image in the run folder."""
        return self.folder / PICTURES / (f"{name}.png" if step is None else f"{name}-{step:07d}.png")

    def show_image(self, path: Path, step: int) -> None:
        """Show a saved image in the trackers."""
        self._trackers.image(step, path.stem.split("-")[0], path)

    def save_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON file into the run folder atomically."""
        if not self._writes:
            return
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(
                json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8"
            )

    def remove_results(self) -> None:
        """Remove the files of a finished run: its model and its summary."""
        if self._writes:
            for name in (WEIGHTS, _SUMMARY):
                (self.folder / name).unlink(missing_ok=True)

    def summarize(self, title: str, rows: Mapping[str, object]) -> None:
        """Save summary.json and print it: a table of numbers with units, and below it the paths of files."""
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
