"""Measure the ops on a GPU, against PyTorch and other packages: one command, within 8 minutes.

    python bench/gpu.py                      the tests of the ops, then every case; bench/results/gpu-NAME.json
    python bench/gpu.py --out other.json
    python bench/gpu.py --quick              no tests, the cases of the targets in one type: a few minutes

In this order, each within its part of the time: tests/ops, whose kernels run natively on CUDA, while other processes
compile the training steps; the cases that targets are about; the whole training step; the steps and the sampling of the
priors; all other cases. A result is compared with the eager twin's in fp64, and a wrong one gets no time; then all
competitors take turns. The JSON is written after every case, the tables come last. Competitors that are missing, don't
compile or run out of memory are named as such and stop nobody. To have all: ``pip install -e ".[bench,test]"``, ``pip
install --no-deps taming-transformers-rom1504`` and ``pip install flash-kmeans inf-cl``. ``python bench/report.py`` then
puts the numbers into README.md and docs.

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
from dataclasses import replace
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

LIMIT = 460.0  # seconds in all, up to the tables: no case begins that would not be ready by then
TEST_LIMIT = 150.0  # of these at most for the tests and for compiling the steps
# Of these for the training step and the priors, in their order; what they leave goes to the cases after them.
STEP_LIMITS = dict(zip(gpu_parts.STEPS, (85.0, 70.0, 55.0), strict=True))
CASE_LIMIT = 3.0  # of these for the turns of a case
REPEATS = 30
# Who knows the cases of an op: make_inputs, competitors, truth_of and examine.
OPS: dict[type, ModuleType] = {Case: gpu_cases, InfoNceCase: gpu_info_nce}
NO_CUDA = "bench/gpu.py measures on a CUDA GPU, and PyTorch finds none on this machine."


class Meter(Protocol):
    """What :class:`measuring.DeviceMeter` does."""

    def time(self, run: measuring.Run) -> Sample: ...
    def extra_mib(self, run: TensorRun) -> float: ...


# ------------------------------------------------------------------------------------------------------------- cases


def target_cases(half: str) -> list[Case | InfoNceCase]:
    """What the targets are about, which is measured first: time may run out. ``half``: the GPU's main 16-bit type."""
    first = [Case(part, 8192, half) for part in gpu_cases.PARTS]
    first += [Case("forward+backward", 1024, half, graph=True), Case("forward+backward", 262144, half, masked=False)]
    step, lengths = "forward+backward", (4096, 16384, 65536)
    long = [(65536, 64), *((length, width) for length in lengths for width in (512, 128))]
    return [*first, *(InfoNceCase(step, *size, half) for size in long)]


def other_cases(half: str) -> list[Case | InfoNceCase]:
    """What is measured in the time that is left: other sizes and types, forward passes."""
    targets = target_cases(half)
    other = "float16" if half == "bfloat16" else None
    sizes = [Case(part, codes, half) for codes in (16384, 1024, 65536) for part in gpu_cases.PARTS]
    types = [Case(part, 8192, dtype) for dtype in (other, "float32") if dtype for part in gpu_cases.PARTS]
    small = [Case(part, codes, half) for codes in (4096, 512) for part in gpu_cases.PARTS]
    graphs = [case for case in targets if isinstance(case, Case) and case.graph]
    rest = [replace(case, dtype=other) for case in graphs + sizes + small if other]
    forward = [replace(case, part="forward") for case in targets if isinstance(case, InfoNceCase)]
    short = [(length, width) for length in (1024, 256) for width in (512, 128)]
    contrastive_rest = forward + [InfoNceCase(part, *size, half) for size in short for part in gpu_info_nce.PARTS]
    widths = [Case(part, 8192, half, width=width) for width in (64, 512) for part in gpu_cases.PARTS]
    return [*sizes, *contrastive_rest, *widths, *types, *small, *rest]


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
    durations = [0.0]
    for case in cases:
        measuring.release_memory()
        now = time.perf_counter()
        if now + max(durations[-3:]) > until:
            report["not_measured"][case.name] = OUT_OF_TIME
            continue
        try:
            op = OPS[type(case)]
            inputs = op.make_inputs(case, "cuda")
            entry = measure_case(case, inputs, op.competitors(case, inputs), meter)
        except Exception as error:  # not a competitor's fault: the GPU is too small, or beyond use
            report["not_measured"][case.name] = _describe(error)
            continue
        report["cases"].append(entry | {"state": read_state()})
        del inputs
        durations.append(time.perf_counter() - now)
        measured(report)
        print(f"{report['seconds']:.0f} s: {case.name}", flush=True)


