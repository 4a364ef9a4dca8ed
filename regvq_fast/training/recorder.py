"""What a run leaves and what its user sees: run folder, metrics.jsonl, TensorBoard, progress bar."""

import dataclasses
import json
import math
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from regvq_fast.config import TrainConfig
from regvq_fast.evaluation.pictures import atomic_path
from regvq_fast.version import __version__

# Names in the progress line, in this order, with their formats; everything else is in the files.
_SHOWN = {"loss": ".3f", "l1": ".3f", "perceptual": ".3f", "kl": ".2f", "lambda": ".2f"}


def new_run_folder(config: TrainConfig) -> Path:
    """Where the run will write; nothing is created yet.

    Raises:
        ValueError: the folder named by ``--out`` is not empty: runs don't mix.
    """
    out = config.run.out
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{config.run.preset}-{config.quantizer.quantizer}-{stamp}"
        candidates = (Path("runs") / (name + suffix) for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
        return next(path for path in candidates if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder; name a new one")
    return out


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """nan and infinities as None: JSON has none."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


class Recorder:
    """Writes a run's numbers to ``folder``; a context manager.

    Args:
        config: saved as config.json with ``facts`` and versions; its ``out``, the run folder, is created here.
        facts: what was found out at start: device, precision, weights of the feature network ...
    """

    def __init__(self, config: TrainConfig, facts: Mapping[str, str]) -> None:
        if config.run.out is None or config.optimizer.steps is None:
            raise ValueError("the recorder takes a resolved configuration: run.out and optimizer.steps are needed")
        self.folder = folder = config.run.out
        self.steps = steps = config.optimizer.steps
        self.console = Console()
        folder.mkdir(parents=True, exist_ok=True)
        self.save_json(
            "config.json",
            {
                **dataclasses.asdict(config),
                "facts": dict(facts),
                "versions": {
                    "regvq_fast": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
        )
        for name, value in facts.items():
            self.console.print(Text.assemble((f"{name:>18}  ", "bold"), value))
        self._jsonl = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
        )
        self._task = self._progress.add_task("starting", total=steps)

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(self.folder / "tensorboard")
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._tensorboard.close()
        self._jsonl.close()

    def advance(self, step: int) -> None:
        """Move the bar to the number of steps done."""
        self._progress.update(self._task, completed=step)

    def status(self, text: str) -> None:
        """What the bar says the run is doing; its own line where there is no terminal."""
        self._progress.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False)

    def record(self, step: int, values: Mapping[str, float], prefix: str = "train") -> None:
        """Write numbers of a step to metrics.jsonl and TensorBoard; those of training also to the progress line."""
        self._jsonl.write(json.dumps({"step": step, "split": prefix, **_finite(values)}, allow_nan=False) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)
        if prefix == "train":
            parts = [f"{name} {values[name]:{style}}" for name, style in _SHOWN.items() if name in values]
            parts += [f"{values['images_per_second']:.1f} images/s", f"codes {values['utilization']:.0%}"]
            line = " · ".join(parts)
            self.status(line if self.console.is_terminal else f"step {step}/{self.steps}  {line}")

    def picture(self, name: str, step: int | None = None) -> Path:
        """Path of a picture in the run folder."""
        return self.folder / "pictures" / (f"{name}.png" if step is None else f"{name}-{step:07d}.png")

    def show_picture(self, path: Path, step: int) -> None:
        """Put a picture that was saved into TensorBoard as well."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._tensorboard.add_image(path.stem.split("-")[0], pixels, step, dataformats="HWC")

    def save_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON file into the run folder, whole or not at all."""
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(
                json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8"
            )

    def summarize(self, title: str, rows: Mapping[str, object]) -> None:
        """Save summary.json and print it: numbers as a table, paths below it, whole so that they can be copied."""
        self.save_json("summary.json", rows)
        table = Table(title=Text(title), show_header=False, title_justify="left", min_width=len(title))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            if isinstance(value, Path):
                continue
            table.add_row(Text(name), Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
        self._progress.stop()
        self.console.print(table)
        for name, value in rows.items():
            if isinstance(value, Path):
                self.console.print(Text.assemble((f"{name:>15}  ", "bold"), str(value)), soft_wrap=True)
