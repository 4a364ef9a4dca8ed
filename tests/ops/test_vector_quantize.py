"""Values and gradients of ``vector_quantize`` against hand-worked tables, the written-out formulas and autograd."""

import math

import pytest
import torch
from helpers.vq_cases import (
    LOGITS,
    MASKS,
    SEED,
    assert_same,
    copy_leaves,
    make_inputs,
    outputs_and_gradients,
    upstream,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.reference import vector_quantize_reference

CODEBOOK_GRADS = ("soft", "hard", "none")

# ------------------------------------------------------------------------------------------------ hand-worked tables


@pytest.mark.parametrize(
    ("codebook_grad", "grad_codebook"),
    # soft: p^T dQ = (1/3 + 2/4, 1/3 + 2/2, 1/3 + 2/4); hard: 1 to code 0 and 2 to code 1.
    [("soft", [5 / 6, 4 / 3, 5 / 6]), ("hard", [1.0, 2.0, 0.0]), ("none", [0.0, 0.0, 0.0])],
)
def test_linear_logits_by_hand(codebook_grad, grad_codebook):
    """Two rows, three codes, D = 1. Scores x W: row 0 (0, 0, 0), row 1 (0, log 2, 0); p = (1, 1, 1)/3, (1, 2, 1)/4."""

    def column(*values):
        return torch.tensor(values, dtype=torch.float64).unsqueeze(1).requires_grad_()

    x, codebook, weight = column(0, math.log(2)), column(0, 1, 3), column(0, 1, 0)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    output = vector_quantize(x, codebook, weight=weight, bias=bias, codebook_grad=codebook_grad)

    assert output.indices.tolist() == [0, 1]  # row 0 is a tie of all three
    assert output.best_indices.tolist() == [0, 1]
    assert output.quantized.flatten().tolist() == [0, 1]
    assert output.posterior.tolist() == [[0.5, 0.5, 0]]
    assert output.perturbation.tolist() == [0, 0]

    # dQ = (1, 2), dA = (1, 0, 0): dP = (0.5, 1, 3) and (0.5, 2, 6), with means 1.5 and 2.625 under p.
    loss = output.quantized[0, 0] + 2 * output.quantized[1, 0] + output.posterior[0, 0]
    loss.backward()
    row_0, row_1 = torch.tensor([[-1 / 3, -1 / 6, 1 / 2], [-0.53125, -0.3125, 0.84375]], dtype=torch.float64)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([-1 / 6, -0.3125], dtype=torch.float64))
    torch.testing.assert_close(weight.grad.flatten(), math.log(2) * row_1)
    torch.testing.assert_close(bias.grad, row_0 + row_1)
    torch.testing.assert_close(codebook.grad.flatten(), torch.tensor(grad_codebook, dtype=torch.float64))


@pytest.mark.parametrize(
    ("codebook_grad", "grad_codebook"), [("soft", [-0.5, -0.5]), ("hard", [0.0, -1.0]), ("none", [-1.0, -1.0])]
)
def test_distance_logits_by_hand(codebook_grad, grad_codebook):
    """x = 0 between codes 1 and -1: p = (1, 1)/2, dP = (1, -1), dS = (1, -1)/2, dx = 2 dS.Z = 2, dZ = -2 dS Z."""
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    codebook = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    output = vector_quantize(x, codebook, codebook_grad=codebook_grad)
    assert output.indices.tolist() == [0]
    assert output.posterior.tolist() == [[1, 0]]
    output.quantized.sum().backward()
    assert x.grad.tolist() == [[2]]
    torch.testing.assert_close(codebook.grad.flatten(), torch.tensor(grad_codebook, dtype=torch.float64))


