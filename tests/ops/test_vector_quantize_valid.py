"""Rows of ``vector_quantize`` that count in no posterior, such as padding: in PyTorch and in the kernels."""

import pytest
import torch
from helpers.kernel_cases import (
    FLOATS,
    every_schedule,
    if_kernels_are_elsewhere,
    needs_kernels,
    pass_in_the_interpreter,
)
from helpers.vq_cases import LOGITS, assert_same, make_inputs, outputs_and_gradients
from helpers.vq_kernel_cases import (
    Case,
    assert_gradients,
    assert_outputs,
    assert_splits_and_chunks_agree,
    kernel_results,
)

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.reference import vector_quantize_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")


@if_kernels_are_elsewhere
@pytest.mark.slow
def test_this_file_passes_in_the_interpreter():
    pytest.importorskip("triton")
    pass_in_the_interpreter(__file__)


def test_by_hand():
    """Four rows, three codes 0, 1, 3 of one channel, two groups: the second row of each doesn't count."""
    x = torch.tensor([[0.1], [2.9], [1.2], [0.9]], dtype=torch.float64, requires_grad=True)
    codebook = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    valid = torch.tensor([True, False, True, False])
    output = vector_quantize(x, codebook, valid=valid, groups=2)
    assert output.indices.tolist() == [0, 2, 1, 1]
    assert output.quantized.flatten().tolist() == [0, 3, 1, 1]
    assert output.posterior.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert vector_quantize(x, codebook, valid=valid).posterior.tolist() == [[0.5, 0.5, 0]]

    # A gradient of 1 to code 0 of the first group: dS = p_0 (1 - p_0) in its one valid row, dx = 2 (dS - p dS) Z.
    (gradient,) = torch.autograd.grad(output.posterior[0, 0], x)
    p = (-(0.1 - codebook.flatten()).square()).softmax(0)
    expected = 2 * p[0] * (0 - (p * codebook.flatten()).sum())
    torch.testing.assert_close(gradient.flatten(), torch.stack([expected, *3 * [torch.zeros_like(expected)]]))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
@pytest.mark.parametrize("logits", LOGITS)
def test_values_and_gradients_equal_autograd_of_the_surrogate(logits, codebook_grad, groups):
    inputs = make_inputs(logits) | {"valid": torch.arange(24) % 3 != 1}
    inputs["valid"][6:12] = False  # the second of four groups has none
    arguments = {"groups": groups, "codebook_grad": codebook_grad, "row_offset": 1000}
    results = outputs_and_gradients(vector_quantize, inputs, **arguments)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, **arguments))
    everything = vector_quantize(**inputs | {"valid": None}, row_offset=1000)
    for name in ("quantized", "indices", "best_indices", "perturbation"):
        assert torch.equal(results[name], getattr(everything, name))


def test_a_valid_beginning_is_the_call_without_the_rest():
    inputs = make_inputs(num_rows=40)
    inputs["valid"] = torch.arange(40) < 25
    few = inputs | {"x": inputs["x"][:25], "mask": inputs["mask"][:25], "valid": None}
    padded, plain = vector_quantize(**inputs), vector_quantize(**few)
    assert torch.equal(padded.posterior, plain.posterior)
    leaves = [inputs["x"], inputs["codebook"]]
    for value, other in zip(
        torch.autograd.grad(padded.posterior.square().sum() + padded.quantized[:25].square().sum(), leaves),
        torch.autograd.grad(plain.posterior.square().sum() + plain.quantized.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_rows_valid_is_no_valid_to_the_bit(dtype, groups):
    inputs = make_inputs(num_rows=150, dtype=dtype)
    valid = inputs | {"valid": torch.ones(150, dtype=torch.bool)}
    expected = outputs_and_gradients(vector_quantize, inputs, groups=groups)
    assert_same(outputs_and_gradients(vector_quantize, valid, groups=groups), expected, 0)


def test_the_leading_shape_and_no_rows():
    inputs = make_inputs() | {"valid": torch.arange(24) % 3 != 1}
    shaped = {name: value.unflatten(0, (2, 3, 4)) for name, value in inputs.items() if name in ("x", "mask", "valid")}
    assert torch.equal(vector_quantize(**inputs | shaped).posterior, vector_quantize(**inputs).posterior)
    nothing = vector_quantize(inputs["x"][:0], inputs["codebook"], valid=inputs["valid"][:0], groups=2)
    assert nothing.posterior.tolist() == [[0] * 11] * 2


# ----------------------------------------------------------------------------------------------------------- kernels

CASES = (
    Case(15, 17, 127, "linear with bias", "random", 3, 10.0),
    Case(257, 127, 64, "linear", "no mask", 1, 0.9, 1.0, "none", torch.bfloat16),
    Case(128, 256, 33, "distance", "random", 4, dtype=torch.bfloat16),
    Case(150, 70, 9, "distance", "all", 150, 0.3, dtype=torch.float16),
    Case(127, 257, 17, "distance", "random", 1, 0.5, 0.3, "hard"),
)


def with_valid(case, inputs):
    """A third of the rows doesn't count, nor does any of the last group."""
    inputs["valid"] = torch.arange(case.num_rows) % 3 != 1
    inputs["valid"][case.num_rows - case.num_rows // case.groups if case.groups > 1 else case.num_rows :] = False
    return inputs


@needs_kernels
@every_schedule
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype in FLOATS], ids=str)
def test_kernels_are_within_the_error_budget(case, schedule):
    inputs = with_valid(case, case.inputs())
    for use in (("quantized", "posterior"), ("posterior",)):
        results = kernel_results(inputs, schedule, use, **case.settings())
        assert_outputs(results, inputs, **case.settings())
        assert_gradients(results, inputs, use, **case.settings())


@needs_kernels
@every_schedule
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels_with_all_rows_valid_give_the_bits_of_no_valid(dtype, groups, schedule):
    inputs = Case(150, 70, 9, dtype=dtype).inputs()
    expected = kernel_results(inputs, schedule, groups=groups)
    valid = inputs | {"valid": torch.ones(150, dtype=torch.bool)}
    assert_same(kernel_results(valid, schedule, groups=groups), expected, 0)


@needs_kernels
@every_schedule
def test_kernels_with_splits_and_chunks(schedule, monkeypatch):
    case = Case(260, 300, 9, "linear with bias", groups=5, dtype=torch.float16)
    inputs = with_valid(case, case.inputs())
    assert_splits_and_chunks_agree(monkeypatch, case, inputs, schedule)


@needs_kernels
@every_schedule
def test_fp16_gradients_of_a_group_with_one_valid_row_do_not_overflow(schedule):
    """One row takes the gradient that several would share."""
    case = Case(256, 64, 16, "distance", "random", 2, dtype=torch.float16)
    inputs = case.inputs() | {"valid": torch.arange(256) == 3}
    results = kernel_results(inputs, schedule, ("posterior",), **case.settings())
    assert results["d x"].isfinite().all()
    assert (results["d x"][torch.arange(256) != 3] == 0).all()
    assert_gradients(results, inputs, ("posterior",), **case.settings())
