"""``assign_codes`` beside ``torch.cdist(x, codebook).argmin(1)``.

pytest bench/bench_assign_codes.py
python bench/bench_assign_codes.py plain large      MiB of resident memory that one call takes
"""

import functools
import sys

import measuring
import pytest
import torch

from regvq_fast.ops import assign_codes

SIZES = {"small": (1024, 1024, 256), "large": (4096, 8192, 64)}  # M rows, N codes, D channels
OPS = ("plain", "regvq_fast")


def make_inputs(size: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, codes, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(codes, width, generator=generator)


def make_run(op: str, size: str) -> measuring.Run:
    x, codebook = make_inputs(size)
    if op == "plain":
        return lambda: torch.cdist(x, codebook).argmin(1)
    return lambda: assign_codes(x, codebook)


@functools.cache
def check(size: str) -> None:
    """Ties within rounding aside, the two agree: a wrong op reports no time."""
    x, codebook = make_inputs(size)
    assert (assign_codes(x, codebook) == torch.cdist(x, codebook).argmin(1)).float().mean() > 0.999


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_assign_codes(compare, size: str, op: str) -> None:  # type: ignore[no-untyped-def]
    check(size)
    rows, codes, width = SIZES[size]
    compare(__file__, make_run(op, size), f"assign_codes, M={rows} N={codes} D={width}", op, size, rounds=9)


if __name__ == "__main__":
    SIZES["warm-up"] = (64, 64, 8)  # the first call of an op loads modules; that is not its memory
    make_run(sys.argv[1], "warm-up")()
    print(measuring.resident_growth(make_run(*sys.argv[1:])))
