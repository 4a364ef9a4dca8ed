"""The Triton kernels of ``weighted_info_nce`` against fp64 and the literal equations; on a CPU in the interpreter."""

import math
from typing import NamedTuple

import pytest
import torch
from helpers.info_nce_cases import make_inputs
from helpers.info_nce_kernel_cases import (
    Inputs,
    assert_within_budget,
    convert,
    kernel_results,
    of_all,
    results,
    upstream,
)
from helpers.kernel_cases import (
    DEVICE,
    FLOATS,
    every_schedule,
    if_kernels_are_elsewhere,
    kernels,
    needs_kernels,
    pass_in_the_interpreter,
    patch_dispatch,
    surrounded,
)
from torch import Tensor

from regvq_fast.ops import weighted_info_nce
from regvq_fast.ops.reference import weighted_info_nce_reference

pytest.importorskip("triton")

# The logarithm of a weight of 0, and lanes beyond the last row or key, which hold anything.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow", "ignore:invalid value")


@if_kernels_are_elsewhere
@pytest.mark.slow
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


class Case(NamedTuple):
    shape: tuple[int, int, int]
    weights: str
    tau: float = 0.07
    dtype: torch.dtype = torch.float32

    def inputs(self) -> Inputs:
        return make_inputs(self.shape, self.weights, self.dtype)

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


# Positions and channels are 1, ragged, and a multiple of every tile; less than a tile, and several.
CASES = (
    Case((5, 2, 1), "none", 1.0),
    Case((5, 2, 64), "with zeros", 0.01),
    Case((3, 15, 3), "random", 0.01),
    Case((1, 15, 512), "with zeros", 0.07, torch.float16),
    Case((2, 17, 65), "none", 0.01, torch.bfloat16),
    Case((2, 17, 128), "uniform", 1.0),
    Case((1, 127, 64), "none", 0.01, torch.float16),
    Case((2, 127, 300), "random"),
    Case((1, 127, 256), "with zeros", 0.1, torch.bfloat16),
    Case((2, 128, 64), "random", 0.07, torch.float16),
    Case((1, 257, 64), "with zeros", 1.0),
    Case((1, 257, 128), "random", 0.01),
    Case((1, 257, 33), "uniform", 0.07, torch.bfloat16),
    Case((2, 150, 8), "random", 0.07, torch.float16),
    Case((2, 150, 16), "random", 0.07, torch.bfloat16),
    Case((2, 150, 32), "random"),
)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_as_exact_as_plain_pytorchs(case, schedule):
    assert_within_budget(kernel_results(case.inputs(), schedule, tau=case.tau), case.inputs(), tau=case.tau)


