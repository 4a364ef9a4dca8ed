"""Signals that end a process: unfinished files are removed after SIGTERM and SIGHUP, as they are after Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from regvq_fast.ranks import is_torchrun


@contextmanager
def removes_unfinished() -> Iterator[None]:
    """Raise SystemExit in the block for SIGTERM and a closed terminal's SIGHUP, which would skip ``finally`` otherwise.

    A second SIGTERM ends the process at once, a second SIGHUP does nothing. ``nohup``'s SIG_IGN is kept. Under
    ``torchrun``, whose processes wait for each other outside of Python, and outside of the main thread this does
    nothing.
    """
    if is_torchrun() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_DFL if handled == signal.SIGTERM else signal.SIG_IGN)
        sys.exit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP after the block, if Python handles them.

    Python ignores exceptions of the hooks that it runs in a fork, and so those of signals that arrive there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    before: dict[int, Callable[[int, FrameType | None], object]] = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))  # type: ignore[misc]
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)
