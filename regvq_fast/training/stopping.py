"""Early ends of a run: signals, which are handled between steps, and errors, which are explained in one sentence."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch

from regvq_fast.config import TrainConfig
from regvq_fast.precision import is_out_of_memory
from regvq_fast.ranks import any_rank, rank, world_size
from regvq_fast.training.checkpoint import Checkpoints
from regvq_fast.training.memory import out_of_memory_advice

TRACEBACK = "traceback.txt"
"""File in the run folder to which the tracebacks of unexpected errors are appended."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")


class RunStopped(Exception):
    """The run ended before its last step, or could not save its results.

    Args:
        message: the reason, and what to do.
        exit_code: of the process.
        shared: True if all ranks stop with this message, False if one rank failed and ends the others.
    """

    def __init__(self, message: str, exit_code: int = 1, *, shared: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.shared = exit_code, shared


class Interrupted(Exception):
    """The run received a signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        """Status that shells report for a process ended by the signal: 130 for SIGINT, 143 for SIGTERM."""


class _Abandoned(BaseException):
    """Raised by the signal handler; a BaseException, so that no library handles it as an error."""


class StopSignals:
    """Signal handlers of a block: the first signal requests a stop, the second ends the process at once.

    A closing terminal sends SIGHUP, possibly twice: it never ends the process at once, and ``nohup``'s SIG_IGN is kept.
    Outside the main thread, where Python can't handle signals, this does nothing.

    Args:
        remedy: called on the second signal; returns how to continue the run.
    """

    def __init__(self, remedy: Callable[[], str]) -> None:
        self._remedy = remedy
        self._received: int | None = None
        self._abandonable = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, *_: object) -> None:
        """Raise Interrupted if any rank received a signal; all ranks must call this.

        Accepts any arguments, to serve as a callback.
        """
        if received := any_rank(self._received or 0):
            raise Interrupted(received)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Leave the block at the first signal, at any point in it; the next `check` on all ranks raises Interrupted.

        For work of one rank that can be repeated.
        """
        self._abandonable = True
        try:
            yield
        except _Abandoned:
            pass
        finally:
            self._abandonable = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child inherits the handler; its parent stops it
            return
        first = self._received is None
        if not first and number == signal.SIGHUP:
            return
        if first:
            self._received = number
            message = "stopping after this step or batch; a second signal stops at once"
        else:
            message = f"stopped at once; {self._remedy()}"
        if not (first and self._abandonable):
            with suppress(OSError):  # not print(): the signal may interrupt another print()
                os.write(2, f"\n{message}\n".encode())
        if not first:
            raise SystemExit(128 + number)
        if self._abandonable:
            raise _Abandoned


class Run(Protocol):
    """The members of a trainer that :func:`explained` needs."""

    checkpoints: Checkpoints
    device: torch.device
    steps: int
    done: int
    rank_batch: int
    evaluating: bool

    @property
    def config(self) -> TrainConfig: ...

    @property
    def command(self) -> str: ...


def remedy(run: Run) -> str:
    """Return how to continue a run, for messages."""
    return f"to continue from {run.checkpoints.newest_name}: {run.command}"


def explained(error: BaseException, run: Run) -> RunStopped:
    """Return an exception whose message says why the run stopped and how to continue.

    The traceback of an unexpected error is written into the run folder, or printed if that fails.
    """
    if isinstance(error, Interrupted):
        during = ", during an evaluation" if run.evaluating else ""
        message = f"stopped by {error} after step {run.done} of {run.steps}{during}; {remedy(run)}"
        return RunStopped(message, error.exit_code)
    if isinstance(error, FloatingPointError):
        newest = run.checkpoints.newest_name
        message = (
            f"stopped after step {run.done}: {error}; to continue from {newest}, add a lower --lr, a lower "
            f"--clip-grad or --no-amp to: {run.command}"
        )
        return RunStopped(message, shared=not isinstance(error, ValueError))  # an op raises both, on its rank only
    if is_out_of_memory(error):
        why = out_of_memory_advice(run.config, run.device, run.rank_batch, training=not run.evaluating)
    elif isinstance(error, (ValueError, OSError)):
        why = first_line(error).removeprefix(f"{type(error).__name__}: ")
    elif any(sign in str(error) for sign in _CONNECTION_LOST) and world_size() > 1:
        why = "the connection to another process is lost; see that process's output"
    else:
        why = f"{type(error).__name__}: {first_line(error)}; {_keep_traceback(error, run.config.run.out)}"
    return RunStopped(f"stopped after step {run.done}: {why}; {remedy(run)}", shared=False)


def first_line(error: BaseException) -> str:
    """Return the line of an error's message that states the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    # A data worker's message is a traceback, which ends with the error.
    return lines[-1 if lines[0].startswith("Caught ") else 0].rstrip(" .:")


def _keep_traceback(error: BaseException, folder: Path | None) -> str:
    """Write the traceback of an error into the run folder; return a text that says where it is."""
    text = "".join(traceback.format_exception(error))
    path = (folder or Path()) / (TRACEBACK if rank() == 0 else f"rank-{rank()}-{TRACEBACK}")
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.ctime()}\n{text}\n")
    except OSError:
        sys.stderr.write(text)
        return "its traceback is above"
    return f"its traceback is in {path}"
