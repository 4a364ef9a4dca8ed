"""Shared by the benchmarks: `pytest bench/ --benchmark-only`, or one of them, `pytest bench/bench_assign_codes.py`.

``--benchmark-json FILE`` keeps what was measured, in the form that ``bench/report.py`` reads. ``--lines FILE`` appends
each benchmark to a file as soon as it is done, one JSON a line: what a run that is stopped has measured isn't lost.
"""

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import machine
import measuring
import peers
import pytest
import records
import torch

from regvq_fast import nvml

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="append each benchmark to this file as soon as it is done")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # by what is skipped


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:  # type: ignore[no-untyped-def]
    """What a table needs, and nothing that tells whose machine it was."""
    software = machine.describe_software()
    where = machine.describe_gpu() | {"driver": nvml.gpu_state()[0]} if DEVICE == "cuda" else machine.describe_cpu()
    output_json["machine_info"] = where | software
    output_json["packages"] = peers.versions()
    output_json["commit_info"] = {"id": software["commit"], "dirty": software["uncommitted_changes"]}
    if rates.cache_info().currsize:
        output_json["matmul_tflops"], output_json["copy_tb_per_s"] = {"float32": rates()[0]}, rates()[1]
    for entry in output_json["benchmarks"]:
        keep = ("min", "q1", "median", "q3", "max", "rounds")
        entry["stats"] = {name: entry["stats"][name] for name in keep}
        for name in ("fullname", "options", "param", "params"):
            entry.pop(name, None)


@functools.cache
def rates() -> tuple[float, float]:
    """TFLOP/s of a product in fp32 and TB/s of a copy: the roof of the plots."""
    n = 2048 if DEVICE == "cpu" else 8192
    a, b = (torch.randn(n, n, device=DEVICE) for _ in range(2))
    product, copy = (measuring.finishing(run, DEVICE) for run in (lambda: torch.mm(a, a), lambda: b.copy_(a)))
    seconds = measuring.medians({"product": product, "copy": copy}, repeats=7)
    return 2 * n**3 / seconds["product"] / 1e12, 2 * a.nbytes / seconds["copy"] / 1e12


@functools.cache
def meter() -> measuring.DeviceMeter:
    return measuring.DeviceMeter()


def measure_memory(run: peers.TensorRun) -> float:
    """MiB besides inputs and, on a GPU, outputs."""
    return measuring.resident_growth(run) if DEVICE == "cpu" else meter().extra_mib(run)


def time_once(run: measuring.Run) -> float:
    """Seconds of a turn; both begin with an untimed call."""
    return meter().time(run).device if DEVICE == "cuda" else measuring.second_call(run)


@functools.lru_cache(maxsize=1)
def measured(op: ModuleType, case: Any, names: tuple[str, ...]) -> dict[str, measuring.Measured[float] | Exception]:
    """Of each competitor of a case what was measured, or why nothing was; kept for their own tests to tell."""
    torch.manual_seed(0)
    inputs = op.make_inputs(case, DEVICE)
    truth, makers = op.truth_of(case, inputs), op.competitors(case, inputs)

    def examine(name: str, run: peers.TensorRun) -> dict[str, Any]:
        found = op.examine(case, inputs, truth, name, run)
        return found | {"peak_mib": round(measure_memory(run), 1)}

    return measuring.measure_side_by_side(
        {name: makers[name] for name in names},
        examine,
        time_once,
        repeats=30,
        limit=measuring.ROUNDS_LIMIT * len(names),
        least=measuring.LEAST_ROUNDS,
    )


@pytest.fixture
def replay_clock(request):  # type: ignore[no-untyped-def]
    """Makes pytest-benchmark count seconds that were measured; before ``benchmark``, which reads the marker."""
    clock = measuring.ReplayClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture
