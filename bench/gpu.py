"""Measure the ops on a GPU, against PyTorch and other packages, within a limit of seconds.

    python bench/gpu.py                      everything; bench/results/gpu-NAME.json
    python bench/gpu.py --limit 1500         in at most 25 minutes instead of 580 seconds
    python bench/gpu.py --quick              the first cases alone: vector_quantize by N and D

In this order, each within its fraction of the time: vector_quantize at N = 8192 and 1024 over D, in 16 bits and fp32;
tests/ops, whose kernels run natively on CUDA, while other processes compile the training steps; the whole training
step; the steps and the sampling of the priors; all other cases; a search for faster tiles. A result is compared with
the eager twin's in fp64, and a wrong one gets no time; then all competitors take turns. The JSON is written after every
case, the tables come last. Competitors that are missing, don't compile or run out of memory are named as such and stop
nobody. To have all: ``pip install -e ".[bench,test]"``, ``pip install --no-deps taming-transformers-rom1504`` and ``pip
install flash-kmeans inf-cl``. ``python bench/report.py`` then puts the numbers into README.md and docs.

Exits with 0; 1 if a test failed or a result of ours was wrong or failed; 2 without CUDA.
"""

import argparse
import contextlib
import datetime
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import gpu_cases
import gpu_info_nce
import gpu_parts
import gpu_report
import machine
import measuring
import peers
import records
import torch
from gpu_cases import Case
from gpu_info_nce import InfoNceCase
from gpu_report import OUT_OF_TIME
from measuring import Sample
from peers import TensorRun

from regvq_fast import nvml

LIMIT = 580.0  # seconds in all, up to the tables: no case begins that would not be ready by then
# Of these at most; what they leave goes to the cases that come last.
FIRST, TESTS = 0.4, 0.25
STEPS = dict(zip(gpu_parts.STEPS, (0.15, 0.08, 0.08, 0.04), strict=True))
CASE_LIMIT = 3.0  # seconds of the turns of a case
REPEATS = 30
# Who knows the cases of an op: make_inputs, competitors, truth_of and examine.
OPS: dict[type, ModuleType] = {Case: gpu_cases, InfoNceCase: gpu_info_nce}
NO_CUDA = "bench/gpu.py measures on a CUDA GPU, and PyTorch finds none on this machine."


class Meter(Protocol):
    """What :class:`measuring.DeviceMeter` does."""

    def time(self, run: measuring.Run) -> Sample: ...
    def extra_mib(self, run: TensorRun) -> float: ...


# ------------------------------------------------------------------------------------------------------------- cases


def first_cases(half: str) -> list[Case | InfoNceCase]:
    """Most important cases, since time may run out. ``half``: the GPU's main 16-bit type."""
    step, forward, _ = gpu_cases.PARTS
    sizes = [
        (width, codes, dtype) for width in (256, 64, 32, 8) for codes in (8192, 1024) for dtype in (half, "float32")
    ]
    cases = [Case(part, codes, dtype, width=width) for width, codes, dtype in sizes for part in (step, forward)]
    trained = [Case(step, codes, half, latents="trained-like") for codes in (8192, 1024)]
    return [Case(step, 1024, half, graph=True), *cases, *trained, Case(step, 8192, half, codebook_grad="hard")]


def other_cases(half: str) -> list[Case | InfoNceCase]:
    """Cases for the time that is left: assignments, InfoNCE, other sizes and types."""
    step, forward, assign = gpu_cases.PARTS
    types = (half, "float32")
    narrow = [Case(part, n, dtype, width=16) for n in (8192, 1024) for dtype in types for part in (step, forward)]
    assignments = [Case(assign, n, dtype, width=d) for n in (8192, 1024) for d in (256, 64) for dtype in types]
    lengths = [(65536, 64), *((length, width) for length in (4096, 16384, 65536) for width in (512, 128))]
    lengths += [(length, width) for length in (1024, 256) for width in (512, 128)]
    contrastive = [InfoNceCase(part, *size, half) for part in gpu_info_nce.PARTS for size in lengths]
    large = [Case(part, 65536, dtype) for dtype in types for part in gpu_cases.PARTS]
    large.append(Case(step, 262144, half, masked=False))
    rest = [Case(part, n, half) for n in (16384, 4096, 512) for part in gpu_cases.PARTS]
    rest += [Case(part, 8192, half, width=512) for part in gpu_cases.PARTS]
    rest += [Case(part, 8192, "float16") for part in gpu_cases.PARTS if half != "float16"]
    return [*narrow, *assignments, *contrastive, *large, *rest]


