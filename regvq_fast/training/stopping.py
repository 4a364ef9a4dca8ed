"""Stops before the end of a run: signals, handled between steps, and errors, explained in a sentence."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch

from regvq_fast.config import TrainConfig
from regvq_fast.ranks import any_rank
from regvq_fast.training.checkpoint import Checkpoints
from regvq_fast.training.memory import is_out_of_memory, out_of_memory_advice

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunStopped(Exception):
    """The run ended before its last step, or could not save its results.

    Args:
        message: why, and what to do.
        exit_code: of the process.
        shared: all ranks stop with this message; otherwise it is that of one rank, which ends the others.
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
    """Raised by the signal handler; a BaseException, so that no library takes it for an error of its own."""


class StopSignals:
    """Signal handlers of a block: the first signal is only noted, the second one ends the process at once.

    A terminal that closes sends SIGHUP, more than once: that never ends the process at once, and does nothing under
    ``nohup``, which has it ignored. Outside of the main thread, where Python takes no signals, it does nothing.

    Args:
        remedy: how to continue after a second signal, asked for when it arrives.
    """

    def __init__(self, remedy: Callable[[], str]) -> None:
        self._remedy = remedy
        self._received: int | None = None
        self._abandonable = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
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

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Leave the block at the first signal, wherever it is; the next `check`, of all ranks, raises Interrupted.

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
        if os.getpid() != self._process:  # a forked child, which inherited the handler: its parent stops it
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
            with suppress(OSError):  # not print(): a signal can come in the middle of another one
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


def explained(error: BaseException, run: Run) -> RunStopped | None:
    """Return the exception that tells a user why their run stopped and how to continue; None for a bug."""
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
        return RunStopped(message, shared=not isinstance(error, ValueError))  # an op's, of its rank alone, is both
    if is_out_of_memory(error):
        why = out_of_memory_advice(run.config, run.device, run.rank_batch, training=not run.evaluating)
    elif isinstance(error, (ValueError, OSError)):
        # Of a loading process's error the last line says what it is; the others are its traceback.
        why = str(error).strip().rpartition("\n")[2].removeprefix(f"{type(error).__name__}: ")
    else:
        return None
    return RunStopped(f"stopped after step {run.done}: {why}; {remedy(run)}", shared=False)
