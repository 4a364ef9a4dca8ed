"""The parts of ``bench/gpu.py`` that run in processes of their own, each within its time: tests, steps, priors.

What is compiled for whole steps takes minutes. It is compiled while the tests run, which nobody times: the process that
measures afterwards finds it in `torch.compile`'s cache on disk.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine

TILES = "bench/tile_search.py"
STEPS = ("bench/bench_step.py", "bench/bench_autoregressive.py", "bench/bench_diffusion.py", "bench/bench_maskgit.py")
# What needs no GPU is left to continuous integration.
TESTS = ["tests/ops", "--ignore=tests/ops/test_kernel_resources.py"]
COMPILED = "paper and compile and not target"
STUCK = 40  # seconds of one test or benchmark after which it says where it is


def run_pytest(arguments: list[str], limit: float, **variables: str) -> tuple[str, int | None, float]:
    return run_python(["-m", "pytest", *arguments], limit, **variables)


def run_python(arguments: list[str], limit: float, **variables: str) -> tuple[str, int | None, float]:
    """Output of a process, its exit code, None where it was stopped after ``limit`` seconds, and its seconds."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
    environment.pop("PYTEST_XDIST_WORKER", None)  # in a worker of somebody's tests pytest-benchmark measures nothing
    begin = time.perf_counter()
    # A group of their own: what tests have started must not go on beside what is timed next.
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=machine.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit, 0.0))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], None
    return output.decode(errors="replace"), code, round(time.perf_counter() - begin, 1)


def run_tests(limit: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tests of the ops and, at the same time, the compilation of the steps; how each went, within ``limit``."""
    half = (os.cpu_count() or 2) // 2
    spread = ["-n", str(half)] if half > 1 and importlib.util.find_spec("xdist") else []
    compiled = [*STEPS, "-k", COMPILED, "--benchmark-disable", "--tb=line", "-rfEs"]
    with ThreadPoolExecutor() as pool:
        # Each process compiles with some more of its own: with few, since there are enough of them.
        compilation = pool.submit(run_pytest, compiled + spread, limit, TORCHINDUCTOR_COMPILE_THREADS="4")
        output, code, seconds = run_pytest([*TESTS, "--tb=line", "-rfE", *spread], limit, OMP_NUM_THREADS="1")
        return read_tests(output, code) | {"seconds": seconds}, read_part(*compilation.result())


def read_tests(output: str, code: int | None) -> dict[str, Any]:
    """Counts from pytest's own summary, or from its progress where it was stopped (``code`` None)."""
    lines = output.splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", lines[-1] if lines else "")}
    counts = {word: counts[word] for word in ("passed", "failed", "error", "errors", "skipped") if word in counts}
    status = "passed" if code == 0 else "failed"
    if code is None:
        letters = Counter("".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE)))
        counts = {"passed": letters["."], "failed": letters["F"] + letters["E"], "skipped": letters["s"]}
        status = "failed" if counts["failed"] else "stopped at the time limit"
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    if code and not failures:
        failures = lines[-5:]  # it didn't get as far as a test
    return {"status": status, "counts": counts, "failures": failures}


def run_benchmarks(script: str, limit: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The paper's sizes of a benchmark of whole steps, as many as ``limit`` seconds allow, and how it went."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        arguments = [script, "-k", "paper and not target", "--benchmark-only", "--tb=line", "-rfEs"]
        arguments += ["-o", f"faulthandler_timeout={STUCK}", "--lines", str(lines)]
        output, code, seconds = run_pytest(arguments, limit)
        text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    # A process that is stopped may leave half a line.
    entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return entries, read_part(output, code, seconds) | {"measured": len(entries)}


def search_tiles(limit: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the tile search for at most ``limit`` seconds; return the tiles of each kernel, and how it went."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.json"
        done = run_python([TILES, "--out", str(path)], limit)
        found = json.loads(path.read_text(encoding="utf-8"))["searches"] if path.exists() else []
    return found, read_part(*done) | {"measured": len(found)}


def read_part(output: str, code: int | None, seconds: float) -> dict[str, Any]:
    """How benchmarks went, from what pytest said."""
    status = {0: "done", 5: "done", None: "stopped at the time limit"}.get(code, "failed")
    told = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))][:20]
    if status == "failed" and not told:
        told = output.splitlines()[-5:]  # it didn't get as far as a benchmark
    if code is None:
        told += read_stack(output)
    return {"status": status, "seconds": seconds, "told": told}


def read_stack(output: str) -> list[str]:
    """Where faulthandler last found the main thread, innermost call first, without the machine's own folders."""
    frames: list[str] = []
    for line in output.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            frames = []
        elif found := re.match(r'  File "(?:.*/)?([^/]+/[^/]+)", line (\d+) in (.*)', line):
            frames.append("{}:{} {}".format(*found.groups()))
    return frames[:12]