def competitors(case: Case | InfoNceCase, inputs: Any) -> dict[str, Callable[[], TensorRun]]:
    """Competitors of a case. Packages take part in vector quantization at D = 256 only, to save time."""
    makers: dict[str, Callable[[], TensorRun]] = OPS[type(case)].competitors(case, inputs)
    if case.op == "vector_quantize" and case.width != Case.width:
        return {name: makers[name] for name in ("matmul", "ours", "eager", "compiled")}
    return makers


def measure_case(
    case: Case | InfoNceCase,
    inputs: Any,
    makers: dict[str, Callable[[], TensorRun]],
    meter: Meter,
    repeats: int = REPEATS,
    limit: float = CASE_LIMIT,
) -> dict[str, Any]:
    """One entry of the report."""
    op = OPS[type(case)]
    truth = op.truth_of(case, inputs)

    def examine(name: str, run: TensorRun) -> dict[str, Any]:
        found: dict[str, Any] = op.examine(case, inputs, truth, name, run)
        # A graph owns its memory.
        return found if case.graph else found | {"extra_mib": meter.extra_mib(run)}

    outcomes = measuring.measure_side_by_side(makers, examine, meter.time, repeats, limit)
    return entry(case, {name: result(case, outcome) for name, outcome in outcomes.items()})


