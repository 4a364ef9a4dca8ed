"""Sums by code against hand-worked numbers and index_add."""

import pytest
import torch

from regvq_fast.ops import segment_sum
from regvq_fast.ops.segment_sum import segment_counts


def test_hand_worked_table():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
    indices = torch.tensor([2, 0, 2, 4])
    expected = torch.tensor([[2.0, 20.0], [0.0, 0.0], [5.0, 50.0], [0.0, 0.0], [8.0, 80.0]])
    assert torch.equal(segment_sum(values, indices, 5), expected)
    assert segment_counts(indices, 5).tolist() == [1, 0, 2, 0, 1]


def test_counts_take_any_shape():
    assert segment_counts(torch.tensor([[1, 1], [0, 1]]), 3).tolist() == [1, 3, 0]


@pytest.mark.parametrize(("num_rows", "num_segments", "width"), [(0, 3, 2), (1, 1, 1), (500, 7, 5), (50, 900, 3)])
def test_equals_index_add_and_repeats_to_the_bit(num_rows, num_segments, width):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, num_segments, (num_rows,), generator=generator)
    expected = torch.zeros(num_segments, width, dtype=torch.float64).index_add_(0, indices, values)
    result = segment_sum(values, indices, num_segments)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(result, segment_sum(values, indices, num_segments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_keep_growing(dtype):
    # A running sum of ones in the type itself stops at 2048 (fp16) and at 256 (bf16).
    result = segment_sum(torch.ones(4096, 1, dtype=dtype), torch.zeros(4096, dtype=torch.int64), 2)
    assert result.dtype == dtype
    assert result.flatten().tolist() == [4096.0, 0.0]
