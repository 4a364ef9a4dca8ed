"""What the benchmarks measure besides time: resident memory of a call in a fresh process, repeats side by side."""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Run = Callable[[], object]


def resident_growth(run: Run) -> float:
    """MiB by which the process's resident memory grows at most during ``run``; nan where the system doesn't tell."""
    if sys.platform != "linux":
        return math.nan

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as command:
        command.write("5")  # the recorded peak starts again from here
    before = status("VmRSS:")
    run()
    return (status("VmHWM:") - before) / 1024


def peak_memory(script: str, *case: str) -> float:
    """What ``python script CASE`` prints: :func:`resident_growth` of one case, where no other case has run before."""
    done = subprocess.run([sys.executable, script, *case], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(case)} failed:\n{done.stderr}")
    return float(done.stdout)


def medians(runs: dict[str, Run], repeats: int = 3) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a busy moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