def test_a_stochastic_row_by_hand():
    """One row with equal scores: the noise alone chooses, and the distance to the best code is the perturbation."""
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    noise = gumbel_noise(SEED, torch.tensor([40]), 4)[0]
    output = vector_quantize(
        torch.zeros(1, 2), codebook, mask=torch.ones(1, dtype=torch.bool), seed=SEED, row_offset=40
    )
    chosen = int(noise.argmax())
    assert output.indices.item() == chosen
    assert output.best_indices.item() == 0
    assert output.perturbation.item() == [0, 2, 4, 2][chosen]


# --------------------------------------------------------------------------------------------- formulas and autograd


@pytest.mark.parametrize("codebook_grad", CODEBOOK_GRADS)
@pytest.mark.parametrize("logits", LOGITS)
def test_gradients_are_the_written_out_formulas(logits, codebook_grad):
    """DESIGN 2.1 to 2.4, one sum at a time."""
    groups, scale, tau = 3, 1.7, 0.6
    inputs = make_inputs(logits, "random", num_rows=12, num_codes=7, width=4)
    settings_ = {"scale": scale, "tau": tau, "groups": groups, "codebook_grad": codebook_grad}
    results = outputs_and_gradients(vector_quantize, inputs, **settings_)

    x, codebook, mask = inputs["x"].detach(), inputs["codebook"].detach(), inputs["mask"]
    weight = inputs["weight"].detach() if "weight" in inputs else None
    grad_quantized, grad_posterior = upstream(12, 4, groups, 7)
    rows_of_group = 12 // groups
    noise = gumbel_noise(SEED, torch.arange(12), 7)
    expected = {name: torch.zeros_like(value) for name, value in results.items()}
    for m in range(12):
        if weight is None:
            s = -scale * (x[m] - codebook).square().sum(1)
        else:
            s = scale * weight @ x[m] + (inputs["bias"].detach() if "bias" in inputs else 0)
        a = s + noise[m].double() if mask[m] else s
        t = tau if mask[m] else 1.0
        index, best = int(a.argmax()), int(s.argmax())
        p = (a / t).exp() / (a / t).exp().sum()
        expected["indices"][m], expected["best_indices"][m] = index, best
        expected["quantized"][m] = codebook[index]
        expected["perturbation"][m] = (codebook[index] - codebook[best]).square().sum()
        expected["posterior"][m // rows_of_group, index] += 1 / rows_of_group

        dp = codebook @ grad_quantized[m] + grad_posterior[m // rows_of_group] / rows_of_group
        ds = p * (dp - (p * dp).sum()) / t
        if weight is None:
            expected["d x"][m] = 2 * scale * ds @ codebook
            expected["d codebook"] += 2 * scale * ds[:, None] * (x[m] - codebook)
        else:
            expected["d x"][m] = scale * ds @ weight
            expected["d weight"] += scale * ds[:, None] * x[m]
            if "bias" in inputs:
                expected["d bias"] += ds
        if codebook_grad == "soft":
            expected["d codebook"] += p[:, None] * grad_quantized[m]
        elif codebook_grad == "hard":
            expected["d codebook"][index] += grad_quantized[m]
    assert_same(results, expected)


@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("codebook_grad", CODEBOOK_GRADS)
@pytest.mark.parametrize("logits", LOGITS)
def test_values_and_gradients_equal_autograd_of_the_surrogate(logits, codebook_grad, mask, groups):
    inputs = make_inputs(logits, mask)
    settings_ = {"scale": 1.3, "tau": 0.9, "groups": groups, "codebook_grad": codebook_grad, "row_offset": 1000}
    results = outputs_and_gradients(vector_quantize, inputs, **settings_)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, **settings_))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_and_setting_equals_the_reference(data):
    groups = data.draw(st.integers(1, 5), "groups")
    inputs = make_inputs(
        data.draw(st.sampled_from(LOGITS), "logits"),
        data.draw(st.sampled_from(MASKS), "mask"),
        num_rows=groups * data.draw(st.integers(1, 9), "rows of a group"),
        num_codes=data.draw(st.integers(1, 40), "codes"),
        width=data.draw(st.integers(1, 9), "width"),
        seed=data.draw(st.integers(0, 99), "inputs"),
    )
    if data.draw(st.booleans(), "valid"):
        inputs["valid"] = torch.rand(len(inputs["x"]), generator=torch.Generator().manual_seed(0)) < 0.6
    settings_ = {
        "scale": data.draw(st.floats(0.01, 10), "scale"),
        "tau": data.draw(st.floats(0.05, 10), "tau"),
        "groups": groups,
        "codebook_grad": data.draw(st.sampled_from(CODEBOOK_GRADS), "codebook_grad"),
        "row_offset": data.draw(st.integers(0, 1 << 40), "row_offset"),
    }
    results = outputs_and_gradients(vector_quantize, inputs, **settings_)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, **settings_), tolerance=1e-10)


