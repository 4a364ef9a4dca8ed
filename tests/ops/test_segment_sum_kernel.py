"""The Triton ``segment_sum`` against fp64 sums; without a GPU in Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import (
    DEVICE,
    FLOATS,
    if_kernels_are_elsewhere,
    kernels,
    needs_kernels,
    pass_in_the_interpreter,
    surrounded,
    without_interpreter,
)

from regvq_fast.ops import segment_sum

pytest.importorskip("triton")


def summed(values, indices, num_segments):
    values, indices = surrounded(values), surrounded(indices)
    with kernels("fused"):  # there is one schedule
        return segment_sum(values, indices, num_segments, impl="triton").cpu()


def random_inputs(num_rows, num_segments, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    values = torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype)
    return values, torch.randint(0, num_segments, (num_rows,), generator=generator)


@if_kernels_are_elsewhere
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match="float64"):
        segment_sum(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), 2, impl="triton")


@without_interpreter
def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(ValueError, match=r"impl='triton' .*cpu.*TRITON_INTERPRET=1"):
        segment_sum(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), 2, impl="triton")


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("num_rows", "num_segments", "width"),
    [(0, 3, 2), (1, 1, 1), (15, 70, 3), (257, 17, 127), (1031, 1, 5), (1031, 15, 64), (60, 11, 300)],
)
def test_sums_are_exact_within_rounding_and_repeat_to_the_bit(num_rows, num_segments, width, dtype):
    values, indices = random_inputs(num_rows, num_segments, width, dtype)
    result = summed(values, indices, num_segments)
    assert result.dtype == dtype
    exact = torch.zeros(num_segments, width, dtype=torch.float64).index_add_(0, indices, values.double())
    size = torch.zeros(num_segments, width, dtype=torch.float64).index_add_(0, indices, values.double().abs())
    rounded = (exact.to(dtype).double() - exact).abs()
    # fp32 sums, of which one rounding to the result's type is left.
    assert ((result.double() - exact).abs() <= rounded + 1e-6 * size + torch.finfo(dtype).eps * exact.abs() / 2).all()
    assert torch.equal(summed(values, indices, num_segments), result)


@needs_kernels
def test_rows_add_up_in_their_order():
    """Too far apart to be added at once: 1, 2^24, -2^24 make 0 in this order, in fp32, and 1 from right to left."""
    values, indices = torch.zeros(192, 2), torch.arange(192) % 2
    values[[0, 64, 128], 0] = values[[129, 65, 1], 1] = torch.tensor([1.0, 2**24, -(2**24)])
    assert summed(values, indices, 3).tolist() == [[0, 0], [0, 1], [0, 0]]


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_sums_of_half_types_keep_growing(dtype):
    result = summed(torch.ones(4096, 1, dtype=dtype), torch.zeros(4096, dtype=torch.int64), 2)
    assert result.flatten().tolist() == [4096, 0]


@needs_kernels
def test_strides_do_not_matter():
    values, indices = random_inputs(100, 7, 6)
    expected = summed(values, indices, 7)
    assert torch.equal(summed(values.t().contiguous().t(), torch.stack([indices, -indices], 1)[:, 0], 7), expected)
    assert torch.equal(summed(torch.stack([values, values], -1)[..., 0], indices, 7), expected)


@needs_kernels
def test_opcheck():
    values, indices = (value.to(DEVICE) for value in random_inputs(8, 5, 3))
    torch.library.opcheck(torch.ops.regvq.segment_sum, (values, indices, 5, "triton"))
