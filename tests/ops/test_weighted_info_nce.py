"""``weighted_info_nce`` against hand-worked numbers, cross-entropy, the literal Eq. 3 and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.info_nce_cases import make_inputs
from torch import Tensor

from regvq_fast.ops import tiling, weighted_info_nce
from regvq_fast.ops.reference import weighted_info_nce_reference

SHAPES = [(1, 1, 1), (2, 2, 3), (3, 17, 5), (1, 40, 8)]
WEIGHTS = ("none", "uniform", "random", "with zeros")


def loss_and_gradients(op, query: Tensor, key: Tensor, weight: Tensor | None, **settings) -> tuple[Tensor, ...]:
    loss = op(query, key, weight, **settings)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (query, key), upstream)


def assert_same(results, expected, tolerance=1e-12) -> None:
    for value, other in zip(results, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max())))


def test_by_hand():
    """Two positions, features (1, 0) and (0, 1), tau 1/2: a = [[2, 0], [0, 2]]; weights 1/4 and 3/4."""
    features = torch.eye(2, dtype=torch.float64)[None]
    vanilla = weighted_info_nce(features, features, tau=0.5)
    torch.testing.assert_close(vanilla, torch.full((1, 2), math.log(math.e**2 + 1) - 2, dtype=torch.float64))
    weight = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    expected = torch.tensor([[math.log(w * math.e**2 + 0.5) - 2 for w in (0.25, 0.75)]], dtype=torch.float64)
    torch.testing.assert_close(weighted_info_nce(features, features, weight, tau=0.5), expected)


@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0, tiling.KEPT_ELEMENTS])
def test_values_and_gradients_equal_autograd_of_the_reference(monkeypatch, kept, shape, weights, tau):
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", kept)
    inputs = make_inputs(shape, weights)
    results = loss_and_gradients(weighted_info_nce, *inputs, tau=tau)
    assert_same(results, loss_and_gradients(weighted_info_nce_reference, *inputs, tau=tau))


@pytest.mark.parametrize("weights", ["none", "random"])
def test_gradcheck(weights):
    query, key, weight = make_inputs((2, 5, 3), weights)
    assert torch.autograd.gradcheck(lambda q, k: weighted_info_nce(q, k, weight, tau=0.3), (query, key))


def test_without_weight_it_is_cross_entropy():
    query, key, _ = make_inputs((3, 11, 6))

    def cross_entropy(query, key, weight, tau):
        targets = torch.arange(11).expand(3, 11)
        return F.cross_entropy((query @ key.mT / tau).mT, targets, reduction="none")

    results = loss_and_gradients(weighted_info_nce, query, key, None, tau=0.1)
    assert_same(results, loss_and_gradients(cross_entropy, query, key, None, tau=0.1))


def test_the_gradient_is_that_of_equation_3_with_its_constant():
    """Eq. 3 to the letter: -sum_i log( w_i e^{a_ii} / (w_i e^{a_ii} + 1/L sum_{j != i} e^{a_ij}) ), w > 0."""
    query, key, weight = make_inputs((1, 13, 6), "random")
    tau, length = 0.2, 13
    terms = []
    for i in range(length):
        positive = weight[0, i] * (query[0, i] @ key[0, i] / tau).exp()
        negatives = sum((query[0, i] @ key[0, j] / tau).exp() for j in range(length) if j != i) / length
        terms.append(-torch.log(positive / (positive + negatives)))
    literal = torch.stack(terms)
    expected = torch.autograd.grad(literal.sum(), (query, key))
    loss = weighted_info_nce(query, key, weight, tau=tau)
    torch.testing.assert_close(loss[0], literal + weight[0].log())
    assert_same(torch.autograd.grad(loss.sum(), (query, key)), expected)


def test_a_larger_weight_is_a_weaker_pull():
    query, key, _ = make_inputs((1, 8, 4))

    def pull(weight):
        loss = weighted_info_nce(query, key, torch.full((1, 8), weight, dtype=torch.float64), tau=0.5).sum()
        # dL_i / da_ii, summed: what moves a key along its own query.
        (gradient,) = torch.autograd.grad(loss, key)
        return -(gradient * query).sum()

    assert pull(0.0) > pull(0.125) > pull(0.5)


def test_uniform_weights_give_length_times_the_gradient_of_the_mean_vanilla_loss():
    query, key, weight = make_inputs((1, 12, 5), "uniform")
    summed = torch.autograd.grad(weighted_info_nce(query, key, weight).sum(), (query, key))
    mean = torch.autograd.grad(weighted_info_nce(query, key).mean(), (query, key))
    assert_same(summed, [12 * value for value in mean])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weights_are_exact_even_where_similarities_differ_by_hundreds(dtype):
    """Opposite features at tau 0.01: a_ii = 100, a_ij = -100. With w = 0: log(e^{-100} / 2) - 100."""
    query = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=dtype, requires_grad=True)
    weight = torch.zeros(1, 2, dtype=dtype)
    loss = weighted_info_nce(query, query.detach(), weight, tau=0.01)
    torch.testing.assert_close(loss, torch.full((1, 2), -200 - math.log(2), dtype=dtype))
    # All of row i's mass lies on the other position: dL_i/dq_i = (k_j - k_i) / tau.
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    torch.testing.assert_close(gradient, torch.tensor([[[-200.0, 0.0], [200.0, 0.0]]], dtype=dtype))


@pytest.mark.parametrize("weights", ["none", "random", "with zeros"])
def test_an_order_of_positions_changes_nothing_but_the_order(weights):
    query, key, weight = make_inputs((2, 10, 4), weights)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shuffled = weighted_info_nce(query[:, order], key[:, order], None if weight is None else weight[:, order])
    torch.testing.assert_close(shuffled, weighted_info_nce(query, key, weight)[:, order])


def test_images_do_not_see_each_other():
    query, key, weight = make_inputs((3, 7, 4))
    together = weighted_info_nce(query, key, weight)
    for i in range(3):
        alone = weighted_info_nce(query[i : i + 1], key[i : i + 1], weight[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
def test_a_single_position_has_no_negatives_and_no_gradient(weight):
    features = torch.tensor([[[0.6, 0.8]]], requires_grad=True)
    loss = weighted_info_nce(features, features.detach(), None if weight is None else torch.tensor([[weight]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    if weight != 0:
        torch.testing.assert_close(loss, torch.tensor([[math.log(weight or 1.0)]]))
    torch.testing.assert_close(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_features_give_the_logarithm_of_the_length(value):
    features = torch.full((1, 6, 4), value, requires_grad=True)
    loss = weighted_info_nce(features, features.detach())
    torch.testing.assert_close(loss, torch.full((1, 6), math.log(6)))
    loss.sum().backward()
    torch.testing.assert_close(features.grad, torch.zeros_like(features), rtol=0, atol=2e-5)


@pytest.mark.parametrize("trained", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_the_other_its_own(trained):
    query, key, weight = make_inputs()
    expected = torch.autograd.grad(weighted_info_nce(query, key, weight).sum(), (query, key))[trained]
    sides = [query.detach(), key.detach()]
    sides[trained].requires_grad_()
    weighted_info_nce(*sides, weight.requires_grad_()).sum().backward()
    torch.testing.assert_close(sides[trained].grad, expected, rtol=0, atol=0)
    assert sides[1 - trained].grad is None
    assert weight.grad is None


@pytest.mark.parametrize("weights", ["none", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_at_most_that_of_plain_pytorch_in_the_same_type(dtype, weights):
    query, key, weight = make_inputs((2, 33, 8), weights, dtype)
    exact = [value.detach().double().requires_grad_() for value in (query, key)]
    truth = loss_and_gradients(weighted_info_nce_reference, *exact, weight)
    ours = loss_and_gradients(weighted_info_nce, query, key, weight)
    plain = loss_and_gradients(weighted_info_nce_reference, query, key, None if weight is None else weight.to(dtype))
    assert ours[0].dtype == torch.float32
    for value, other, true in zip(ours, plain, truth, strict=True):
        error, allowed = ((v.double() - true).abs().max() / true.abs().max() for v in (value, other))
        assert error <= allowed + 2 * torch.finfo(dtype).eps


def test_tiles_and_strides_do_not_matter(monkeypatch):
    query, key, weight = make_inputs((2, 40, 6))
    expected = loss_and_gradients(weighted_info_nce, query, key, weight)
    strided = [value.detach().mT.contiguous().mT.requires_grad_() for value in (query, key)]
    assert_same(loss_and_gradients(weighted_info_nce, *strided, weight.t().contiguous().t()), expected)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    for kept in (tiling.KEPT_ELEMENTS, 0):
        monkeypatch.setattr(tiling, "KEPT_ELEMENTS", kept)
        assert_same(loss_and_gradients(weighted_info_nce, query, key, weight), expected)


def test_two_runs_give_the_same_bits():
    inputs = make_inputs((2, 200, 16), dtype=torch.float32)
    first = loss_and_gradients(weighted_info_nce, *inputs)
    assert all(map(torch.equal, first, loss_and_gradients(weighted_info_nce, *inputs)))


def test_only_few_similarities_are_kept_for_the_backward(monkeypatch):
    inputs = make_inputs((2, 300, 4), dtype=torch.float32)

    def largest_saved():
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            weighted_info_nce(*inputs)
        return max(saved)

    assert largest_saved() == 2 * 300 * 300 <= tiling.KEPT_ELEMENTS
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", 2 * 300 * 300 - 1)
    assert largest_saved() == 2 * 300 * 4


def test_a_backward_leaves_what_was_kept_to_the_next_one():
    query, key, weight = make_inputs()
    loss = weighted_info_nce(query, key, weight).sum()
    first, second = (torch.autograd.grad(loss, key, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("weights", ["none", "random"])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_no_images_or_no_positions_give_an_empty_loss(shape, weights):
    query = torch.zeros(shape, requires_grad=True)
    loss = weighted_info_nce(query, query.detach(), None if weights == "none" else torch.zeros(shape[:2]))
    assert loss.shape == shape[:2]
    loss.sum().backward()
    assert query.grad.shape == shape


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    query, key = (torch.randn(1, 5, 3, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(weighted_info_nce(query, key).square().sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        gradient.sum().backward()
