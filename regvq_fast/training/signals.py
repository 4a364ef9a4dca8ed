"""SIGINT and SIGTERM as a wish to stop, which a run fulfils between two steps."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from regvq_fast.ranks import any_rank

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was told to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        """What shells report for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""


class StopSignals:
    """Inside the block the first signal is only noted; the second one ends the process at once.

    Outside of the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, *_: object) -> None:
        """Raise Interrupted where a signal came, to any of the ranks, all of which must call this.

        Takes any arguments, to serve as a callback.
        """
        if received := any_rank(self._received or 0):
            raise Interrupted(received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which inherited the handler: its parent stops it
            return
        if self._received is not None:
            raise SystemExit(128 + number)
        self._received = number
        with suppress(OSError):  # not print(): a signal can come in the middle of another one
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")
