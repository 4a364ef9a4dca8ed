"""What commands say while they work: facts, progress, and warnings that need saying once."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from regvq_fast.ranks import num_ranks

_LINE_EVERY = 10.0  # seconds, without a terminal


def say(console: Console, name: str, value: str) -> None:
    """A fact, in a line of its own, its name before it; the facts of a run stand in one column."""
    console.print(Text.assemble((f"{name:>18}  ", "bold"), value), soft_wrap=True)


def progress_bar(console: Console, *more: ProgressColumn) -> Progress:
    """The bar of long work: what, how many of how many, the time that it took and that is left.

    Args:
        console: where it is drawn, if that is a terminal.
        more: columns to its right.
    """
    ranks = f" (rank 0 of {num_ranks()})" if num_ranks() > 1 else ""
    return Progress(
        TextColumn(f"[bold]{{task.description}}{ranks}"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *more,
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def stage(progress: Progress, name: str, **fields: Any) -> Iterator[Callable[[int, int], None]]:
    """One more bar for a stage of long work; without a terminal, a line every 10 seconds.

    Args:
        progress: shows the bar until the block ends.
        name: of the stage and of what it counts, as "sampling, positions".
        fields: of the columns of `progress` that need them.

    Yields:
        A function that takes how many are done, and of how many.
    """
    console, last = progress.console, time.monotonic()
    task = progress.add_task(name, total=None, **fields)

    def update(done: int, total: int) -> None:
        nonlocal last
        progress.update(task, completed=done, total=total)
        if not console.is_terminal and time.monotonic() - last >= _LINE_EVERY:
            console.print(f"{name} {done}/{total}", highlight=False, markup=False, soft_wrap=True)
            last = time.monotonic()

    try:
        yield update
    finally:
        progress.remove_task(task)


@cache
def warn_once(message: str) -> None:
    """A warning that several places of one run would repeat: training and validation come out of the same files."""
    logging.getLogger("regvq_fast").warning(message)