def keep(benchmark, request) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Time a run, in a group with its twins, and keep what is known of it beside."""

    def keep_run(group: str, run: measuring.Run, info: dict[str, Any], rounds: int) -> None:
        benchmark.group = group
        benchmark.extra_info |= info | machine.describe_software() | {"threads": torch.get_num_threads()}
        benchmark.pedantic(run, rounds=rounds)
        if not benchmark.enabled:
            return
        median = benchmark.stats.stats.median
        if "flops" in info:
            benchmark.extra_info["tflops"] = info["flops"] / median / 1e12
        if "floor_s" in info:
            benchmark.extra_info["share_of_matmul"] = info["floor_s"] / median
        if DEVICE == "cuda":
            benchmark.extra_info |= machine.describe_gpu() | {"state": nvml.gpu_state()[1]()}
        if path := request.config.getoption("--lines"):
            entry = {"group": group, "name": benchmark.name, "extra_info": benchmark.extra_info}
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry | {"stats": {"median": median, "rounds": rounds}}) + "\n")

    return keep_run


@pytest.fixture
def measure_case(request, replay_clock, keep) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Report one competitor in a case of an op, after its result has been examined: a wrong one of ours fails."""

    def chosen(case: Any) -> tuple[str, ...]:
        """The competitors in the case that this run of pytest is to measure."""
        calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        names = dict.fromkeys(call["competitor"] for call in calls if call.get("case") == case)
        return tuple(name for name in names if DEVICE == "cuda" or name not in peers.GPU_ONLY)

    def measure(op: ModuleType, case: Any, name: str) -> None:
        if DEVICE == "cpu" and name in peers.GPU_ONLY:
            pytest.skip(f"{name} is made of Triton kernels: it runs on GPUs only")
        outcomes = measured(op, case, chosen(case))
        outcome = outcomes[name]
        if isinstance(outcome, peers.SkippedError):
            pytest.skip(str(outcome))
        if isinstance(outcome, torch.OutOfMemoryError) and name not in records.OURS:
            pytest.skip(f"{name} runs out of memory")
        if isinstance(outcome, Exception):
            raise outcome
        info = {"op": case.op, "part": case.part, "dtype": case.dtype, "competitor": name} | case.describe()
        info |= {"products": case.products, "flops": case.flops, "bytes": case.bytes, "device": DEVICE} | outcome.found
        if name == "matmul":
            info["flops"] //= case.products
        elif isinstance(product := outcomes.get("matmul"), measuring.Measured):
            info["floor_s"] = case.products * statistics.median(product.readings)
        rates()
        keep(case.name, replay_clock.replayed(outcome.readings), info, len(outcome.readings))

    return measure


@pytest.fixture
def measure_step(keep) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Time what ``make`` makes, a whole step or a sampling, with the memory it takes.

    On a GPU that is the peak of what is allocated, weights and optimizer states included; on a CPU what comes on top.
    What doesn't fit there is skipped by name.
    """

    def measure(group: str, make: Callable[[], measuring.Run], info: dict[str, Any], device: str) -> None:
        measuring.release_memory()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0  # what others keep
        try:
            run = measuring.finishing(make(), device)
            for _ in range(2 if device == "cuda" else 1):  # compiles, and makes the optimizers' states
                run()
        except torch.OutOfMemoryError:
            pytest.skip(f"{info['competitor']} runs out of memory")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            seconds = measuring.wall_clock(run)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            peak, seconds = measuring.growth_and_seconds(run)
        keep(group, run, info | {"peak_mib": round(peak, 1), "device": device}, measuring.rounds(seconds, 10))

    return measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of ``case`` and ``competitor`` get the pairs of their module's ``op`` and ``cases``, by device."""
    if {"case", "competitor"} <= set(metafunc.fixturenames):
        pairs = metafunc.module.pairs(DEVICE)
        # Only of what -k understands.
        ids = [f"{name}-{case.name}".replace(", ", "-").replace("=", "").replace(" ", "_") for case, name in pairs]
        metafunc.parametrize(("case", "competitor"), pairs, ids=ids)