@needs_kernels
@every_schedule
def test_the_gradient_is_that_of_equation_3_with_its_constant(schedule):
    """Eq. 3 to the letter: -log( w_i e^{a_ii} / (w_i e^{a_ii} + 1/L sum_{j != i} e^{a_ij}) ), w > 0."""

    def literal(query: Tensor, key: Tensor, weight: Tensor, tau: float) -> Tensor:
        similar = (query @ key.mT / tau).exp()
        own = weight * similar.diagonal(0, 1, 2)
        others = (similar.sum(2) - similar.diagonal(0, 1, 2)) / weight.shape[1]
        return -torch.log(own / (own + others))

    inputs = make_inputs((2, 70, 20), "random", torch.float32)
    exact = convert(inputs, torch.float64)
    loss, *gradients = kernel_results(inputs, schedule, tau=0.2)
    value, *expected = results(literal, exact, tau=0.2)
    torch.testing.assert_close(loss.double(), value + exact[2].log(), rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@needs_kernels
@every_schedule
def test_uniform_weights_are_vanilla_infonce_but_for_the_logarithm_of_the_length(schedule):
    query, key, weight = make_inputs((2, 50, 16), "uniform", torch.float32)
    weighted = kernel_results((query, key, weight), schedule)
    vanilla = kernel_results((query, key, None), schedule)
    torch.testing.assert_close(weighted[0] + math.log(50), vanilla[0], rtol=1e-5, atol=1e-5)
    for value, other in zip(weighted[1:], vanilla[1:], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("weights", ["none", "with zeros"])
def test_an_order_of_positions_and_images_changes_nothing_but_the_order(weights, schedule):
    inputs = make_inputs((3, 70, 9), weights, torch.float32)
    positions = torch.randperm(70, generator=torch.Generator().manual_seed(1))

    def shuffled(value: Tensor) -> Tensor:
        return value.detach().flip(0)[:, positions].requires_grad_(value.requires_grad)

    expected = kernel_results(inputs, schedule)
    found = kernel_results(of_all(shuffled, inputs), schedule, shuffled(upstream((3, 70))))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, shuffled(other), rtol=1e-5, atol=1e-5)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("weights", ["none", "random"])
def test_the_gradient_keeps_its_digits_where_the_positive_dominates(weights, schedule):
    """Negatives weigh at most 1e-10: 1 - p of the positive is pure rounding, as in plain PyTorch."""
    query, key, weight = make_inputs((1, 40, 64), weights, torch.float32)
    key = (query.detach() + 0.05 * key.detach()).requires_grad_()
    inputs = (query, key, weight)
    truth, plain = (
        results(weighted_info_nce_reference, convert(inputs, dtype), tau=0.03)
        for dtype in (torch.float64, torch.float32)
    )
    found = kernel_results(inputs, schedule, tau=0.03)
    for value, other, true in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert (value.double() - true).norm() < 1e-4 * true.norm()
        assert (other.double() - true).norm() > 0.1 * true.norm()


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_gradients_of_probabilities_that_they_cannot_hold(dtype, schedule):
    """Probabilities of about 1e-8, under a loss scale: fp16 has 6e-8 between two numbers there."""
    query, key, _ = make_inputs((2, 40, 64), "none", dtype)
    inputs = (query, (query.detach() + 0.05 * key.detach()).requires_grad_(), None)
    found = kernel_results(inputs, schedule, upstream((2, 40)) * 1e6, tau=0.05)
    assert_within_budget(found, inputs, 1e6, tau=0.05)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_weights_are_exact_even_where_similarities_differ_by_hundreds(dtype, schedule):
    """Opposite features at tau 0.01: a_ii = 100, a_ij = -100. With w = 0: log(e^{-100} / 2) - 100."""
    query = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=dtype, requires_grad=True)
    inputs = (query, query.detach().clone().requires_grad_(), torch.zeros(1, 2))
    loss, grad_query, grad_key = kernel_results(inputs, schedule, torch.ones(1, 2), tau=0.01)
    torch.testing.assert_close(loss, torch.full((1, 2), -200 - math.log(2)))
    # All of row i's mass lies on the other position: dL_i/dq_i = (k_j - k_i) / tau, and the same for the keys.
    expected = torch.tensor([[[-200.0, 0.0], [200.0, 0.0]]], dtype=dtype)
    torch.testing.assert_close(grad_query, expected)
    torch.testing.assert_close(grad_key, expected)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
def test_a_single_position_has_no_negatives_and_no_gradient(weight, dtype, schedule):
    query, key, _ = make_inputs((3, 1, 5), "none", dtype)
    inputs = (query, key, None if weight is None else torch.full((3, 1), weight))
    loss, *gradients = kernel_results(inputs, schedule)
    expected = math.log(torch.finfo(torch.float32).tiny if weight == 0 else weight or 1.0)
    torch.testing.assert_close(loss, torch.full((3, 1), expected))
    assert not any(gradient.any() for gradient in gradients)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_features_give_the_logarithm_of_the_length_and_no_gradient(value, dtype, schedule):
    query, key = (torch.full((1, 70, 16), value, dtype=dtype, requires_grad=True) for _ in range(2))
    for weight, expected in ((None, math.log(70)), (1 / 70, 0.0), (0.0, math.log(69 / 70))):
        inputs = (query, key, None if weight is None else torch.full((1, 70), weight))
        loss, *gradients = kernel_results(inputs, schedule, torch.ones(1, 70))
        torch.testing.assert_close(loss, torch.full((1, 70), expected), rtol=1e-5, atol=1e-5)
        atol = 12 * torch.finfo(dtype).eps * value / 0.07
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=atol)


@needs_kernels
@every_schedule
@pytest.mark.parametrize(("shape", "chunk"), [((2, 140, 20), 48), ((5, 17, 20), 40), ((1, 190, 20), 128)])
def test_chunks_and_parts_of_keys_change_nothing_but_the_rounding(shape, chunk, schedule, monkeypatch):
    from regvq_fast.kernels import weighted_info_nce as module

    inputs = make_inputs(shape, "with zeros", torch.float32)
    expected = kernel_results(inputs, schedule)
    patch_dispatch(monkeypatch, "chunk_rows", lambda length: chunk)
    patch_dispatch(monkeypatch, "codes_per_split", lambda rows, keys, tile, least, device: tile.BN)
    assert len(module.image_chunks(*shape[:2], chunk)) > 1
    found = kernel_results(inputs, schedule)
    assert_within_budget(found, inputs)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=2e-5)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss_scale", [65536.0, 1e-6])
