"""What the benchmarks measure with: time of runs side by side, on the host and on a GPU, and the memory they take."""

import contextlib
import ctypes
import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Run = Callable[[], object]
R = TypeVar("R", bound=Run)
T = TypeVar("T")

# Turns that even a slow case gets.
LEAST_REPEATS = 5
# Rounds of pytest-benchmark that even a slow run gets, and seconds within which others get more.
LEAST_ROUNDS, ROUNDS_LIMIT = 3, 0.8


def take_turns(
    runs: dict[str, Run],
    clock: Callable[[Run], T],
    repeats: int,
    limit: float = math.inf,
    least: int = LEAST_REPEATS,
) -> dict[str, list[T]]:
    """What ``clock`` reads off each warm run, ``repeats`` times, or fewer, but ``least``, after ``limit`` seconds.

    They take turns, so that a busy or hot moment of the machine meets all of them.
    """
    readings: dict[str, list[T]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= least and time.perf_counter() - begin > limit:
            break
        for name, run in runs.items():
            readings[name].append(clock(run))
    return readings


@dataclass
class Measured(Generic[T]):
    """What is known of a competitor in a case."""

    found: dict[str, Any]
    """By its examination: how right it is, what memory it takes."""
    readings: list[T]


def measure_side_by_side(
    makers: dict[str, Callable[[], R]],
    examine: Callable[[str, R], dict[str, Any]],
    clock: Callable[[Run], T],
    repeats: int,
    limit: float,
    least: int = LEAST_REPEATS,
) -> dict[str, Measured[T] | Exception]:
    """Of each competitor what was measured, or why nothing was.

    Each is made and examined alone, by a call that also warms it up; then those that pass take turns, as
    :func:`take_turns` says. Whatever a competitor raises is its outcome, also where its memory doesn't suffice beside
    what the others keep.
    """
    outcomes: dict[str, Measured[T] | Exception] = {}
    runs: dict[str, Run] = {}

    def try_alone(name: str) -> None:
        try:
            run = makers[name]()
            outcomes[name] = Measured(examine(name, run), [])
            runs[name] = run
        except Exception as error:
            outcomes[name] = _without_locals(error)

    def read(run: Run) -> T | Exception:
        try:
            return clock(run)
        except Exception as error:
            return _without_locals(error)

    for name in makers:
        release_memory()
        try_alone(name)
    for name, readings in take_turns(runs, read, repeats, limit, least).items():
        errors = [reading for reading in readings if isinstance(reading, Exception)]
        outcome = outcomes[name]
        if errors:
            outcomes[name] = errors[0]
        elif isinstance(outcome, Measured):
            outcome.readings += [reading for reading in readings if not isinstance(reading, Exception)]
    return outcomes


def _without_locals(error: Exception) -> Exception:
    """The error, with its lines, but without the tensors that the functions it went through still held."""
    traceback.clear_frames(error.__traceback__)
    return error


def release_memory() -> None:
    """What nobody holds any more goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- the host


def wall_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def finishing(run: Run, device: str) -> Run:
    """The run, until the device has done it."""

    def finished() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return finished if device == "cuda" else run


class ReplayClock:
    """A timer for pytest-benchmark on which runs last as long as they did when they were measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replayed(self, seconds: list[float]) -> Run:
        """A run that has each of these durations, one after the other."""
        left = iter(seconds)

        def once() -> None:
            self.now += next(left)

        return once


def rounds(seconds: float, most: int) -> int:
    """How often a run of so many seconds is measured."""
    return max(LEAST_ROUNDS, min(most, int(ROUNDS_LIMIT / max(seconds, 1e-9))))


def second_call(run: Run) -> float:
    """Seconds of a run after an untimed one, which takes over the memory that another competitor has freed."""
    run()
    return wall_clock(run)


def medians(runs: dict[str, Run], repeats: int = 3, warm_ups: int = 0) -> dict[str, float]:
    """Median seconds of runs that take turns, after some that warm each of them up."""
    for run in runs.values():
        for _ in range(warm_ups):
            run()
    return {name: statistics.median(seconds) for name, seconds in take_turns(runs, second_call, repeats).items()}


def resident_growth(run: Run) -> float:
    """MiB by which the process's resident memory grows at most during a warm ``run``; nan where nothing tells.

    What was freed before goes back to the system first (glibc keeps it): else the run would find it there.
    """
    if sys.platform != "linux":
        return math.nan

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as command:
        command.write("5")  # the recorded peak starts again from here
    before = status("VmRSS:")
    run()
    return (status("VmHWM:") - before) / 1024


def growth_and_seconds(run: Run) -> tuple[float, float]:
    """:func:`resident_growth` of a run, and how long that one run took."""
    seconds: list[float] = []
    growth = resident_growth(lambda: seconds.append(wall_clock(run)))
    return growth, sum(seconds) or wall_clock(run)


# ------------------------------------------------------------------------------------------------------------- a GPU

# A kernel that sleeps holds the GPU while the host launches what is timed. At 2 GHz or less it sleeps long enough.
_SLEEP_CYCLES_PER_SECOND = 2e9
_LONGEST_SLEEP = 0.02


class Sample(NamedTuple):
    device: float  # seconds on the GPU, launches hidden
    host: float  # seconds until the call has returned: where it is the longer one, launches decide


class DeviceMeter:
    """Time and memory of runs on the current GPU.

    Time is that between two events around the run: with a cold L2 cache, since a training step has other things in it;
    with memory in the allocator's hands, since a turn begins with an untimed call; and without the launches, which the
    host makes while a sleeping kernel holds the GPU.
    """

    def __init__(self, device: str = "cuda") -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @property
    def flushed_mib(self) -> float:
        return self._flush.numel() / 2**20

    def time(self, run: Run) -> Sample:
        torch.cuda.synchronize()
        host = wall_clock(run)
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda._sleep(int(min(2 * host + 1e-4, _LONGEST_SLEEP) * _SLEEP_CYCLES_PER_SECOND))
        self._start.record()
        run()
        self._end.record()
        torch.cuda.synchronize()
        return Sample(self._start.elapsed_time(self._end) / 1e3, host)

    def extra_mib(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> float:
        """Peak of allocated memory during a warm run, less what was there before and what the run returns."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - storage_bytes(outputs)) / 2**20


def storage_bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the memory that some tensors lie in, shared memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def graphed(run: Callable[[], T]) -> Callable[[], T]:
    """``run`` as a CUDA graph: the returned function replays its kernels and returns the same tensors every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up, which can't be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay
