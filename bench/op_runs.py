"""What the benchmarks of the ops share: which competitors a case has, and the claim for a CPU."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

import measuring
import torch

C = TypeVar("C")


def pairs(op: ModuleType, cases: Sequence[C], device: str, compiled: Sequence[C]) -> list[tuple[C, str]]:
    """Cases with their competitors. On a CPU "compiled" competes in few: compiling takes longer than all the rest.

    Args:
        op: module of the cases, ``gpu_cases`` or ``gpu_info_nce``.
        compiled: the few.
    """
    every = [(case, name) for case in cases for name in op.names(case)]
    return [(case, name) for case, name in every if name != "compiled" or device == "cuda" or case in compiled]


def side_by_side(
    op: ModuleType, case: Any, names: Sequence[str], **turns: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of competitors that take turns on a CPU, and their MiB; the results of each are checked first."""
    inputs = op.make_inputs(case, "cpu")
    truth, makers = op.truth_of(case, inputs), op.competitors(case, inputs)
    runs = {name: makers[name]() for name in names}
    for name, run in runs.items():
        op.examine(case, inputs, truth, name, run)
    seconds = measuring.medians(dict(runs), **turns)
    return seconds, {name: measuring.resident_growth(run) for name, run in runs.items()}


def claim_as_fast_in_a_tenth_of_the_memory(op: ModuleType, case: Any) -> None:
    """Ours beside eager PyTorch on a CPU, taking turns. It measures time: run it on an idle machine."""
    seconds, memory = side_by_side(op, case, ("ours", "eager"))
    print(f"\nseconds {seconds}\nMiB {memory}, {torch.get_num_threads()} threads")
    assert seconds["ours"] <= seconds["eager"]
    assert memory["ours"] <= memory["eager"] / 10