def test_a_loss_scale_costs_no_digits(loss_scale, dtype, schedule):
    """The mean loss times 65536, as a gradient scaler has it, and times 1e-6, under everything that fp16 resolves."""
    inputs = make_inputs((2, 60, 32), "random", dtype)
    scale = loss_scale / 120
    found = kernel_results(inputs, schedule, upstream((2, 60)) * scale)
    assert_within_budget(found, inputs, scale)


@needs_kernels
@every_schedule
def test_an_overflowed_gradient_is_not_hidden(schedule):
    """Inf or nan in the gradient of one loss: a gradient scaler must see it."""
    for bad in (torch.inf, torch.nan):
        grad_loss = upstream((2, 20)).index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(bad).double())
        for dtype in FLOATS:
            gradients = kernel_results(make_inputs((2, 20, 8), "random", dtype), schedule, grad_loss)[1:]
            assert not any(gradient.isfinite().all() for gradient in gradients)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_alignment_of_the_inputs_do_not_matter(dtype, schedule):
    inputs = make_inputs((2, 40, 16), "random", dtype)
    expected = kernel_results(inputs, schedule)

    def strided(value: Tensor) -> Tensor:
        """Dimensions in reverse order in memory, every other element of the images, an odd start."""
        memory = torch.empty(*value.shape[:0:-1], 2 * value.shape[0] + 1, dtype=value.dtype)
        view = memory.permute(*reversed(range(value.ndim)))[1::2]
        return view.copy_(value.detach()).requires_grad_(value.requires_grad)

    assert not strided(inputs[0]).is_contiguous()
    assert all(map(torch.equal, kernel_results(of_all(strided, inputs), schedule), expected))


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_have_any_type(dtype, schedule):
    query, key, weight = make_inputs((2, 20, 8), "with zeros", torch.float16)
    found, expected = (
        kernel_results((query, key, value), schedule) for value in (weight.to(dtype), weight.to(dtype).float())
    )
    assert all(map(torch.equal, found, expected))


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_runs_give_the_same_bits(dtype, schedule):
    inputs = make_inputs((2, 70, 24), "random", dtype)
    assert all(map(torch.equal, kernel_results(inputs, schedule), kernel_results(inputs, schedule)))


@needs_kernels
@every_schedule
@pytest.mark.parametrize("trained", ["query", "key"])
def test_a_frozen_side_gets_no_gradient_and_costs_no_product(trained, schedule, monkeypatch):
    from regvq_fast.kernels import weighted_info_nce as module

    inputs = make_inputs((2, 40, 16), "random", torch.float32)
    side = ("query", "key").index(trained)
    expected = kernel_results(inputs, schedule)[1 + side]
    products = []
    monkeypatch.setattr(
        module,
        "product_fp32",
        lambda a, b, multiply=module.product_fp32: products.append((a.shape, b.shape)) or multiply(a, b),
    )
    with kernels(schedule):
        leaves = [surrounded(value.detach()).requires_grad_(i == side) for i, value in enumerate(inputs)]
        loss = weighted_info_nce(*leaves, impl="triton")
        loss.backward(upstream(loss.shape).to(loss))
    assert torch.equal(leaves[side].grad.cpu(), expected)
    assert leaves[1 - side].grad is None
    assert len(products) == (1 if schedule == "fused" else 3)  # chunked: the similarities too, forward and backward


@needs_kernels
@every_schedule
@pytest.mark.parametrize("weights", ["none", "random"])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_without_images_positions_or_channels(shape, weights, schedule):
    query, key = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    inputs = (query, key, None if weights == "none" else torch.full(shape[:2], 0.25))
    found = kernel_results(inputs, schedule)
    for value, other in zip(found, results(weighted_info_nce, inputs, impl="eager"), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("weights", ["none", "random"])
def test_opcheck(weights):
    query, key, weight = of_all(lambda value: value.to(DEVICE), make_inputs((2, 6, 4), weights, torch.float32))
    leaves = [value.detach().requires_grad_() for value in (query, key)]
    torch.library.opcheck(torch.ops.regvq.weighted_info_nce, (*leaves, weight, 0.07, False, "triton"))
    with torch.no_grad():
        loss, *saved = torch.ops.regvq.weighted_info_nce(*leaves, weight, 0.07, False, "triton")
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (loss, query.detach(), key.detach(), *saved, 0.07, "triton", *needs)
        torch.library.opcheck(torch.ops.regvq.weighted_info_nce_backward, arguments)
