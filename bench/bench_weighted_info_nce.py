"""``weighted_info_nce`` beside the plain expression of it: the L x L similarities, their logarithms, autograd.

pytest bench/bench_weighted_info_nce.py
python bench/bench_weighted_info_nce.py plain large forward      MiB of resident memory that one call takes
"""

import functools
import sys

import measuring
import pytest
import torch
import torch.nn.functional as F

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.reference import weighted_info_nce_reference

# B images, L places, C channels: 256 sampled patches of a deep layer; every place of a 64 x 64 map.
SIZES = {"small": (8, 256, 512), "large": (2, 4096, 128)}
OPS = {"plain": weighted_info_nce_reference, "regvq_fast": weighted_info_nce}
PARTS = ("forward", "forward+backward")


def make_inputs(size: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the original, of the reconstruction, which trains, and weights."""
    images, length, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    query, key = (F.normalize(torch.randn(images, length, width, generator=generator), dim=2) for _ in range(2))
    weight = torch.rand(images, length, generator=generator).softmax(1)
    return query, key.requires_grad_(), weight


def make_run(op: str, size: str, part: str) -> measuring.Run:
    query, key, weight = make_inputs(size)

    def run() -> None:
        loss = OPS[op](query, key, weight).sum()
        if part == "forward+backward":
            torch.autograd.grad(loss, key)

    return run


@functools.cache
def check(size: str) -> None:
    """The two agree: a wrong op reports no time."""
    query, key, weight = make_inputs(size)
    losses = [op(query, key, weight) for op in OPS.values()]
    gradients = [torch.autograd.grad(loss.sum(), key)[0] for loss in losses]
    for plain, ours in (losses, gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_weighted_info_nce(compare, size: str, part: str, op: str) -> None:  # type: ignore[no-untyped-def]
    check(size)
    images, length, width = SIZES[size]
    group = f"weighted_info_nce {part}, B={images} L={length} C={width}"
    compare(__file__, make_run(op, size, part), group, op, size, part)


if __name__ == "__main__":
    SIZES["warm-up"] = (1, 8, 4)  # the first call of an op loads modules; that is not its memory
    make_run(sys.argv[1], "warm-up", sys.argv[3])()
    print(measuring.resident_growth(make_run(*sys.argv[1:])))
