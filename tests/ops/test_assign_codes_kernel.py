"""The Triton ``assign_codes`` against exact distances; without a GPU in Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import (
    DEVICE,
    FLOATS,
    every_schedule,
    if_kernels_are_elsewhere,
    kernels,
    needs_kernels,
    pass_in_the_interpreter,
    set_split,
    surrounded,
)

from regvq_fast.ops import assign_codes

pytest.importorskip("triton")


def random_inputs(num_rows, num_codes, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows + num_codes)
    return tuple(torch.randn(extent, width, generator=generator).to(dtype) for extent in (num_rows, num_codes))


def assigned(x, codebook, schedule):
    x, codebook = surrounded(x), surrounded(codebook)
    with kernels(schedule):
        return assign_codes(x, codebook, impl="triton").cpu()


def assert_nearest(indices, x, codebook):
    """Exactly, unless another code is as near within the rounding of fp32 sums."""
    x, codebook = x.double(), codebook.double()
    half_square = 0.5 * codebook.square().sum(1)
    scores = x @ codebook.t() - half_square
    band = 8 * torch.finfo(torch.float32).eps * (x.abs() @ codebook.t().abs() + half_square)
    chosen = (scores + band).gather(1, indices.unsqueeze(1)).squeeze(1)
    assert (chosen >= (scores - band).amax(1)).all()


@if_kernels_are_elsewhere
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


def test_float64_has_no_kernels():
    x = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        assign_codes(x, x, impl="triton")


@needs_kernels
@every_schedule
@pytest.mark.parametrize(
    ("num_rows", "num_codes", "width", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (257, 127, 15, torch.float32),
        (17, 257, 257, torch.float32),
        (15, 1031, 17, torch.float16),
        (1031, 15, 1, torch.float16),
        (17, 257, 257, torch.float16),
        (257, 127, 15, FLOATS[-1]),
        (128, 64, 128, FLOATS[-1]),
        (127, 17, 512, FLOATS[-1]),
    ],
)
def test_the_nearest_code_wins(num_rows, num_codes, width, dtype, schedule):
    x, codebook = random_inputs(num_rows, num_codes, width, dtype)
    indices = assigned(x, codebook, schedule)
    assert indices.shape == (num_rows,)
    assert indices.dtype == torch.int64
    assert_nearest(indices, x, codebook)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_tiny_and_huge_inputs(size, schedule):
    """Their squares, too, are normal numbers of fp32."""
    x, codebook = (size * value for value in random_inputs(100, 70, 20))
    assert_nearest(assigned(x, codebook, schedule), x, codebook)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("codes_of_a_split", [1 << 20, 64])
def test_the_smallest_of_identical_codes_wins(codes_of_a_split, schedule, monkeypatch):
    """Within a tile, across tiles and across parts."""
    parts = set_split(monkeypatch, codes_of_a_split)
    x, distinct = (torch.round(8 * value) / 8 for value in random_inputs(150, 50, 9))  # exact sums, in any order
    codes = torch.randint(50, (500,), generator=torch.Generator().manual_seed(0))
    indices = assigned(x, distinct[codes], schedule)
    assert [number > 1 for number in parts] == [codes_of_a_split == 64]
    assert_nearest(indices, x, distinct[codes])
    first = torch.stack([(codes == code).int().argmax() for code in range(50)])
    assert torch.equal(first[codes[indices]], indices)


@needs_kernels
@every_schedule
def test_chunks_strides_and_leading_dimensions_do_not_matter(schedule, monkeypatch):
    from regvq_fast import dispatch

    x, codebook = random_inputs(300, 130, 6)
    expected = assigned(x, codebook, schedule)
    assert torch.equal(assigned(x.view(2, 150, 6), codebook, schedule), expected.view(2, 150))
    assert torch.equal(assigned(x.t().contiguous().t(), codebook.t().contiguous().t(), schedule), expected)
    every_other = (torch.stack([value, value], -1)[..., 0] for value in (x, codebook))
    assert torch.equal(assigned(*every_other, schedule), expected)
    monkeypatch.setattr(dispatch, "CHUNK_SCORES", 1)
    monkeypatch.setattr(dispatch, "MIN_CHUNK_ROWS", 128)
    assert torch.equal(assigned(x, codebook, schedule), expected)


@needs_kernels
@every_schedule
def test_no_rows(schedule):
    assert assigned(torch.zeros(0, 3), torch.zeros(5, 3), schedule).shape == (0,)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_and_one_graph(dtype):
    x, codebook = (value.to(DEVICE) for value in random_inputs(8, 5, 3, dtype))
    torch.library.opcheck(torch.ops.regvq.assign_codes, (x, codebook, "triton"))

    def double(x):
        return assign_codes(x * 2, codebook, impl="triton")

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))
