"""Entropy and mean of softmax rows against the plain expression, in tiles and as part of one graph."""

import math

import pytest
import torch
import torch.nn.functional as F

from regvq_fast.ops import softmax_statistics, tiling


def plain(x, weight, bias=None, *, temperature=1.0):
    log_p = F.log_softmax(F.linear(x, weight, bias) / temperature, dim=1)
    return -(log_p.exp() * log_p).sum(1).mean(), log_p.exp().mean(0)


def leaves(num_rows=50, num_codes=7, width=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_rows, width), (num_codes, width), (num_codes,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def test_by_hand():
    x, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[math.log(3.0)], [0.0]])
    entropy, mean = softmax_statistics(x, weight)  # p: (3/4, 1/4) and (1/2, 1/2)
    assert mean.tolist() == pytest.approx([0.625, 0.375])
    expected = (-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + math.log(2)) / 2
    assert entropy.item() == pytest.approx(expected)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_the_whole_matrix(has_bias, tile_rows, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", tile_rows)
    inputs = leaves()[: 3 if has_bias else 2]
    found, expected = softmax_statistics(*inputs, temperature=0.6), plain(*inputs, temperature=0.6)
    torch.testing.assert_close(found, expected)
    upstream = [torch.tensor(0.7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_means_over_valid_rows_are_those_without_the_others(tile_rows, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", tile_rows)
    x, weight, bias = leaves()
    valid = torch.arange(50) % 3 != 0
    found = softmax_statistics(x, weight, bias, valid=valid, temperature=0.6)
    expected = plain(x[valid], weight, bias, temperature=0.6)
    torch.testing.assert_close(found, expected)
    upstream = [torch.tensor(0.7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    gradients = torch.autograd.grad(found, (x, weight, bias), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, weight, bias), upstream))
    assert (gradients[0][~valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_rows_valid_is_no_valid_to_the_bit_and_none_gives_zeros(dtype):
    def results(valid):
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves()]
        entropy, mean = softmax_statistics(*inputs, valid=valid, temperature=0.6)
        return entropy, mean, *torch.autograd.grad(entropy + mean.square().sum(), inputs)

    assert all(map(torch.equal, results(torch.ones(50, dtype=torch.bool)), results(None)))
    assert all((value == 0).all() for value in results(torch.zeros(50, dtype=torch.bool)))


def test_gradcheck():
    assert torch.autograd.gradcheck(softmax_statistics, leaves(6, 5, 3))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_one_output_to_one_input(used, trained):
    inputs = [leaf.detach().requires_grad_(i == trained) for i, leaf in enumerate(leaves())]
    grads = [
        torch.autograd.grad(op(*inputs)[used].square().sum(), inputs[trained]) for op in (softmax_statistics, plain)
    ]
    torch.testing.assert_close(*grads)


def test_sharp_softmaxes_stay_finite():
    x, weight, bias = leaves(dtype=torch.float32)
    entropy, mean = softmax_statistics(x, weight, bias, temperature=1e-4)
    gradients = torch.autograd.grad(entropy + mean.square().sum(), [x, weight, bias])
    assert entropy >= 0
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_err_no_more_than_plain_pytorch(dtype):
    inputs = [leaf.detach().to(dtype) for leaf in leaves(200, 64, 16)]
    truth = plain(*(leaf.double() for leaf in inputs))
    for found, low, exact in zip(softmax_statistics(*inputs), plain(*inputs), truth, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= (low - exact).abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = [leaf.detach().to(dtype) for leaf in leaves(8, 5, 3)]
    for bias, valid in ((tensors[2], None), (None, torch.arange(8) % 3 != 0)):
        trained = [None if t is None else t.clone().requires_grad_() for t in (*tensors[:2], bias)]
        torch.library.opcheck(torch.ops.regvq.softmax_statistics, (*trained, valid, 0.7))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.regvq.softmax_statistics_backward,
                (torch.tensor(0.3), torch.randn(5), *tensors[:2], bias, valid, 0.7, *needs),
            )


def test_part_of_one_graph_and_the_same_bits_twice():
    def step(x, weight, bias):
        entropy, mean = softmax_statistics(x * 1.5, weight, bias)
        return entropy + mean.square().sum()

    inputs = leaves(dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    first, again, graph = (torch.autograd.grad(f(*inputs), inputs) for f in (step, step, compiled))
    for one, two, three in zip(first, again, graph, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three)


def test_autocast_computes_in_fp32():
    x, weight, bias = leaves(dtype=torch.float32)
    expected = softmax_statistics(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(softmax_statistics(x, weight, bias)[0], expected[0])


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    inputs = leaves()
    (gradient,) = torch.autograd.grad(softmax_statistics(*inputs)[0].square(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        gradient.sum().backward()
