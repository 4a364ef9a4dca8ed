"""``vector_quantize`` beside the plain PyTorch expression of it: cdist, Gumbel noise, softmax, one_hot, products.

pytest bench/bench_vector_quantize.py -k large                 the size at which the claim of the last test is made
python bench/bench_vector_quantize.py plain large forward      MiB of resident memory that one call takes
"""

import functools
import sys
from typing import Any

import measuring
import pytest
import torch

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.reference import vector_quantize_reference

SIZES = {"small": (1024, 1024, 256), "large": (4096, 8192, 64)}  # M rows, N codes, D channels
OPS = ("plain", "regvq_fast")
PARTS = ("forward", "forward+backward")


def make_inputs(size: str) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Arguments, and gradients of the quantized rows and of the posterior; 40 % of the rows are stochastic."""
    rows, codes, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "x": torch.randn(rows, width, generator=generator).requires_grad_(),
        "codebook": torch.randn(codes, width, generator=generator).requires_grad_(),
        "mask": torch.rand(rows, generator=generator) < 0.4,
    }
    return inputs, torch.randn(rows, width, generator=generator), torch.randn(1, codes, generator=generator)


def make_run(op: str, size: str, part: str) -> measuring.Run:
    inputs, grad_quantized, grad_posterior = make_inputs(size)
    leaves = [inputs["x"], inputs["codebook"]]
    shape = (len(leaves[0]), len(leaves[1]))

    def run() -> None:
        if op == "plain":
            noise = torch.empty(shape).exponential_().log_().neg_()
            # The cheaper of the two codebook gradients, that of gumbel_softmax(hard=True) and a product.
            output = vector_quantize_reference(**inputs, noise=noise, codebook_grad="hard")
        else:
            output = vector_quantize(**inputs, seed=torch.randint(1 << 62, ()))
        if part == "forward+backward":
            torch.autograd.grad([output.quantized, output.posterior], leaves, [grad_quantized, grad_posterior])

    return run


@functools.cache
def check(size: str) -> None:
    """With the same noise the two agree: a wrong op reports no time."""
    inputs, grad_quantized, grad_posterior = make_inputs(size)
    gradients, indices = [], []
    for op in (vector_quantize, vector_quantize_reference):
        output = op(**inputs, seed=torch.tensor(1))
        leaves = [inputs["x"], inputs["codebook"]]
        outputs = [output.quantized, output.posterior]
        gradients.append(torch.autograd.grad(outputs, leaves, [grad_quantized, grad_posterior]))
        indices.append(output.indices)
    assert (indices[0] == indices[1]).float().mean() > 0.999
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_vector_quantize(compare, size: str, part: str, op: str) -> None:  # type: ignore[no-untyped-def]
    check(size)
    rows, codes, width = SIZES[size]
    group = f"vector_quantize {part}, M={rows} N={codes} D={width}"
    compare(__file__, make_run(op, size, part), group, op, size, part)


def test_at_the_large_size_it_is_at_least_as_fast_in_a_tenth_of_the_memory() -> None:
    """The claim of the README, forward plus backward. It measures time: run it on an idle machine."""
    check("large")
    part = "forward+backward"
    seconds = measuring.medians({op: make_run(op, "large", part) for op in OPS})
    memory = {op: measuring.peak_memory(__file__, op, "large", part) for op in OPS}
    print(f"\nseconds {seconds}\nMiB {memory}")
    assert seconds["regvq_fast"] <= seconds["plain"]
    assert memory["regvq_fast"] <= memory["plain"] / 10


if __name__ == "__main__":
    SIZES["warm-up"] = (64, 64, 8)  # the first call of an op loads modules; that is not its memory
    make_run(sys.argv[1], "warm-up", sys.argv[3])()
    print(measuring.resident_growth(make_run(*sys.argv[1:])))
