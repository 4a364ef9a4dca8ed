"""``assign_codes`` beside plain PyTorch, eager and compiled, vector-quantize-pytorch and flash-kmeans.

pytest bench/bench_assign_codes.py --benchmark-only
"""

import gpu_cases
import op_runs
from gpu_cases import Case


def cases(device: str) -> list[Case]:
    """N from 512 to 65536, D from 8 to 512, three types. On a CPU in fewer rows and combinations."""
    if device == "cuda":
        codes = [Case("assign", n, "bfloat16") for n in (512, 1024, 4096, 8192, 16384, 65536)]
        widths = [Case("assign", 8192, "bfloat16", width=d) for d in (8, 16, 32, 64, 512)]
        return codes + widths + [Case("assign", 8192, dtype) for dtype in ("float16", "float32")]
    large = Case("assign", 8192, "float32", rows=4096, width=64)
    codes = [Case("assign", n, "float32", rows=1024, width=64) for n in (512, 4096, 65536)]
    widths = [Case("assign", 4096, "float32", rows=1024, width=d) for d in (8, 16, 32, 256, 512)]
    return [large, *codes, *widths, Case("assign", 4096, "bfloat16", rows=1024, width=64)]


def pairs(device: str) -> list[tuple[Case, str]]:
    every = cases(device)
    return op_runs.pairs(gpu_cases, every, device, [max(every, key=lambda case: case.flops)])


def test_assign_codes(measure_case, case: Case, competitor: str) -> None:  # type: ignore[no-untyped-def]
    measure_case(gpu_cases, case, competitor)
