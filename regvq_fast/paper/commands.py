"""Processes that run the rows' commands, several at a time; a signal or this process's end lets each save its work.

They are forked from a server that has imported their modules: a start takes 0.1 s instead of several seconds.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any, Self

from regvq_fast.orphans import watch_parent

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "regvq_fast.cli.train",
        "regvq_fast.cli.cache_tokens",
        "regvq_fast.cli.evaluate",
        "torch.utils.tensorboard",
        "torchmetrics.functional.image",
        "matplotlib.figure",
    ]
)


class Commands:
    """Runs functions in processes; a context manager for the main thread, whose methods any thread may call.

    SIGINT, SIGTERM and a closed terminal's SIGHUP are passed on to every running process. They end this process at the
    end of the block, when no other is left.

    Args:
        side_by_side: processes at a time; they divide the cores among their threads.
    """

    def __init__(self, side_by_side: int = 1) -> None:
        self.side_by_side = side_by_side > 1
        cores = len(os.sched_getaffinity(0))
        divides = self.side_by_side and "OMP_NUM_THREADS" not in os.environ
        self._threads = max(1, cores // side_by_side) if divides else None
        self._running: set[Any] = set()
        self._received: list[int] = []
        self._lock = threading.RLock()  # each process gets each signal exactly once
        # A start looks for the statuses of all processes, too; who reads a status second gets 255 in its place.
        self._statuses = threading.Lock()
        self.stopping = False
        """True once no more commands may begin: after a signal or a failure."""

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._received and self._received[-1] == signal.SIGINT:
            raise KeyboardInterrupt from None
        if self._received:
            sys.exit(128 + self._received[-1])

    def run(self, function: Callable[..., object], *arguments: object) -> int:
        """Run a module's function in a process; return its exit status, negative if a signal ended it.

        Raises:
            OSError: the server was killed.
        """
        process = _SERVER.Process(target=_run, args=(self._threads, function, arguments))
        try:
            with self._statuses:
                process.start()
        except EOFError:
            raise OSError("the process that starts commands was killed; run the same command again") from None
        with self._lock:
            self._running.add(process)
            missed = list(self._received)
        for number in missed:  # signals that came while it started
            _send(process, number)
        wait([process.sentinel])
        with self._statuses:
            process.join()
        with self._lock:
            self._running.discard(process)
        return process.exitcode or 0

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        with self._lock:
            self._received.append(number)
            running = list(self._running)
        for process in running:
            _send(process, number)


def _send(process: Any, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM if number == signal.SIGHUP else number)  # SIGTERM lets it save


def _run(threads: int | None, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    watch_parent(signal.SIGTERM)  # lets it save its work: the same command continues both
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    function(*arguments)
