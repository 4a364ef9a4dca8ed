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
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from regvq_fast import nvml
from regvq_fast.files import atomic_path
from regvq_fast.priors.sampler import capture
from regvq_fast.training.memory import peak_memory

PACKAGES = "torch triton vector-quantize-pytorch taming-transformers-rom1504 diffusers flash-kmeans inf-cl".split()
Run = Callable[[], Any]
Examine = Callable[[str, Any], dict[str, Any]]
"""Check of what a call of a competitor returned: an AssertionError, or what the record has of it."""
Outcome = tuple[dict[str, Any], list[float]] | Exception
"""Memory and what the check found of a competitor, and seconds of each turn; or why it has no time."""


class WrongResultError(Exception):
    """A result that its check refuses: it gets no time."""


class SkippedError(Exception):
    """A competitor that can't run here; the message says why."""


# Of an outcome without a time; of any other error "failed".
STATUSES = {torch.OutOfMemoryError: "out of memory", SkippedError: "skipped", WrongResultError: "wrong"}


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
    elif sys.platform == "linux":
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: the run would find it there
        Path("/proc/self/clear_refs").write_text("5")  # the recorded peak starts again from here
    else:
        return math.nan
    before = peak_memory(torch.device(device))
    outputs = run()
    kept = 0
    if device == "cuda":
        torch.cuda.synchronize()
        tensors = outputs if isinstance(outputs, tuple) else ()
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        kept = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return (peak_memory(torch.device(device)) - before - kept) / 2**20


def graphed(run: Run) -> Run:
    """Return a call that replays ``run`` as a CUDA graph and returns the same tensors every time."""
    outputs: list[Tensor] = []

    def step() -> None:
        outputs[:] = run()

    replay = capture(step, torch.empty(0, device="cuda"))

    def replayed() -> tuple[Tensor, ...]:
        replay()
        return tuple(outputs)

    return replayed


def measure_side_by_side(
    makers: dict[str, Callable[[], Run]],
    examine: Examine,
    device: str,
    whole: bool = False,
    turns: int | None = None,
) -> dict[str, Outcome]:
    """Measure competitors, or keep why one was not: each is made, checked and weighed alone; then they take turns.

    They go A B A B, so that a busy moment meets all, until there are enough turns, or 2 to 5 and the time is up.

    Args:
        turns: number of turns at most, by default 8 to 30; 0 makes and checks, which compiles.
    """
    outcomes: dict[str, Any] = {}
    runs: dict[str, Run] = {}

    def prepare(name: str) -> None:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        run, problem = makers[name](), None
        results = run()
        try:
            found = examine(name, results)
        except AssertionError as error:
            problem = str(error)
        if problem is not None:  # raised here, without the other error, whose frames hold tensors
            raise WrongResultError(problem)
        del results  # or they would be part of the memory that was there before
        outcomes[name] = found | {"mib": round(peak_mib(run, device), 3)}, []
        runs[name] = run

    def take_turn(name: str) -> None:
        outcomes[name][1].append(seconds_of(runs[name], device, whole))

    def attempt(what: Callable[[str], None], name: str) -> None:
        try:
            what(name)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            outcomes[name] = error
            runs.pop(name, None)

    for name in makers:
        attempt(prepare, name)
    most, least, limit = (8, 2, 3.0) if device == "cuda" else (10 if whole else 30, 3 if whole else 5, 0.2 * len(runs))
    begin = time.perf_counter()
    for turn in range(most if turns is None else turns):
        if turn >= least and time.perf_counter() - begin > limit:
            break
        for name in list(runs):
            attempt(take_turn, name)
    return outcomes


# -------------------------------------------------------------------------------------------------- machine, records


@functools.cache
def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, asked once."""
    from pytest_benchmark.plugin import get_commit_info, get_cpu_info

    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        found |= {"gpu": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"driver": nvml.gpu_state()[0], "memory_gib": round(gpu.total_memory / 2**30, 1)}
    else:
        cpu = get_cpu_info().get("brand_raw", platform.machine())
        found |= {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    commit = get_commit_info()
    known = commit["time"] is not None
    return found | {
        "commit": commit["id"] if known else None,
        "uncommitted_changes": commit["dirty"] if known else None,
    }


def record_of(fields: dict[str, Any], name: str, outcome: Outcome) -> dict[str, Any]:
    """Return what the file has of a competitor in a case."""
    record = fields | {"competitor": name}
    if isinstance(outcome, Exception):
        status, reason = STATUSES.get(type(outcome), "failed"), f"{type(outcome).__name__}: {outcome}"[:500]
        return record | {"status": status, "reason": reason}
    found, ms = outcome[0], sorted(1e3 * value for value in outcome[1])
    quartiles = [ms[len(ms) // 4], ms[-1 - len(ms) // 4]]
    return record | {"status": "ok", **found, "ms": statistics.median(ms), "turns": len(ms), "ms_quartiles": quartiles}


def load(path: Path, device: str) -> dict[str, Any]:
    """Return the file of records, or a new one if it is of another commit."""
    where = describe_machine(device)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("machine", {}).get("commit", "") == where["commit"]:
        return found
    return {"machine": where, "date": str(datetime.date.today()), "not_measured": [], "records": []}


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a file that appears complete or not at all, a record a line."""
    head = json.dumps({name: value for name, value in found.items() if name != "records"}, indent=1)
    records = ",\n  ".join(map(json.dumps, found["records"]))
    with atomic_path(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "records": [\n  {records}\n ]\n}}\n', encoding="utf-8")
