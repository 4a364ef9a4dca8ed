"""Processes and threads that load data: their signals, and limits on waiting for them."""

import atexit
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from regvq_fast.orphans import watch_parent
from regvq_fast.termination import deferred

PATIENCE_SECONDS = 300.0
"""Longest wait for a batch in seconds; the failover of a network disk may take minutes."""
_LOOK_SECONDS = 5.0
_NO_SHARED_MEMORY = 28  # exit status
_STUCK = {"T": "is stopped", "D": "waits for a disk that doesn't answer"}  # by state in /proc

_running: weakref.WeakSet["_Workers"] = weakref.WeakSet()


class WorkersFailed(OSError):
    """A data worker ended, or it or the disk did not respond in time."""


class WorkerLoader(DataLoader[Any]):
    """A DataLoader with a limit on waiting: it returns :class:`PatientBatches` or :class:`OwnBatches`."""

    def __iter__(self) -> Any:
        if not self.num_workers:
            return OwnBatches(super().__iter__())
        if self._iterator is None:
            with deferred():
                return PatientBatches(super().__iter__())
        batches = PatientBatches(self._iterator)
        batches.wait_for(super().__iter__)  # until each worker has answered
        return batches

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _Workers(self)


class _Workers(_MultiProcessingDataLoaderIter):
    """Worker processes and what they loaded; they are killed at the end, wherever they are.

    They have nothing to save, and a stuck one handles no other signal.
    """

    _shutdown = True  # default that __del__ reads if the constructor failed

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._owner = os.getpid()
        super().__init__(loader)
        _running.add(self)

    def cut(self) -> None:
        """Kill the workers, and end a wait for a batch that was sent in part.

        This process can write to the pipe, too: only without that it is at its end.
        """
        for worker in self._workers:
            worker.kill()
        if hasattr(self, "_pin_memory_thread"):
            self._pin_memory_thread_done_event.set()
            vars(self._pin_memory_thread)["_invoke_excepthook"] = lambda thread: None  # it ends by an error
        with suppress(OSError):  # garbage collection closed it before
            writer = self._worker_result_queue._writer.fileno()  # type: ignore[attr-defined]
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, writer, inheritable=False)
            os.close(nowhere)

    def _shutdown_workers(self) -> None:
        if os.getpid() != self._owner:  # a copy in a fork, found by its garbage collection
            return
        if not self._shutdown and hasattr(self, "_workers"):
            self.cut()
            # A worker killed while it read this event still holds the event's lock. No other process needs the event.
            self._workers_done_event = threading.Event()  # type: ignore[assignment]
            if hasattr(self, "_pin_memory_thread"):  # DataLoader would wake it through the pipe
                self._pin_memory_thread.join(_LOOK_SECONDS)
                del self._pin_memory_thread
        super()._shutdown_workers()


