"""Clocks, memory, turns and machine metadata of the benchmarks, and their file of records."""

import contextlib
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from regvq_fast import nvml
from regvq_fast.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "triton", "vector-quantize-pytorch", "taming-transformers-rom1504"),
    *("diffusers", "flash-kmeans", "inf-cl"),
)
Run = Callable[[], Any]


class WrongResultError(Exception):
    """A result that its check refuses: it gets no time."""


class SkippedError(Exception):
    """A competitor that can't run here; the message says why."""


class OutOfTimeError(Exception):
    """A competitor that the time limit left out."""


class Measured(NamedTuple):
    found: dict[str, Any]  # by its check, and its memory
    seconds: list[float]


def status_of(error: Exception) -> str:
    """Return the status that a record has for an outcome without a time."""
    known = {torch.OutOfMemoryError: "out of memory", SkippedError: "skipped", WrongResultError: "wrong"}
    return (known | {OutOfTimeError: "out of time"}).get(type(error), "failed")


# -------------------------------------------------------------------------------------------------- time and memory


def seconds_of(run: Run, device: str, whole: bool = False) -> float:
    """Time one turn, after untimed calls: an op on a GPU by Triton's timer, with a cold L2 cache, others by PyTorch's.

    Args:
        whole: a whole step or sampling, which PyTorch's timer times on a GPU as well, until the GPU has done it.
    """
    if device == "cuda" and not whole:
        import triton

        return float(triton.testing.do_bench(run, warmup=1, rep=10, return_mode="median")) / 1e3
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0).median


def peak_mib(run: Run, device: str) -> float:
    """Peak MiB of a warm call above what was there: allocated on a GPU, less the call's outputs; resident on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        tensors = [value for value in outputs if isinstance(value, torch.Tensor)] if isinstance(outputs, tuple) else []
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return (torch.cuda.max_memory_allocated() - before - sum(kept.values())) / 2**20
    if sys.platform != "linux":
        return math.nan

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: the run would find it there
    Path("/proc/self/clear_refs").write_text("5")  # the recorded peak starts again from here
    before = status("VmRSS:")
    run()
    return (status("VmHWM:") - before) / 1024


def release_memory() -> None:
    """Release cached memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphed(run: Run) -> Run:
    """Return a call that replays ``run`` as a CUDA graph and returns the same tensors every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and libraries set themselves up, which can't be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def take_turns(runs: dict[str, Run], clock: Callable[[Run], Any], turns: int, least: int, limit: float) -> Any:
    """Read the clock on each run, A B A B, so that a busy moment meets all; ``least`` turns if ``limit`` s are over."""
    readings: dict[str, list[Any]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(turns):
        if turn >= least and time.perf_counter() - begin > limit:
            break
        for name, run in runs.items():
            readings[name].append(clock(run))
    return readings


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns, or its error, without the tensors that its frames still held."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return error


def measure_side_by_side(
    makers: dict[str, Callable[[], Run]],
    examine: Callable[[str, Any], dict[str, Any]],
    device: str,
    whole: bool = False,
    until: float = math.inf,
    turns: int | None = None,
) -> dict[str, Measured | Exception]:
    """Measure competitors, or keep why one was not: each is made, checked and weighed alone; then they take turns.

    Args:
        examine: checks the results of a call of ours, and returns what the record has of it.
        until: moment of `time.perf_counter` from which no competitor begins.
        turns: number of turns; 0 makes and checks, which compiles.
    """
    outcomes: dict[str, Measured | Exception] = {}
    runs: dict[str, Run] = {}

    def prepare(name: str) -> tuple[Run, dict[str, Any]]:
        if time.perf_counter() > until:
            raise OutOfTimeError("out of time")
        run = makers[name]()
        found = examine(name, run())
        return run, found | {"mib": round(peak_mib(run, device), 3)}

    for name in makers:
        release_memory()
        prepared = _attempt(prepare, name)
        if isinstance(prepared, Exception):
            outcomes[name] = prepared
        else:
            runs[name], outcomes[name] = prepared[0], Measured(prepared[1], [])
    most, least, limit = (8, 2, 3.0) if device == "cuda" else (10 if whole else 30, 3, 0.8 * len(runs))
    most = most if turns is None else turns
    clock = functools.partial(_attempt, functools.partial(seconds_of, device=device, whole=whole))
    for name, readings in take_turns(runs, clock, most, min(least, most), limit).items():
        errors = [reading for reading in readings if isinstance(reading, Exception)]
        outcomes[name] = errors[0] if errors else Measured(outcomes[name].found, readings)  # type: ignore[union-attr]
    return outcomes


# -------------------------------------------------------------------------------------------------- machine, records


@functools.cache
def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, asked once."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        capability = f"{properties.major}.{properties.minor}"
        found |= {"gpu": properties.name, "compute_capability": capability, "driver": nvml.gpu_state()[0]}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1)}
    else:
        name = platform.processor() or platform.machine()
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        found |= {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    changes = _git("status", "--porcelain")
    return found | {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
    }


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout; None without git or checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def load(path: Path, device: str) -> dict[str, Any]:
    """Return the file of records, or a new one if it is of another commit."""
    where = describe_machine(device)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("machine", {}).get("commit", "") == where["commit"]:
        return found
    return {"machine": where, "date": str(datetime.date.today()), "records": []}


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a file that appears complete or not at all, a record a line."""
    head = json.dumps({name: value for name, value in found.items() if name != "records"}, indent=1)
    records = ",\n  ".join(map(json.dumps, found["records"]))
    with atomic_path(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "records": [\n  {records}\n ]\n}}\n', encoding="utf-8")