def evaluate_targets(report: dict[str, Any], half: str) -> list[dict[str, Any]]:
    """All of them; those of what was not measured are open."""
    names = {entry["case"] for entry in report["cases"]}
    open_cases = [entry(case, {}) for case in target_cases(half) if case.name not in names]
    cases = report["cases"] + open_cases
    return gpu_report.evaluate_targets(cases, report["method"]["default_schedule"]) + gpu_report.step_targets(
        report["benchmarks"]
    )


def new_report(quick: bool) -> tuple[dict[str, Any], Callable[[], nvml.State]]:
    """A report without measurements, and what reads the GPU's clocks."""
    from regvq_fast.dispatch import is_chunked

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
            "default_schedule": "chunked" if is_chunked(torch.device("cuda")) else "fused",
        },
        "state_before": read_state(),
        "tests": None,
        "compilation": None,
        "matmul_8192_tflops": {},
        "cases": [],
        "benchmarks": [],
        "parts": {},
        "targets": [],
        "not_measured": {},
    }
    return report, read_state


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save(path, report)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write; default bench/results/gpu-NAME.json")
    parser.add_argument("--quick", action="store_true", help="no tests, few cases")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    begin = time.perf_counter()
    for name in ("TRITON_INTERPRET", "REGVQ_SCHEDULE"):  # before the kernels are imported, and for the tests as well
        os.environ.pop(name, None)
    report, read_state = new_report(options.quick)
    gpu = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower())
    path = options.out or machine.ROOT / "bench" / "results" / f"gpu-{gpu}.json"
    if not options.quick:
        report["tests"], report["compilation"] = gpu_parts.run_tests(TEST_LIMIT)
        print(f"tests/ops: {report['tests']}\ncompiling the steps: {report['compilation']}", flush=True)

    meter = measuring.DeviceMeter()
    report["method"]["flushed_mib"] = meter.flushed_mib
    # bf16 is emulated below sm_80.
    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    for dtype in (half, "float32"):
        report["matmul_8192_tflops"][dtype] = square_product_tflops(meter, dtype)
    report["copy_tb_per_s"] = copy_tb_per_s(meter)

    def measured(report: dict[str, Any]) -> None:
        report["seconds"] = round(time.perf_counter() - begin, 1)
        report["targets"] = evaluate_targets(report, half)
        save(report, path)  # after everything: what is measured stays, whatever comes

    if options.quick:
        measure_cases(target_cases(half), report, meter, begin + LIMIT, read_state, measured)
    else:
        until = begin + LIMIT - sum(STEP_LIMITS.values())
        measure_cases(target_cases(half), report, meter, until, read_state, measured)
        for script, limit in STEP_LIMITS.items():
            measuring.release_memory()
            entries, report["parts"][script] = gpu_parts.run_benchmarks(
                script, min(limit, begin + LIMIT - time.perf_counter())
            )
            report["benchmarks"] += entries
            measured(report)
            print(f"{report['seconds']:.0f} s: {script} {report['parts'][script]}", flush=True)
        measure_cases(other_cases(half), report, meter, begin + LIMIT, read_state, measured)
    measured(report)
    with contextlib.suppress(ValueError):  # another drive has no relative path
        path = path.resolve().relative_to(Path.cwd())
    print(f"\n{path}\n\n{gpu_report.summary(report)}")
    return 1 if gpu_report.problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
