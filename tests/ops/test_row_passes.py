"""Passes over rows of scores, in C and in PyTorch."""

import math
import shutil

import pytest
import torch

from regvq_fast import native
from regvq_fast.ops import row_passes, vector_quantize
from regvq_fast.ops.noise import gumbel_noise

SEED = torch.tensor(2**62 + 12345)
SIZES = [1, 3, 16, 255, 256, 257, 1000]


@pytest.fixture
def passes(request, monkeypatch):
    """Run a test with several threads in C, however small its tensors, or with PyTorch alone."""
    if request.param == "pytorch":
        monkeypatch.setattr(row_passes, "rows_library", lambda like: None)
        yield
        return
    assert native.rows_library(torch.empty(1)) is not None
    monkeypatch.setattr(native, "_PART_ELEMENTS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


either = pytest.mark.parametrize(
    "passes",
    [pytest.param("c", marks=pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")), "pytorch"],
    indirect=True,
)


def random_scores(num_rows: int, num_codes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_codes)
    return 5 * torch.randn(num_rows, num_codes, generator=generator)


@pytest.mark.parametrize("num_columns", [1, 511, 512, 513, 575, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least", [0, row_passes._ARGMAX_SCORES])
def test_the_first_of_equal_maxima_is_found(monkeypatch, num_columns, dtype, least):
    monkeypatch.setattr(row_passes, "_ARGMAX_SCORES", least)  # small searches and large ones
    generator = torch.Generator().manual_seed(num_columns)
    scores = torch.randint(-3, 4, (50, num_columns), generator=generator).to(dtype)  # many equals
    scores[0] = -torch.inf
    scores[1, -1] = 5.0
    first = [row.tolist().index(row.max()) for row in scores]
    assert row_passes.argmax(scores).tolist() == first
    assert row_passes.argmax(scores.t().contiguous().t()).tolist() == first  # as they may lie in memory
    assert row_passes.select(scores.clone(), torch.zeros(num_columns, dtype=dtype))[0].tolist() == first


@either
@pytest.mark.parametrize("num_codes", SIZES)
def test_select_adds_the_bias_and_the_noise_of_its_rows(passes, num_codes):
    scores, bias = random_scores(7, num_codes), random_scores(1, num_codes)[0]
    numbers, t = torch.tensor([5, 0, 2**32 - 1, 2**40 + 3, -1, 77, 6]), torch.linspace(0.5, 1.5, 7).unsqueeze(1)
    changed = scores.clone()
    best, selected = row_passes.select(changed, bias, row_passes.Noise(SEED, numbers, None, t, head=3))
    assert torch.equal(best, (scores + bias).max(1).indices)
    noisy = scores + bias + gumbel_noise(SEED, numbers, num_codes, 3)
    assert torch.equal(selected, noisy.max(1).indices)
    assert torch.equal(changed, noisy / t)


@either
@pytest.mark.parametrize("num_codes", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_backward_of_softmax_is_that_of_fp64(passes, num_codes, in_place):
    scores, grad = random_scores(6, num_codes), random_scores(6, num_codes + 1)[:, 1:].contiguous()
    column_bias = row_passes.ColumnBias(
        random_scores(2, num_codes), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, False, True] * 2)
    )
    upstream = grad.double() + column_bias.values.double()[column_bias.groups] * column_bias.valid.unsqueeze(1)
    exact = scores.double().requires_grad_()
    expected = exact.softmax(1)
    expected.backward(upstream)

    kept = scores.clone()
    p = scores if in_place else torch.full_like(scores, torch.nan)
    row_passes.softmax_backward(scores, column_bias, p, grad)
    torch.testing.assert_close(p.double(), expected, rtol=5e-6, atol=1e-26)  # scores of 40 have an ulp of 4e-6
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert in_place or torch.equal(scores, kept)


@either
def test_probabilities_that_are_nearly_subnormal_become_zero(passes):
    scores = torch.tensor([[0.0, -59.0, -61.0, -200.0]])
    p, grad = torch.empty_like(scores), torch.ones_like(scores)
    row_passes.softmax_backward(scores, None, p, grad)
    assert p[0, 0] == 1
    assert p[0, 1] > 0
    assert p[0, 2:].tolist() == [0, 0]


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_without_a_compiler_an_op_gives_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=generator) for size in ((300, 8), (130, 8))]
    mask = torch.rand(300, generator=generator) < 0.5

    def results() -> list[torch.Tensor]:
        x, codebook = (leaf.clone().requires_grad_() for leaf in leaves)
        out = vector_quantize(x, codebook, scale=0.5, mask=mask, seed=SEED, groups=3)
        (out.quantized.square().sum() + out.posterior.square().sum()).backward()
        return [out.indices, out.best_indices, x.grad, codebook.grad]

    in_c = results()
    monkeypatch.setattr(row_passes, "rows_library", lambda like: None)
    for found, expected in zip(in_c, results(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@either
@pytest.mark.parametrize("num_codes", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_log_sum_exp_and_softmax_are_those_of_fp64(passes, num_codes, in_place):
    scores = random_scores(6, num_codes).view(2, 3, num_codes)
    factor, exact = torch.linspace(-1, 2, 6).view(2, 3), scores.double()
    if num_codes > 1:
        scores[0, 0, 0] = exact[0, 0, 0] = -torch.inf
    lse = row_passes.log_sum_exp(scores)
    torch.testing.assert_close(lse.double(), exact.logsumexp(2), rtol=1e-6, atol=1e-6)
    expected = exact.softmax(2).clamp(min=math.exp(-60)) * factor.unsqueeze(2)
    out = scores if in_place else torch.empty_like(scores)
    assert row_passes.softmax(scores, lse, factor, out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
