"""Shared by the benchmarks: `pytest bench/ --benchmark-only`, or one of them, `pytest bench/bench_ops.py`.

``--records FILE`` keeps a record of each competitor in each case, measured or not, in the form that ``bench/report.py``
reads. It is written after every case; cases that it has of the same commit are not measured again, so that a second
call goes on. ``--limit SECONDS`` begins no case after that. ``--benchmark-disable`` checks and compiles, without times.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import pytest
import report
import torch
from measuring import Outcome

from regvq_fast import nvml

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BEGIN = time.perf_counter()
CLOCK = [0.0]  # pytest-benchmark's: it goes on by seconds that were measured


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="file of records to write, or to go on with")
    parser.addoption("--limit", type=float, default=math.inf, help="seconds after which no case begins")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # by what is skipped


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests of ``case`` and ``competitor`` the pairs of their module's ``cases``."""
    if not {"case", "competitor"} <= set(metafunc.fixturenames):
        return
    pairs = []
    for case in metafunc.module.cases(DEVICE):
        mark = pytest.mark.benchmark(group=name_of(case), timer=lambda: CLOCK[0])
        for name in case.competitors(DEVICE):
            # In words that -k understands.
            label = f"{name}-{name_of(case)}".replace(", ", "-").replace(" = ", "").replace(" ", "_")
            pairs.append(pytest.param(case, name, id=label, marks=mark))
    metafunc.parametrize(("case", "competitor"), pairs)


def name_of(case: Any) -> str:
    fields = case.fields()
    return f"{fields['op']}, {report.name_of(fields)}"


@functools.lru_cache(maxsize=1)
def outcomes_of(case: Any, names: tuple[str, ...], path: Path | None, limit: float, timed: bool) -> dict[str, Outcome]:
    """Measure competitors of a case, once for the tests of all of them, and keep their records in the file."""
    found = measuring.load(path, DEVICE) if path else {"records": [], "not_measured": []}
    fields, missing = case.fields(), f"out of time: {name_of(case)}"
    if set(names) <= {record["competitor"] for record in found["records"] if record.items() >= fields.items()}:
        return dict.fromkeys(names, measuring.SkippedError("the file of records has the case"))
    late = time.perf_counter() - BEGIN > limit
    outcomes: dict[str, Outcome] = dict.fromkeys(names, measuring.SkippedError("out of time"))
    found["not_measured"] = [line for line in found["not_measured"] if line != missing] + [missing] * late
    if not late:
        try:
            makers, examine = case.prepare(DEVICE)
            chosen = {name: makers[name] for name in names}
            outcomes = measuring.measure_side_by_side(chosen, examine, DEVICE, case.whole, None if timed else 0)
        except Exception as error:  # such as memory that its fp64 twin lacks
            outcomes = dict.fromkeys(names, error)
        if timed:
            found["records"] += [measuring.record_of(fields, *outcome) for outcome in outcomes.items()]
            if DEVICE == "cuda":
                found["records"][-1]["state"] = nvml.gpu_state()[1]()
    if path:
        measuring.save(path, found)
    return outcomes


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Any, str], None]:
    """Report one competitor in a case, after its result has been checked: a wrong one of ours fails."""
    config = request.config

    def measured(case: Any, name: str) -> None:
        calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        names = tuple(call["competitor"] for call in calls if call.get("case") == case)
        path, limit = config.getoption("--records"), config.getoption("--limit")
        outcome = outcomes_of(case, names, path, limit, benchmark.enabled)[name]
        if isinstance(outcome, Exception):
            excused = isinstance(outcome, (measuring.SkippedError, torch.OutOfMemoryError))
            if not name.startswith((*report.PEERS, "matmul")) and not excused:
                raise outcome
            pytest.skip(f"{name}: {outcome}")
        if benchmark.enabled:
            readings = iter(outcome[1])

            def advance() -> None:
                CLOCK[0] += next(readings)

            benchmark.pedantic(advance, rounds=len(outcome[1]))

    return measured
