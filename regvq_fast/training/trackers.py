"""Trackers of a run's numbers and images: TensorBoard, Weights & Biases (wandb) and Trackio."""

import functools
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
"""File in the run folder with the run's name in wandb and Trackio; a resumed run continues under it."""


class Tracker(Protocol):
    """One tracker of a run; any of its calls may fail."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Log an image, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Wait until everything is written."""


class _TensorBoard:
    """TensorBoard's files in the run folder; a resumed run hides their records of later steps."""

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
    """A run in wandb, or in Trackio, whose package has the functions of wandb's.

    Args:
        module: the package.
        folder: of the run.
        start: not used: the service continues the run of the same name.
    """

    def __init__(self, module: str, folder: Path, start: int | None) -> None:
        self._module = importlib.import_module(module)
        name = _run_name(folder)
        settings: dict[str, Any] = {"config": json.loads((folder / "config.json").read_text(encoding="utf-8"))}
        settings["project"] = os.environ.get(f"{module.upper()}_PROJECT", "regvq_fast")
        if module == "wandb":  # Trackio identifies runs by name; the progress bar uses the console
            settings |= {"id": name, "dir": str(folder), "settings": self._module.Settings(console="off")}
        self._run = self._module.init(name=name, resume="allow", **settings)
        self.close = self._module.finish  # not the run's own: Trackio would finish it again at exit

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        self._run.log({name: self._module.Image(pixels)}, step=step)


def _run_name(folder: Path) -> str:
    """Return the run's name from its folder; the first call generates it."""
    path = folder / _RUN_NAME
    if not path.exists():
        with atomic_path(path) as temporary:
            start = re.sub(r"[^\w.-]", "-", folder.absolute().name)[:100]  # wandb refuses some characters, and long ids
            temporary.write_text(f"{start}-{secrets.token_hex(4)}", encoding="utf-8")
    return path.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[[Path, int | None], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": functools.partial(_Service, "wandb"),
    "trackio": functools.partial(_Service, "trackio"),
}
"""Trackers by their names, which are also those of their packages; each takes the run's folder and its start."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise ValueError for a tracker that is unknown, or whose package is not installed."""
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"--log takes {', '.join(_TRACKERS)} or none, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log {name} needs the package {name}: {install('trackers')}, or leave it out of --log")


class Trackers:
    """All trackers of a run. A tracker that fails is dropped with a warning, and the run goes on.

    Args:
        names: of the trackers, checked by :func:`check_trackers`.
        folder: of the run, with its config.json.
        start: steps done where a resumed run continues; None for a new run.
        warn: prints a warning.
    """

    def __init__(self, names: Iterable[str], folder: Path, start: int | None, warn: Callable[[str], None]) -> None:
        self._names, self._folder, self._start, self._warn = names, folder, start, warn
        self._open: dict[str, Tracker] = {}

    def open(self) -> None:
        """Connect to the trackers."""
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        for name in self._names:
            with self._dropping(name):
                self._open[name] = _TRACKERS[name](self._folder, self._start)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        self._each(lambda tracker: tracker.numbers(step, values))

    def image(self, step: int, name: str, path: Path) -> None:
        """Log an image file."""
        import numpy as np
        from PIL import Image

        if self._open:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._each(lambda tracker: tracker.image(step, name, pixels))

    def close(self) -> None:
        """Wait until everything is written."""
        self._each(lambda tracker: tracker.close())
        threading.excepthook = self._excepthook

    def _each(self, write: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropping(name):
                write(tracker)

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Drop a tracker when it fails: TensorBoard's queue then has no reader, so that further calls would block."""
        try:
            yield
        except Exception as error:  # wandb and Trackio may raise anything
            self._open.pop(name, None)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            self._warn(f"{name} gets no more numbers ({reason}); metrics.jsonl has them")

    def _thread_failed(self, failure: Any) -> None:
        """Ignore a full disk in the thread of TensorBoard's writer, whose next call raises the error."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            self._excepthook(failure)
