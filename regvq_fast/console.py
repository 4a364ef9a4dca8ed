"""Console output of the commands: run metadata, progress, and warnings that are printed once."""

import logging
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from regvq_fast.ranks import world_size

_LINE_EVERY = 10.0  # seconds, without a terminal


def say(console: Console, name: str, value: str) -> None:
    """Print a name and a value on one line, on a terminal wrapped between words; all names have one width."""
    label = f"{name:>18}  "
    if console.is_terminal:
        indent = " " * len(label)
        lines = textwrap.wrap(value, console.width - len(label), break_long_words=False, break_on_hyphens=False)
        value = f"\n{indent}".join(lines)
    console.print(Text.assemble((label, "bold"), value), soft_wrap=True)


class Items:
    """Items on one line; the last ones are dropped if they don't fit.

    Args:
        items: may be replaced while the line is displayed.
    """

    def __init__(self, items: Sequence[str] = ()) -> None:
        self.items = items

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = (Text(" · ".join(self.items[:count])) for count in range(len(self.items), 1, -1))
        first = Text("".join(self.items[:1]), no_wrap=True, overflow="ellipsis")
        yield next((line for line in lines if line.cell_len <= options.max_width), first)


class _Progress(Progress):
    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


def progress_bar(console: Console, below: RenderableType | None = None) -> Progress:
    """Return a progress bar: counter, bar, time elapsed and time left on one line.

    Args:
        console: displays it, if it is a terminal.
        below: displayed below the bar.
    """
    ranks = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    # Text columns don't wrap: only the bar adapts to the terminal.
    progress = _Progress(
        TextColumn(f"[bold]{{task.description}}{ranks}"),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("·"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
    progress.below = below
    return progress


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a second bar for a stage of long work; without a terminal, a line every 10 seconds.

    Args:
        progress: shows the bar until the block ends.
        name: of the stage and of the things counted, such as "sampling, positions".

    Yields:
        A function of the numbers done and in total.
    """
    console, last = progress.console, time.monotonic()
    task = progress.add_task(name, total=None)

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
    """Log a warning, once per process."""
    logging.getLogger("regvq_fast").warning(message)