def result(case: Case | InfoNceCase, outcome: measuring.Measured[Sample] | Exception) -> dict[str, Any]:
    """What the JSON has of a competitor in a case."""
    if isinstance(outcome, measuring.Measured):
        device = sorted(1e3 * sample.device for sample in outcome.readings)
        return (
            {"status": "ok"}
            | outcome.found
            | {
                "ms": statistics.median(device),
                "ms_quartiles": [device[len(device) // 4], device[-1 - len(device) // 4]],
                "host_ms": statistics.median(1e3 * sample.host for sample in outcome.readings),
                "repeats": len(device),
                "tflops": case.flops / statistics.median(device) / 1e9,
            }
        )
    if isinstance(outcome, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    if isinstance(outcome, peers.SkippedError):
        return {"status": "skipped", "reason": str(outcome)}
    if isinstance(outcome, gpu_cases.WrongResultError):
        return {"status": "wrong", "reason": str(outcome)}
    return {"status": "failed", "reason": _describe(outcome)}  # whatever a competitor dies of is its result


def entry(case: Case | InfoNceCase, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the JSON has of a case."""
    return {
        "case": case.name,
        "op": case.op,
        "part": case.part,
        "dtype": case.dtype,
        **case.describe(),
        "products": case.products,
        "flops": case.flops,
        "bytes": case.bytes,
        "results": results,
    }


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


# -------------------------------------------------------------------------------------------------------------- main


def square_product_tflops(meter: Meter, dtype: str) -> float:
    """TFLOP/s of a product whose speed memory doesn't limit, 8192 cubed."""
    a = torch.randn(8192, 8192, dtype=getattr(torch, dtype), device="cuda")
    samples = measuring.take_turns({"": partial(torch.mm, a, a)}, meter.time, REPEATS, CASE_LIMIT)[""]
    return 2 * 8192**3 / statistics.median(sample.device for sample in samples) / 1e12


def copy_tb_per_s(meter: Meter) -> float:
    """TB/s of a copy of 1 GiB, read and written."""
    a, b = (torch.empty(2**28, device="cuda") for _ in range(2))
    samples = measuring.take_turns({"": partial(b.copy_, a)}, meter.time, REPEATS, CASE_LIMIT)[""]
    return 2 * a.nbytes / statistics.median(sample.device for sample in samples) / 1e12


def measure_cases(
    cases: list[Case | InfoNceCase],
    report: dict[str, Any],
    meter: Meter,
    until: float,
    read_state: Callable[[], nvml.State],
    measured: Callable[[dict[str, Any]], None],
) -> None:
    """Measure each case, as long as it would be ready in time, into the report."""
    durations, inputs = [0.0], None
    for case in cases:
        measuring.release_memory()
        now = time.perf_counter()
        if now + max(durations[-3:]) > until:
            report["not_measured"][case.name] = OUT_OF_TIME
            continue
        try:
            inputs = OPS[type(case)].make_inputs(case, "cuda")
            entry = measure_case(case, inputs, competitors(case, inputs), meter)
            report["cases"].append(entry | {"state": read_state()})
        except Exception as error:  # not a competitor's fault: the GPU is too small, or beyond use
            report["not_measured"][case.name] = _describe(error)
        inputs = None
        durations.append(time.perf_counter() - now)
        measured(report)
        print(f"{report['seconds']:.0f} s: {case.name}", flush=True)


def new_report(quick: bool) -> tuple[dict[str, Any], Callable[[], nvml.State]]:
    """A report without measurements, and what reads the GPU's clocks."""
    driver, read_state, problem = nvml.gpu_state()
    if problem:
        print(problem)
    report: dict[str, Any] = {
        "command": "python bench/gpu.py" + (" --quick" if quick else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_gpu() | {"driver": driver} | machine.describe_software(),
        "packages": peers.versions(),
        "method": {
            "rows": Case.rows,
            "width": Case.width,
            "mask_ratio": gpu_cases.MASK_RATIO,
            "info_nce_rows": gpu_info_nce.ROWS,
            "info_nce_tau": gpu_info_nce.TAU,
            "repeats": REPEATS,
        },
        "state_before": read_state(),
        "tests": None,
        "compilation": None,
        "matmul_8192_tflops": {},
        "cases": [],
        "benchmarks": [],
        "parts": {},
        "targets": [],
        "tiles": [],
        "not_measured": {},
    }
    return report, read_state


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save(path, report)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write; default bench/results/gpu-NAME.json")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all, default %(default)g")
    parser.add_argument("--quick", action="store_true", help="only the first cases, neither tests nor steps")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    begin = time.perf_counter()
    end = begin + options.limit
    for name in ("TRITON_INTERPRET", "REGVQ_SCHEDULE"):  # before the kernels are imported, and for the tests as well
        os.environ.pop(name, None)
    report, read_state = new_report(options.quick)
    gpu = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower())
    path = options.out or machine.ROOT / "bench" / "results" / f"gpu-{gpu}.json"
    meter = measuring.DeviceMeter()
    report["method"]["flushed_mib"] = meter.flushed_mib
    # bf16 is emulated below sm_80.
    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    for dtype in (half, "float32"):
        report["matmul_8192_tflops"][dtype] = square_product_tflops(meter, dtype)
    report["copy_tb_per_s"] = copy_tb_per_s(meter)

    def measured(report: dict[str, Any]) -> None:
        report["seconds"] = round(time.perf_counter() - begin, 1)
        report["targets"] = gpu_report.evaluate_targets(report["cases"], report["machine"]["gpu"])
        report["targets"] += gpu_report.step_targets(report["benchmarks"])
        save(report, path)  # after everything: what is measured stays, whatever comes

    def run_cases(cases: list[Case | InfoNceCase], until: float) -> None:
        measure_cases(cases, report, meter, until, read_state, measured)

    run_cases(first_cases(half), end if options.quick else begin + FIRST * options.limit)
    if not options.quick:
        measuring.release_memory()
        report["tests"], report["compilation"] = gpu_parts.run_tests(TESTS * options.limit)
        print(f"tests/ops: {report['tests']}\ncompiling the steps: {report['compilation']}", flush=True)
        for script, fraction in STEPS.items():
            limit = min(fraction * options.limit, end - time.perf_counter())
            entries, report["parts"][script] = gpu_parts.run_benchmarks(script, limit)
            report["benchmarks"] += entries
            measured(report)
            print(f"{report['seconds']:.0f} s: {script} {report['parts'][script]}", flush=True)
        run_cases(other_cases(half), end)
        measuring.release_memory()
        report["tiles"], report["parts"][gpu_parts.TILES] = gpu_parts.search_tiles(end - time.perf_counter())
    measured(report)
    with contextlib.suppress(ValueError):  # another drive has no relative path
        path = path.resolve().relative_to(Path.cwd())
    print(f"\n{path}\n\n{gpu_report.summary(report)}")
    return 1 if gpu_report.problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
