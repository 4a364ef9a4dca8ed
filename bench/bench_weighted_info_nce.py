"""``weighted_info_nce`` beside plain PyTorch with its L x L similarities, eager and compiled, and inf-cl.

pytest bench/bench_weighted_info_nce.py --benchmark-only          forward, backward and both over L, C and types
pytest bench/bench_weighted_info_nce.py -s -k claim               only the claim for a CPU, whose runs take turns
"""

from dataclasses import replace

import gpu_info_nce
import op_runs
from gpu_info_nce import InfoNceCase

STEP, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
# One image of 64 x 64 places: the claim is made there, and on a CPU "compiled" competes in it alone.
LARGE = InfoNceCase(STEP, 4096, 128, "float32", rows=4096)


def cases(device: str) -> list[InfoNceCase]:
    """256 sampled places of an image up to all of a 256 x 256 map. On a CPU fewer images, up to 64 x 64 places."""
    parts = (STEP, FORWARD, BACKWARD)
    if device == "cuda":
        lengths = [InfoNceCase(part, n, 512, "bfloat16") for n in (256, 1024, 4096, 16384) for part in parts]
        widths = [InfoNceCase(part, n, c, "bfloat16") for n, c in ((4096, 128), (65536, 64)) for part in parts]
        return lengths + widths + [InfoNceCase(STEP, 4096, 512, dtype) for dtype in ("float16", "float32")]
    large = [InfoNceCase(part, 4096, 128, "float32", rows=4096) for part in parts]
    lengths = [InfoNceCase(STEP, n, 128, "float32", rows=2048) for n in (256, 1024)]
    types = [InfoNceCase(STEP, 1024, 128, dtype, rows=2048) for dtype in ("float16", "bfloat16")]
    return [*large, *lengths, InfoNceCase(STEP, 1024, 512, "float32", rows=2048), *types]


def pairs(device: str) -> list[tuple[InfoNceCase, str]]:
    return op_runs.pairs(gpu_info_nce, cases(device), device, (LARGE, replace(LARGE, part=FORWARD)))


def test_weighted_info_nce(measure_case, case: InfoNceCase, competitor: str) -> None:  # type: ignore[no-untyped-def]
    measure_case(gpu_info_nce, case, competitor)


def test_claim_as_fast_as_eager_in_a_tenth_of_the_memory() -> None:
    """Forward plus backward."""
    op_runs.claim_as_fast_in_a_tenth_of_the_memory(gpu_info_nce, LARGE)
