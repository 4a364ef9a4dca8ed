"""``weighted_info_nce`` beside the plain expression of it: the L x L similarities, their logarithms, autograd.

pytest bench/bench_weighted_info_nce.py -k 4096                the size at which the claim of the last test is made
python bench/bench_weighted_info_nce.py plain 4096 forward     MiB of resident memory that one call takes
"""

import functools
import sys

import measuring
import pytest
import torch
import torch.nn.functional as F

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.reference import weighted_info_nce_reference

# B images, C channels by L places: 256 sampled patches, every place of a 32 x 32 and of a 64 x 64 map.
SIZES = {"256": (8, 128), "1024": (4, 128), "4096": (1, 128)}
OPS = {"plain": weighted_info_nce_reference, "regvq_fast": weighted_info_nce}
PARTS = ("forward", "forward+backward")


def make_inputs(length: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the original, of the reconstruction, which trains, and weights."""
    images, width = SIZES[length]
    shape = (images, int(length))
    generator = torch.Generator().manual_seed(0)
    query, key = (F.normalize(torch.randn(*shape, width, generator=generator), dim=2) for _ in range(2))
    weight = torch.rand(shape, generator=generator).softmax(1)
    return query, key.requires_grad_(), weight


def make_run(op: str, length: str, part: str) -> measuring.Run:
    query, key, weight = make_inputs(length)

    def run() -> None:
        loss = OPS[op](query, key, weight).sum()
        if part == "forward+backward":
            torch.autograd.grad(loss, key)

    return run


@functools.cache
def check(length: str) -> None:
    """The two agree: a wrong op reports no time."""
    query, key, weight = make_inputs(length)
    losses = [op(query, key, weight) for op in OPS.values()]
    gradients = [torch.autograd.grad(loss.sum(), key)[0] for loss in losses]
    for plain, ours in (losses, gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("length", SIZES)
def test_weighted_info_nce(compare, length: str, part: str, op: str) -> None:  # type: ignore[no-untyped-def]
    check(length)
    images, width = SIZES[length]
    group = f"weighted_info_nce {part}, B={images} L={length} C={width}"
    compare(__file__, make_run(op, length, part), group, op, length, part)


def test_at_4096_places_it_is_at_least_as_fast_in_a_tenth_of_the_memory() -> None:
    """The claim for a CPU, forward plus backward. It measures time: run it on an idle machine."""
    check("4096")
    part = "forward+backward"
    seconds = measuring.medians({op: make_run(op, "4096", part) for op in OPS})
    memory = {op: measuring.peak_memory(__file__, op, "4096", part) for op in OPS}
    print(f"\nseconds {seconds}\nMiB {memory}")
    assert seconds["regvq_fast"] <= seconds["plain"]
    assert memory["regvq_fast"] <= memory["plain"] / 10


if __name__ == "__main__":
    SIZES["8"] = (1, 4)  # warm-up: the first call of an op loads modules; that is not its memory
    make_run(sys.argv[1], "8", sys.argv[3])()
    print(measuring.resident_growth(make_run(*sys.argv[1:])))
