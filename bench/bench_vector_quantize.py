"""``vector_quantize`` beside plain PyTorch, eager and compiled, and vector-quantize-pytorch.

pytest bench/bench_vector_quantize.py --benchmark-only           forward, backward and both over N, D and types
pytest bench/bench_vector_quantize.py -k N2048                   a part of it, by the names that it prints
pytest bench/bench_vector_quantize.py -s -k claim                only the claim for a CPU, whose runs take turns
"""

from dataclasses import replace

import gpu_cases
import op_runs
from gpu_cases import Case

STEP, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
# The claim is made at this size, and on a CPU "compiled" competes in it alone: forward and both are one compilation.
LARGE = Case(STEP, 8192, "float32", rows=4096, width=64)


def cases(device: str) -> list[Case]:
    """N from 512 to 65536, D from 8 to 512, three types. On a CPU in fewer rows and combinations."""
    if device == "cuda":
        parts = (STEP, FORWARD, BACKWARD)
        widths = [Case(part, n, "bfloat16", width=d) for d in (8, 16, 32, 64) for n in (1024, 8192) for part in parts]
        codes = [Case(part, n, "bfloat16") for n in (512, 1024, 4096, 8192, 16384, 65536) for part in parts]
        types = [Case(part, 8192, dtype) for dtype in ("float16", "float32") for part in parts]
        others = [Case(part, 8192, "bfloat16", width=512) for part in parts]
        usual = Case(STEP, 8192, "bfloat16")
        return [*widths, *codes, *types, *others, *unusual(usual)]
    large = [replace(LARGE, part=part) for part in (STEP, FORWARD, BACKWARD)]
    codes = [Case(STEP, n, "float32", rows=512, width=64) for n in (512, 2048, 8192)]
    codes.append(Case(STEP, 65536, "float32", rows=256, width=64))
    usual = Case(STEP, 2048, "float32", rows=512, width=64)
    widths = [replace(usual, width=d) for d in (8, 16, 32, 256, 512)]
    return [
        *large,
        *codes,
        *widths,
        *(replace(usual, dtype=dtype) for dtype in ("float16", "bfloat16")),
        *unusual(usual),
    ]


def unusual(case: Case) -> list[Case]:
    return [replace(case, latents="trained-like"), replace(case, codebook_grad="hard")]


def pairs(device: str) -> list[tuple[Case, str]]:
    return op_runs.pairs(gpu_cases, cases(device), device, (LARGE, replace(LARGE, part=FORWARD)))


def test_vector_quantize(measure_case, case: Case, competitor: str) -> None:  # type: ignore[no-untyped-def]
    measure_case(gpu_cases, case, competitor)


def test_claim_as_fast_as_eager_in_a_tenth_of_the_memory() -> None:
    """Forward plus backward."""
    op_runs.claim_as_fast_in_a_tenth_of_the_memory(gpu_cases, LARGE)
