"""``assign_codes`` against the nearest code by explicit distances."""

import pytest
import torch

from regvq_fast.ops import assign_codes, tiling, vector_quantize

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random_inputs(num_rows, num_codes, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows + num_codes)
    return (torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for n in (num_rows, num_codes))


def test_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.0, 0.9], [0.0, 1.1], [-5.0, -5.0], [9.0, 1.0]])
    assert assign_codes(x, codebook).tolist() == [0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_rows", "num_codes", "width"), [(1, 1, 1), (513, 301, 7), (100, 2000, 64), (0, 5, 3)])
def test_the_distance_is_the_smallest_within_rounding(num_rows, num_codes, width, dtype):
    x, codebook = random_inputs(num_rows, num_codes, width, dtype)
    indices = assign_codes(x, codebook)
    assert indices.shape == (num_rows,)
    assert indices.dtype == torch.int64
    exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    missed = exact.gather(1, indices[:, None]).squeeze(1) - exact.amin(1)
    # Products accumulate in fp32 for every type but fp64; scores are of the size of D.
    band = 1e-12 if dtype == torch.float64 else 4e-7 * max(width, 8)
    assert (missed <= band).all()
    if dtype == torch.float64:
        assert torch.equal(indices, exact.argmin(1))


def test_equals_the_best_index_of_the_quantizer():
    x, codebook = random_inputs(300, 77, 9)
    assert torch.equal(assign_codes(x, codebook), vector_quantize(x, codebook).best_indices)


@pytest.mark.parametrize(("num_codes", "width"), [(3, 1), (65, 16), (500, 64)])
def test_the_smallest_of_identical_codes_wins(num_codes, width):
    x, codebook = random_inputs(97, num_codes, width)
    assert torch.equal(assign_codes(x, torch.cat([codebook, codebook])), assign_codes(x, codebook))


def test_leading_dimensions_strides_and_tiles_do_not_matter(monkeypatch):
    x, codebook = random_inputs(120, 50, 6)
    expected = assign_codes(x, codebook)
    assert torch.equal(assign_codes(x.view(2, 60, 6), codebook), expected.view(2, 60))
    assert torch.equal(assign_codes(x.t().contiguous().t(), codebook.t().contiguous().t()), expected)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    assert torch.equal(assign_codes(x, codebook), expected)


def test_far_from_the_origin_the_nearest_code_still_wins():
    """The expanded square loses digits with the distance from the origin: pinned here for a large, realistic shift."""
    x, codebook = random_inputs(200, 60, 8)
    exact = torch.cdist(x.double(), codebook.double()).square()
    indices = assign_codes(x + 30, codebook + 30)
    assert (exact.gather(1, indices[:, None]).squeeze(1) - exact.amin(1)).max() < 0.02


def test_inputs_that_train_get_no_gradient():
    x, codebook = (value.requires_grad_() for value in random_inputs(5, 3, 2))
    assert not assign_codes(x, codebook).requires_grad
