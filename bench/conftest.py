"""Shared by the benchmarks: `pytest bench/ --benchmark-only`, or one of them, `pytest bench/bench_ops.py`.

``--records FILE`` keeps a record of each competitor in each case, measured or not, in the form that ``bench/report.py``
reads. It is written after every case; cases that it has of the same commit are not measured again. ``--limit SECONDS``
begins no competitor after that. ``--benchmark-disable`` checks, and compiles, without a time.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import pytest
import torch
from measuring import Measured

from regvq_fast import nvml

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNTIL, SKIPPED = pytest.StashKey[float](), pytest.StashKey[dict[Any, str]]()
OURS = ("ours", "vanilla", "nearest")  # that fail a test; of steps all but the baselines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="file of records to write, or to go on with")
    parser.addoption("--limit", type=float, default=math.inf, help="seconds from now")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # by what is skipped
    config.stash[UNTIL], config.stash[SKIPPED] = time.perf_counter() + config.getoption("--limit"), {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests of ``case`` and ``competitor`` the pairs of their module's ``cases``."""
    if {"case", "competitor"} <= set(metafunc.fixturenames):
        pairs = [(case, name) for case in metafunc.module.cases(DEVICE) for name in case.competitors(DEVICE)]
        ids = [f"{name}, {case.name}".replace(", ", "-").replace("=", "").replace(" ", "_") for case, name in pairs]
        metafunc.parametrize(("case", "competitor"), pairs, ids=ids)  # names of what -k understands


def records_of(case: Any, outcomes: dict[str, Measured | Exception]) -> list[dict[str, Any]]:
    """Return what the file has of a case, a record a competitor."""
    found = []
    for name, outcome in outcomes.items():
        record = case.facts() | {"competitor": name}
        if name == "matmul":
            record["flops"] //= record["products"]
        if isinstance(outcome, Measured):
            ms = sorted(1e3 * value for value in outcome.seconds)
            record |= {"status": "ok", **outcome.found, "ms": statistics.median(ms), "turns": len(ms)}
            record["ms_quartiles"] = [ms[len(ms) // 4], ms[-1 - len(ms) // 4]]
        else:
            record |= {"status": measuring.status_of(outcome), "reason": f"{type(outcome).__name__}: {outcome}"[:500]}
        found.append(record)
    return found


def recorded(path: Path, case: Any) -> set[str]:
    """Return the competitors in a case that the file has."""
    records, facts = measuring.load(path, DEVICE)["records"], case.facts() | {"flops": 0}
    same = [record for record in records if (record | {"flops": 0}).items() >= facts.items()]
    return {record["competitor"] for record in same if record["status"] != "out of time"}


def keep(path: Path, case: Any, outcomes: dict[str, Measured | Exception] | None) -> None:
    """Add the records of a case to the file, and of a GPU its clocks and power; None: time is up before it began."""
    found = measuring.load(path, DEVICE)
    late = found.setdefault("not_measured", {})
    if outcomes is None:
        late[case.name] = "out of time"
    else:
        late.pop(case.name, None)
        found["records"] += records_of(case, outcomes)
        if DEVICE == "cuda":
            found["records"][-1]["state"] = nvml.gpu_state()[1]()
    measuring.save(path, found)


@functools.lru_cache(maxsize=1)
def measured(case: Any, names: tuple[str, ...], until: float, turns: int | None) -> dict[str, Measured | Exception]:
    """Measure competitors of a case side by side; kept for their own tests to report."""
    torch.manual_seed(0)
    try:
        makers, examine = case.prepare(DEVICE)
    except Exception as error:  # such as memory that its fp64 twin lacks
        return dict.fromkeys(names, error)
    chosen = {name: makers[name] for name in names}
    return measuring.measure_side_by_side(chosen, examine, DEVICE, case.whole, until, turns)


@pytest.fixture
def replay(request: pytest.FixtureRequest) -> Callable[[list[float]], Callable[[], None]]:
    """Make pytest-benchmark count seconds that were measured; before ``benchmark``, which reads the marker."""
    now = [0.0]
    request.node.add_marker(pytest.mark.benchmark(timer=lambda: now[0]))

    def replayed(seconds: list[float]) -> Callable[[], None]:
        left = iter(seconds)

        def once() -> None:
            now[0] += next(left)

        return once

    return replayed


@pytest.fixture
def measure(request: pytest.FixtureRequest, replay: Any, benchmark: Any) -> Callable[[Any, str], None]:
    """Report one competitor in a case, after its result has been checked: a wrong one of ours fails."""

    def report(case: Any, name: str) -> None:
        calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        names = tuple(call["competitor"] for call in calls if call.get("case") == case)
        path, until = request.config.getoption("--records"), request.config.stash[UNTIL]
        first, skipped = name == names[0], request.config.stash[SKIPPED]
        if first and path and set(names) <= recorded(path, case):
            skipped[case] = "the file of records has the case"
        elif first and time.perf_counter() > until:
            skipped[case] = "out of time"
            if path:
                keep(path, case, None)
        if case in skipped:
            pytest.skip(skipped[case])
        outcomes = measured(case, names, until, None if benchmark.enabled else 0)
        if first and path and benchmark.enabled:
            keep(path, case, outcomes)
        outcome = outcomes[name]
        if isinstance(outcome, Exception):
            is_ours = name in OURS or (case.whole and not name.startswith(("taming", "plain")))
            if is_ours and measuring.status_of(outcome) in ("wrong", "failed"):
                raise outcome
            pytest.skip(f"{name}: {outcome}")
        benchmark.group = case.name
        if benchmark.enabled:
            benchmark.pedantic(replay(outcome.seconds), rounds=len(outcome.seconds))

    return report
