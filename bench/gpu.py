"""Measure ops, training steps and priors on a GPU, against PyTorch and other packages, within a limit of seconds.

    python bench/gpu.py                      everything; bench/results/gpu-NAME.json
    python bench/gpu.py --limit 1500         in at most 25 minutes instead of 580 seconds
    python bench/gpu.py --quick              the ops alone, the most important cases first

In this order, each within its fraction of the time: the ops; tests/ops, whose kernels run natively on CUDA, while
another process compiles the training steps; steps and sampling; the cases of the ops that are left; a search for faster
tiles. Each is ``pytest bench/ --benchmark-only --records FILE``, which writes the file after every case: what is
measured stays, whatever comes, and a second call goes on with what the first one left. To have all competitors: ``pip
install -e ".[bench,test]"``, ``pip install --no-deps taming-transformers-rom1504`` and ``pip install flash-kmeans
inf-cl``. ``python bench/report.py`` then puts the numbers into README.md and docs.

Exits with 0; 1 if a test failed or a result of ours was wrong or failed; 2 without CUDA.
"""

import argparse
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measuring
import report
import torch

LIMIT = 580.0
OPS, STEPS, TILES = "bench/bench_ops.py", "bench/bench_steps.py", "bench/tile_search.py"
FRACTIONS = {OPS: 0.4, "tests/ops": 0.25, STEPS: 0.3}  # at most; what they leave goes to what comes after
NO_CUDA = "bench/gpu.py measures on a CUDA GPU, and PyTorch finds none on this machine."
GRACE = 20.0  # seconds that a process has to end by itself


def run_python(arguments: list[str], limit: float, **variables: str) -> tuple[str, int | None, float]:
    """Run a process; return its output, exit code, None where it was stopped after ``limit`` seconds, and seconds."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
    for name in ("TRITON_INTERPRET", "REGVQ_SCHEDULE", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    begin, pipe = time.perf_counter(), subprocess.PIPE
    # A group of their own: what tests have started must not go on beside what is timed next.
    command, group = [sys.executable, *arguments], {"start_new_session": True, "env": environment}
    process = subprocess.Popen(command, cwd=measuring.ROOT, stdout=pipe, stderr=subprocess.STDOUT, **group)  # type: ignore[call-overload]
    try:
        output, code = process.communicate(timeout=max(limit, 0.0))[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], None
    return output.decode(errors="replace"), code, round(time.perf_counter() - begin, 1)


def read_part(output: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Return how a part went, from pytest's words."""
    lines = output.splitlines()
    status = {0: "done", 5: "done", None: "stopped at the time limit"}.get(code, "failed")
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    if status == "failed" and not told:
        told = lines[-5:]  # it didn't get as far as a test
    passed = re.findall(r"(\d+) passed", lines[-1] if lines else "")
    dots = sum(line.count(".") for line in re.findall(r"^[.FEsxX]+", output, re.MULTILINE))
    return {"status": status, "seconds": seconds, "told": told, "passed": int(passed[0]) if passed else dots}


class Session:
    """The parts of a session, whose records and outcomes are in one file."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit, self.begin = path, limit, time.perf_counter()
        self.parts: dict[str, dict[str, Any]] = {}

    def left(self, part: str = "") -> float:
        """Return the seconds that a part has."""
        rest = self.limit - (time.perf_counter() - self.begin)
        return min(FRACTIONS.get(part, 1.0) * self.limit, rest)

    def document(self) -> dict[str, Any]:
        return measuring.load(self.path, "cuda")

    def bench(self, script: str, name: str = "") -> None:
        """Measure the cases of a script that the file lacks."""
        seconds, before = self.left("" if name else script), len(self.document()["records"])
        arguments = ["-m", "pytest", script, "--benchmark-only", "--tb=line", "-rfE", "--records", str(self.path)]
        done = run_python([*arguments, "--limit", str(seconds)], seconds + GRACE)
        self.note(name or script, read_part(*done), len(self.document()["records"]) - before)

    def tests(self) -> None:
        """Run the tests of the ops and, at the same time, compile the steps: neither is timed."""
        seconds, half = self.left("tests/ops"), (os.cpu_count() or 2) // 2
        spread = ["-n", str(half)] if half > 1 and importlib.util.find_spec("xdist") else []
        compiled = ["-m", "pytest", STEPS, "-k", "compile", "--benchmark-disable", "--tb=line", "-rfE", *spread]
        tests = ["-m", "pytest", "tests/ops", "--ignore=tests/ops/test_kernel_resources.py", "--tb=line", "-rfE"]
        with ThreadPoolExecutor() as pool:
            # Each process compiles with some more of its own: with few, since there are enough of them.
            compilation = pool.submit(run_python, compiled, seconds, TORCHINDUCTOR_COMPILE_THREADS="4")
            done = run_python([*tests, *spread], seconds, OMP_NUM_THREADS="1")
            self.note("tests/ops", read_part(*done), 1)
            self.note("compiling the steps", read_part(*compilation.result()), 1)

    def tiles(self) -> None:
        """Search for faster tiles in the time that is left."""
        path = self.path.with_name(f"tiles-{self.path.name}")  # which no report takes for records of cases
        done = run_python([TILES, "--out", str(path)], self.left())
        self.note(TILES, read_part(*done), int(path.exists()))

    def note(self, name: str, part: dict[str, Any], measured: int) -> None:
        """Write how a part went, and the targets so far."""
        self.parts[name] = part | {"measured": measured}
        found, seconds = self.document(), round(time.perf_counter() - self.begin, 1)
        found["targets"] = list(targets_of(found))
        measuring.save(self.path, found | {"seconds": seconds, "parts": self.parts})
        print(f"{seconds:.0f} s: {name} {part['status']}, {part['passed']} passed", flush=True)

    def problems(self) -> list[str]:
        """Return what makes the session a failure: failed parts, wrong or failed results of ours. Peers may fail."""
        found = [
            f"{name}: {'; '.join(part['told'])}" for name, part in self.parts.items() if part["status"] == "failed"
        ]
        for record in self.document()["records"]:
            if record["competitor"] in ("ours", "vanilla", "nearest") and record["status"] in ("wrong", "failed"):
                found.append(f"{record['op']}, {report.case_of(record)}: {record['competitor']} {record['reason']}")
        return found


def targets_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the targets that the measured cases show to be met or missed; a wrong result of ours misses."""
    for op in (*report.OPS, "vqgan"):
        for group in report.groups_of(document, op):
            record = next(iter(group.values()))
            name = ", ".join([op, record["part"], *(f"{k}={v}" for k, v in record["size"].items()), record["detail"]])
            for what, wanted, at_most, got, ours in _targets(document, op, record, group):
                failed = group.get(ours, {}).get("status", "ok") != "ok"
                if failed or (got is not None and not math.isnan(got)):
                    value = None if failed else got
                    met = value is not None and (value <= wanted if at_most else value >= wanted)
                    yield {
                        "case": name,
                        "what": what,
                        "at_most": at_most,
                        "target": wanted,
                        "measured": value,
                        "met": met,
                    }


