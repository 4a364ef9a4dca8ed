"""``vector_quantize`` beside plain PyTorch, eager and compiled, and vector-quantize-pytorch.

pytest bench/bench_vector_quantize.py --benchmark-only           forward, backward and both over N, D and types
pytest bench/bench_vector_quantize.py -k N2048                   a part of it, by the names that it prints
pytest bench/bench_vector_quantize.py -s -k claim                only the README's claim, whose runs take turns
"""

from dataclasses import replace

import gpu_cases
import measuring
import torch
from gpu_cases import Case

STEP, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
# The claim is made at this size, and "compiled" competes in it alone: compiling takes longer than all the rest.
LARGE = Case(STEP, 8192, "float32", rows=4096, width=64)


def cases(device: str) -> list[Case]:
    """N from 512 to 65536, D from 32 to 512, three types. On a CPU in fewer rows and combinations."""
    if device == "cuda":
        parts = (STEP, FORWARD, BACKWARD)
        codes = [Case(part, n, "bfloat16") for n in (512, 1024, 4096, 8192, 16384, 65536) for part in parts]
        widths = [Case(part, 8192, "bfloat16", width=d) for d in (32, 64, 128, 512) for part in parts]
        return codes + widths + [Case(part, 8192, dtype) for dtype in ("float16", "float32") for part in parts]
    large = [replace(LARGE, part=part) for part in (STEP, FORWARD, BACKWARD)]
    codes = [Case(STEP, n, "float32", rows=512, width=64) for n in (512, 2048, 8192, 65536)]
    widths = [Case(STEP, 2048, "float32", rows=512, width=d) for d in (32, 512)]
    return large + codes + widths + [Case(STEP, 2048, dtype, rows=512, width=64) for dtype in ("float16", "bfloat16")]


def pairs(device: str) -> list[tuple[Case, str]]:
    every = [(case, name) for case in cases(device) for name in gpu_cases.names(case, ours=("ours",))]
    return [(case, name) for case, name in every if name != "compiled" or device == "cuda" or case == LARGE]


def test_vector_quantize(measure_case, case: Case, competitor: str) -> None:  # type: ignore[no-untyped-def]
    measure_case(gpu_cases, case, competitor)


def test_claim_as_fast_as_eager_in_a_tenth_of_the_memory() -> None:
    """Forward plus backward, on a CPU. It measures time: run it on an idle machine."""
    inputs = gpu_cases.make_inputs(LARGE, "cpu")
    truth, makers = gpu_cases.truth_of(LARGE, inputs), gpu_cases.competitors(LARGE, inputs, ours=("ours",))
    runs = {name: makers[name]() for name in ("ours", "eager")}
    gpu_cases.examine(LARGE, inputs, truth, "ours", runs["ours"])
    seconds = measuring.medians(dict(runs))
    memory = {name: measuring.resident_growth(run) for name, run in runs.items()}
    print(f"\nseconds {seconds}\nMiB {memory}, {torch.get_num_threads()} threads")
    assert seconds["ours"] <= seconds["eager"]
    assert memory["ours"] <= memory["eager"] / 10
