"""What commands say while they work: facts, progress, and warnings that need saying once."""

import logging
from functools import cache

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


@cache
def warn_once(message: str) -> None:
    """A warning that several places of one run would repeat: training and validation come out of the same files."""
    logging.getLogger("regvq_fast").warning(message)