class OwnBatches(Iterator[Any]):
    """Batches loaded by a thread of this process: Python can't handle signals in a thread that waits for a disk.

    Raises:
        WorkersFailed: no batch for five minutes.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        arguments = (batches, self._asked, self._loaded, device)
        self._thread = threading.Thread(target=_load, args=arguments, daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        self._asked.put(True)
        try:
            batch, error = self._loaded.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise WorkersFailed(f"no data for {PATIENCE_SECONDS:.0f} seconds: the disk doesn't answer") from None
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """End the thread after its current read."""
        self._asked.put(False)

    __del__ = close


def _load(batches: Iterator[Any], asked: Any, loaded: Any, device: int | None) -> None:
    while asked.get():
        try:
            if device is not None:  # the current device is per thread; pinning memory uses it
                torch.cuda.set_device(device)
            loaded.put((next(batches), None))
        except BaseException as error:
            loaded.put((None, error))


class PatientBatches(Iterator[Any]):
    """Batches of worker processes, which end with this iterator.

    A thread kills the workers if the next batch takes too long, or if one of them ended. DataLoader's own timeout does
    not end a wait for a worker in the middle of sending a batch.

    Raises:
        WorkersFailed: a worker ended, or did not deliver the next batch for five minutes; the message names it.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._since: float | None = None  # start of the current wait, on the monotonic clock
        self._stuck = ""
        self._closed = threading.Event()
        self._forget_workers()
        threading.Thread(target=_watch, args=(weakref.ref(self), self._closed), daemon=True).start()

    def __next__(self) -> Any:
        return self.wait_for(self._batches.__next__)

    def wait_for(self, answer: Callable[[], Any]) -> Any:
        """Call a method of the workers that waits for them."""
        self._since = time.monotonic()
        try:
            return answer()
        except (RuntimeError, OSError, EOFError) as error:
            why = self._stuck or self._failure()
            if not why:
                raise
            self.close()
            raise WorkersFailed(why) from error
        finally:
            self._since = None

    def end_if_stuck(self) -> None:
        """Kill the worker of the next batch if the wait is too long; end a wait for a batch that was sent in part."""
        since = self._since
        waited = 0.0 if since is None else time.monotonic() - since
        if waited > _LOOK_SECONDS and (why := self._stuck or self._failure()):
            self._stuck = why
            self._batches.cut()
        elif waited > PATIENCE_SECONDS and not self._stuck:
            workers = self._batches._workers
            stuck = [k for k, worker in enumerate(workers) if _state(worker) in _STUCK]
            # Between two passes no batch is due.
            number, *_ = self._batches._task_info.get(self._batches._rcvd_idx) or [*stuck, 0]
            worker = workers[number]
            does = _STUCK.get(_state(worker), "doesn't answer")
            self._stuck = (
                f"no data for {PATIENCE_SECONDS:.0f} seconds: data worker {number} (process {worker.pid}) {does}"
            )
            worker.kill()

    def _failure(self) -> str:
        """Return a message about a worker that ended; empty if all live."""
        for number, worker in enumerate(self._batches._workers):
            worker.join(0.1)  # it may just have died while sending a batch
            if worker.exitcode == _NO_SHARED_MEMORY:
                return _no_room()
            if worker.exitcode is not None:
                signaled = worker.exitcode < 0
                how = f"by {signal.Signals(-worker.exitcode).name}" if signaled else f"with status {worker.exitcode}"
                return f"data worker {number} (process {worker.pid}) ended {how}; --workers 0 loads data without them"
        return ""

    def _forget_workers(self) -> None:
        """Keep DataLoader's signal handler from raising an error, anywhere in this process, when a worker ends."""
        if self._batches._worker_pids_set:
            _remove_worker_pids(id(self._batches))
            self._batches._worker_pids_set = False

    def close(self) -> None:
        """Kill the workers."""
        self._closed.set()
        self._batches._shutdown_workers()


def _state(worker: BaseProcess) -> str:
    try:
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _watch(batches: "weakref.ref[PatientBatches]", closed: threading.Event) -> None:
    while not closed.wait(min(_LOOK_SECONDS, PATIENCE_SECONDS / 4)) and (waiting := batches()) is not None:
        waiting.end_if_stuck()
        del waiting


@atexit.register  # before multiprocessing's handler, which would wait for the workers
def _end_workers() -> None:
    """End all workers when Python exits: of batches still in use, and of loaders that keep theirs for another pass.

    Something may still refer to a loader, such as the traceback of an exception.
    """
    for workers in list(_running):
        workers._shutdown_workers()


def _no_room() -> str:
    memory = os.statvfs("/dev/shm")
    return (
        f"a data worker found no room in shared memory (/dev/shm has {memory.f_blocks * memory.f_frsize / 2**20:.1f} "
        "MiB): use fewer --workers, or 0, or give the container more shared memory, as by docker run --shm-size"
    )


def start_worker(worker: int) -> None:
    """Ignore Ctrl-C, a closed terminal and the first SIGTERM: they reach every process, and the parent acts on them.

    The second SIGTERM ends the worker: Python sends one at exit and waits. DataLoader limits each worker to one compute
    thread. DataLoader's worker notices the end of its parent, too, but then waits until the batches that it has loaded
    are sent; those that don't fit into the pipe never are.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    Queue._on_queue_feeder_error = staticmethod(_end_unheard)  # type: ignore[attr-defined]
    sys.excepthook = _report
    watch_parent(signal.SIGKILL)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of a worker, but not that its parent ended in the middle of receiving a batch."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_unheard(error: Exception, batch: object) -> None:
    """End a worker whose batch can't be sent: otherwise the parent would wait for it forever."""
    no_room = "shared memory" in str(error) or "No space left" in str(error)
    if not no_room:
        print(f"data worker {os.getpid()}: {error}", file=sys.stderr, flush=True)
    os._exit(_NO_SHARED_MEMORY if no_room else 1)
