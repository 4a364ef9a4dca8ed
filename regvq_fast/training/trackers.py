"""Trackers, which show a run's numbers and images: TensorBoard, Weights & Biases (wandb) and Trackio."""

import importlib
import importlib.util
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from regvq_fast.files import atomic_path
from regvq_fast.invocation import install

_RUN_NAME = "tracker-run.txt"
"""File in the run folder with the name of the run in wandb and Trackio, which a resumed run continues."""


class Tracker(Protocol):
    """One tracker of a run; any of its calls may fail."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Show an image, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Wait until all is written."""


class _TensorBoard:
    """TensorBoard's files in the run folder; a resumed run hides what they have of later steps."""

    def __init__(self, folder: Path, start: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start + 1 if start else start  # None: nothing; 0: everything
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=purge)
        self.close = self._writer.close

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")


class _Service:
    """A run in wandb, or in Trackio, which has the functions of wandb; ``module`` is its package."""

    def __init__(self, module: str, folder: Path) -> None:
        self._module = importlib.import_module(module)
        name = _run_name(folder)
        settings: dict[str, Any] = {"config": json.loads((folder / "config.json").read_text(encoding="utf-8"))}
        settings["project"] = os.environ.get(f"{module.upper()}_PROJECT", "regvq_fast")
        if module == "wandb":  # Trackio knows runs by their names; and the console is the progress bar's
            settings |= {"id": name, "dir": str(folder), "settings": self._module.Settings(console="off")}
        self._run = self._module.init(name=name, resume="allow", **settings)
        self.close = self._module.finish  # a run's own leaves it to Trackio's end to finish it again

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        self._run.log({name: self._module.Image(pixels)}, step=step)


def _run_name(folder: Path) -> str:
    """Return the name in the run folder; the first call makes it."""
    path = folder / _RUN_NAME
    if not path.exists():
        with atomic_path(path) as temporary:
            start = re.sub(r"[^\w.-]", "-", folder.absolute().name)[:100]  # wandb refuses some characters, and long ids
            temporary.write_text(f"{start}-{secrets.token_hex(4)}", encoding="utf-8")
    return path.read_text(encoding="utf-8")


def check_installed(names: Iterable[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log {name} needs the package {name}: {install('trackers')}, or leave it out of --log")


class Trackers:
    """All trackers of a run. One that fails is dropped with a warning, and the run goes on.

    Args:
        names: of the trackers, from tensorboard, wandb and trackio.
        folder: of the run, which has its config.json.
        start: steps done where a resumed run continues; None for a new run.
        warn: prints a warning.
    """

    def __init__(self, names: Iterable[str], folder: Path, start: int | None, warn: Callable[[str], None]) -> None:
        self._names, self._folder, self._start, self._warn = names, folder, start, warn
        self._open: dict[str, Tracker] = {}

    def open(self) -> None:
        """Connect to them, until :meth:`close`."""
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        for name in self._names:
            with self._dropping(name):
                board = name == "tensorboard"
                self._open[name] = _TensorBoard(self._folder, self._start) if board else _Service(name, self._folder)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        self._each(lambda tracker: tracker.numbers(step, values))

    def image(self, step: int, name: str, path: Path) -> None:
        """Show an image file."""
        import numpy as np
        from PIL import Image

        if self._open:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._each(lambda tracker: tracker.image(step, name, pixels))

    def close(self) -> None:
        """Wait until all is written."""
        self._each(lambda tracker: tracker.close())
        threading.excepthook = self._excepthook

    def _each(self, write: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropping(name):
                write(tracker)

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails for good: TensorBoard's queue has no reader from then on, and would block."""
        try:
            yield
        except Exception as error:  # wandb and Trackio may raise anything
            self._open.pop(name, None)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            self._warn(f"{name} gets no more numbers ({reason}); metrics.jsonl has them")

    def _thread_failed(self, failure: Any) -> None:
        """Keep quiet about TensorBoard's writer, which finds the disk full in a thread: its next call says so."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            self._excepthook(failure)