PRODUCTS = 7  # of M x N x D that our forward and backward do, "soft" (docs/kernels.md)
# Largest milliseconds on an H200 of forward and backward at D = 256, by N and whether it is a CUDA graph.
H200_MS = {(1024, True): 0.12, (8192, False): 0.68, (65536, False): 5.5}


def _targets(document: Any, op: str, record: Any, group: Any) -> Iterator[tuple[str, float, bool, float | None, str]]:
    size, part = record["size"], record["part"]
    whole, mine, share = part.startswith("forward+backward"), group.get("ours", {}), report.rate(group)
    gigabytes = mine["mib"] * 2**20 / 1e9 if mine.get("mib") else None

    def faster(peer: str, wanted: float) -> tuple[str, float, bool, float, str]:
        ours = report.TWINS.get(peer, "ours")
        return f"times as fast as {peer}", wanted, False, report.against(group, op, peer), ours

    if op == "vqgan":
        ours = group.get("amp-compile", {})
        for peer, what, wanted in (("taming-amp", " in mixed precision", 3.0), ("taming", "", 5.0)):
            speed = report.ratio(ours, group.get(peer))
            yield f"times as fast as taming's{what}", wanted, False, speed, "amp-compile"
        if ours.get("mib") and group.get("taming", {}).get("mib"):
            yield "of taming's memory", 0.6, True, ours["mib"] / group["taming"]["mib"], "amp-compile"
    elif op == "weighted_info_nce":
        if whole and size["L"] >= 4096:
            yield from (faster("eager", 8.0), faster("inf-cl", 4.0))
        if whole and (size["L"], size["C"]) == (65536, 64):
            yield "GB besides inputs and outputs", 1.0, True, gigabytes, "ours"
        if size["C"] >= 256:
            yield f"of the matmul rate, {record['products']} product(s)", 0.4, False, share, "ours"
    else:
        codes, width, graph = size["N"], size["D"], "CUDA graph" in part
        if whole and width <= 64 and not graph:
            yield from (faster("eager", 8.0), faster("compiled", 3.0))
        if record["detail"] == "float32" or width != 256:
            return
        if part in ("assign", "forward") and codes >= 8192:
            yield "of the matmul rate", 0.65 if part == "assign" else 0.45, False, share, "ours"
            yield from [faster("flash-kmeans", 1.0)] if part == "assign" else []
        if whole and codes >= 1024 and not graph:
            yield faster("compiled", 2.2)
            if "hard" not in part:
                reached = None if share is None else share * PRODUCTS / record["products"]
                yield f"of the matmul rate, {PRODUCTS} products", 0.6, False, reached, "ours"
        usual = part in ("forward+backward", "forward+backward, CUDA graph")
        if usual and "H200" in document["machine"].get("gpu", "") and (codes, graph) in H200_MS:
            yield "ms under a CUDA graph" if graph else "ms", H200_MS[codes, graph], True, mine.get("ms"), "ours"
        if whole and codes == 262144:
            yield "GB besides inputs and outputs", 2.0, True, gigabytes, "ours"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write, or to go on with; default bench/results/gpu-NAME.json")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all, default %(default)g")
    parser.add_argument("--quick", action="store_true", help="only the ops, neither tests nor steps")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    gpu = re.sub(r"[^a-z0-9]+", "-", measuring.describe_machine("cuda")["gpu"].lower())
    session = Session((options.out or measuring.ROOT / report.RESULTS / f"gpu-{gpu}.json").resolve(), options.limit)
    if options.quick:
        session.bench(OPS, "the ops")
    else:
        session.bench(OPS)
        session.tests()
        session.bench(STEPS)
        session.bench(OPS, "the rest of the ops")
        session.tiles()
    document = session.document()
    print(f"\n{session.path}\n\n{report.full(document)}\n\n{report.targets(document)}")
    for problem in (found := session.problems()):
        print(f"PROBLEM: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
