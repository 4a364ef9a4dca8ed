"""Shared by the benchmarks: `pytest bench/ --benchmark-only`, or one of them, `pytest bench/bench_assign_codes.py`."""

from collections.abc import Callable

import measuring
import pytest
import torch


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Time one case of a script, in a group with its twins, with its peak memory and the machine's settings beside."""

    def run_case(script: str, run: measuring.Run, group: str, *case: str, rounds: int = 3) -> None:
        benchmark.group = group
        benchmark.extra_info["peak_mib"] = round(measuring.peak_memory(script, *case), 1)
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)

    return run_case