@pytest.mark.parametrize("tau", [0.05, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_extreme_temperatures_and_scales(tau, scale):
    inputs = make_inputs(mask="all")
    results = outputs_and_gradients(vector_quantize, inputs, tau=tau, scale=scale)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, tau=tau, scale=scale), 1e-11)
    single = outputs_and_gradients(vector_quantize, copy_leaves(inputs, torch.float32), tau=tau, scale=scale)
    assert all(value.isfinite().all() for value in single.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tau_as_a_tensor_equals_tau_as_a_number(dtype):
    inputs = make_inputs()
    results = outputs_and_gradients(vector_quantize, inputs, tau=torch.tensor(0.625, dtype=dtype))
    assert_same(results, outputs_and_gradients(vector_quantize, inputs, tau=0.625), 0)


def test_the_gradient_of_a_prior_on_the_posterior_equals_the_reference():
    """KL(posterior || uniform) per group; unused codes have posterior 0, where the gradient's logarithm is floored."""
    inputs = make_inputs(num_codes=40)

    def kl_gradient(op):
        posterior = op(**inputs, groups=4).posterior
        kl = (posterior * (40 * posterior.clamp(min=1e-12)).log()).sum(1).mean()
        return torch.autograd.grad(kl, [inputs["x"], inputs["codebook"]])

    ours, expected = kl_gradient(vector_quantize), kl_gradient(vector_quantize_reference)
    for a, b in zip(ours, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


# ------------------------------------------------------------------------------------------------- which gradients


@pytest.mark.parametrize("use", [("quantized",), ("posterior",)])
@pytest.mark.parametrize("codebook_grad", CODEBOOK_GRADS)
def test_one_of_the_two_outputs_alone_carries_its_gradient(codebook_grad, use):
    inputs = make_inputs("linear with bias")
    results = outputs_and_gradients(vector_quantize, inputs, use, codebook_grad=codebook_grad)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, use, codebook_grad=codebook_grad))


@pytest.mark.parametrize("trained", ["x", "codebook", "weight", "bias"])
@pytest.mark.parametrize("codebook_grad", CODEBOOK_GRADS)
def test_a_single_trained_input_gets_its_whole_gradient(trained, codebook_grad):
    inputs = make_inputs("linear with bias")
    expected = outputs_and_gradients(vector_quantize, inputs, codebook_grad=codebook_grad)
    frozen = {name: value.detach() if value.is_floating_point() else value for name, value in inputs.items()}
    frozen[trained] = frozen[trained].clone().requires_grad_()
    results = outputs_and_gradients(vector_quantize, frozen, codebook_grad=codebook_grad)
    assert [name for name in results if name.startswith("d ")] == [f"d {trained}"]
    assert torch.equal(results[f"d {trained}"], expected[f"d {trained}"])


def test_indices_and_perturbation_carry_no_gradient():
    output = vector_quantize(**make_inputs())
    assert [value.requires_grad for value in output] == [True, True, False, False, False]
    without = vector_quantize(**{n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in make_inputs().items()})
    assert not any(value.requires_grad for value in without)


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    inputs = make_inputs()
    loss = vector_quantize(**inputs).quantized.square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        gradient.sum().backward()
