"""Codebooks with heads, (H, N, D) for x (..., H, D), against calls of one head; in PyTorch and in the kernels."""

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
)
from helpers.vq_cases import (
    LEAVES,
    LOGITS,
    SEED,
    assert_same,
    frozen,
    head_of,
    make_head_inputs,
    make_inputs,
    outputs_and_gradients,
)
from helpers.vq_kernel_cases import (
    OUTPUTS,
    Case,
    assert_gradients,
    assert_outputs,
    assert_splits_and_chunks_agree,
    kernel_results,
)

from regvq_fast.ops import assign_codes, segment_sum, vector_quantize
from regvq_fast.ops.reference import vector_quantize_reference
from regvq_fast.ops.segment_sum import segment_counts

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value", "ignore:All-NaN slice")


@if_kernels_are_elsewhere
@pytest.mark.slow
def test_this_file_passes_in_the_interpreter():
    pytest.importorskip("triton")
    pass_in_the_interpreter(__file__)


# ----------------------------------------------------------------------------------------------------- vector_quantize


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
@pytest.mark.parametrize("logits", LOGITS)
def test_values_and_gradients_equal_autograd_of_the_surrogate(logits, codebook_grad, groups):
    inputs = make_head_inputs(3, logits) | {"valid": torch.arange(24) % 3 != 1}
    arguments = {"groups": groups, "codebook_grad": codebook_grad, "tau": 0.6, "row_offset": 2**32 - 9}
    results = outputs_and_gradients(vector_quantize, inputs, **arguments)
    assert results["posterior"].shape == (groups, 3, 11)
    assert_same(results, outputs_and_gradients(vector_quantize_reference, inputs, **arguments))


@pytest.mark.parametrize("logits", LOGITS)
def test_without_noise_heads_are_separate_calls_to_the_bit(logits):
    inputs = make_head_inputs(3, logits, "no mask", dtype=torch.float32)
    results = outputs_and_gradients(vector_quantize, inputs, ("quantized",))
    grad_quantized = torch.autograd.grad(vector_quantize(**inputs).quantized.sum(), inputs["x"])[0]
    for head in range(3):
        one = head_of(inputs, head)
        output = vector_quantize(**one)
        for name in OUTPUTS:
            assert torch.equal(results[name][:, head], getattr(output, name)), name
        assert torch.equal(grad_quantized[:, head], torch.autograd.grad(output.quantized.sum(), one["x"])[0])


def test_the_codes_of_a_head_continue_those_before_it_in_whole_fours():
    """Head h takes the noise of codes h * 12 + n: those of one codebook in which no other code is ever selected."""
    inputs = make_head_inputs(3, "linear with bias", "all", num_rows=60)
    indices = vector_quantize(**inputs, row_offset=7).indices
    for head in range(3):
        one, first = frozen(head_of(inputs, head)), 12 * head
        before = {name: one[name].new_zeros(first, *one[name].shape[1:]) for name in ("codebook", "weight", "bias")}
        before["bias"] -= 1e4
        one |= {name: torch.cat([zeros, one[name]]) for name, zeros in before.items()}
        assert torch.equal(indices[:, head], vector_quantize(**one, row_offset=7).indices - first)


def test_the_noise_of_one_head_is_what_it_was():
    """It is part of every result."""
    x, codebook, mask = torch.zeros(12, 2), torch.ones(6, 2), torch.ones(12, dtype=torch.bool)
    arguments = {"mask": mask, "seed": SEED, "row_offset": 2**32 - 5}
    indices = vector_quantize(x, codebook, **arguments).indices
    assert indices.tolist() == [0, 1, 3, 5, 2, 4, 4, 4, 4, 3, 2, 4]
    heads = vector_quantize(x.unsqueeze(1).expand(-1, 2, -1), codebook.expand(2, -1, -1), **arguments)
    assert torch.equal(heads.indices[:, 0], indices)
    assert not torch.equal(heads.indices[:, 1], indices)


def test_heads_sample_independently():
    """Chi-square of the joint frequencies of two heads with equal scores, over 40,000 rows."""
    num_rows, num_codes = 40_000, 5
    mask = torch.ones(num_rows, dtype=torch.bool)
    indices = vector_quantize(torch.zeros(num_rows, 2, 2), torch.ones(2, num_codes, 2), mask=mask, seed=SEED).indices
    joint = (indices[:, 0] * num_codes + indices[:, 1]).bincount(minlength=num_codes**2).double()
    expected = num_rows / num_codes**2
    assert ((joint - expected).square() / expected).sum() < 51.18  # 0.1 % point with 24 degrees of freedom


@pytest.mark.parametrize("logits", LOGITS)
def test_a_codebook_of_one_head_is_one_without(logits):
    inputs = make_head_inputs(1, logits)
    expected = outputs_and_gradients(vector_quantize, make_inputs(logits), groups=2)
    results = outputs_and_gradients(vector_quantize, inputs, groups=2)
    for name, value in results.items():
        assert value.numel() == expected[name].numel()
    assert_same({name: value.view_as(expected[name]) for name, value in results.items()}, expected, 0)


def test_leading_dimensions_are_rows_in_order():
    inputs = make_head_inputs(3) | {"valid": torch.arange(24) % 3 != 1}
    expected = vector_quantize(**inputs, groups=2)
    shaped = {name: inputs[name].unflatten(0, (2, 3, 4)) for name in ("x", "mask", "valid")}
    output = vector_quantize(**inputs | shaped, groups=2)
    assert output.quantized.shape == (2, 3, 4, 3, 5)
    assert output.indices.shape == output.best_indices.shape == output.perturbation.shape == (2, 3, 4, 3)
    assert all(torch.equal(value.flatten(), other.flatten()) for value, other in zip(output, expected, strict=True))
    single = vector_quantize(inputs["x"][0], inputs["codebook"])
    assert single.indices.shape == (3,)
    assert torch.equal(single.indices, expected.best_indices[0])
    assert vector_quantize(inputs["x"][:0], inputs["codebook"], groups=2).posterior.shape == (2, 3, 11)


# ------------------------------------------------------------------------------------------------------- the other ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_ops_take_heads_by_themselves(dtype):
    x, codebook = (frozen(make_head_inputs(3, num_rows=50, dtype=dtype))[name] for name in ("x", "codebook"))
    indices = assign_codes(x.view(2, 25, 3, 5), codebook).view(50, 3)
    sums, counts = segment_sum(x, indices, 11), segment_counts(indices, 11, heads=True)
    assert (sums.shape, counts.shape) == ((3, 11, 5), (3, 11))
    for head in range(3):
        assert torch.equal(indices[:, head], assign_codes(x[:, head], codebook[head]))
        assert torch.equal(sums[head], segment_sum(x[:, head], indices[:, head], 11))
        assert torch.equal(counts[head], segment_counts(indices[:, head], 11))
    with pytest.raises(ValueError, match=r"\[0, 10\).* 0 to 10"):  # not the next head's first
        segment_sum(x, indices.fill_(0).index_fill_(0, torch.tensor([3]), 10), 10)


# ----------------------------------------------------------------------------------------------------- torch.library


@pytest.mark.parametrize(
    ("impl", "keeps"), [("eager", True), ("eager", False), pytest.param("triton", True, marks=needs_kernels)]
)
def test_opcheck(impl, keeps):
    inputs = make_head_inputs(2, "linear with bias", "random", 8, 5, 3, torch.float32)
    device = DEVICE if impl == "triton" else "cpu"
    inputs = {name: value.detach().to(device).requires_grad_(name in LEAVES) for name, value in inputs.items()}
    tensors = [inputs[name] for name in (*LEAVES, "mask", "seed")]
    numbers = [torch.tensor(value, device=device) for value in (0.9, 1.5, 7)]
    valid = torch.arange(8, device=device) % 3 != 0
    forward = (*tensors, *numbers, 2, "hard", valid, keeps, impl)
    torch.library.opcheck(torch.ops.regvq.vector_quantize, forward)
    detached = [value.detach() for value in tensors]
    *_, indices, _, _, kept = torch.ops.regvq.vector_quantize(*detached, *forward[6:])
    grads = torch.randn(8, 2, 3, device=device), torch.randn(2, 2, 5, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.regvq.vector_quantize_backward,
            (*detached, *forward[6:-2], *grads, indices, kept, *needs, impl),
        )
    x, codebook = detached[:2]
    torch.library.opcheck(torch.ops.regvq.assign_codes, (x, codebook, impl))
    torch.library.opcheck(torch.ops.regvq.segment_sum, (x, indices, 5, impl))


def test_heads_are_part_of_one_graph():
    inputs = make_head_inputs(2, num_rows=12, dtype=torch.float32)

    def step(x, codebook):
        output = vector_quantize(x * 1.5, codebook, mask=inputs["mask"], seed=inputs["seed"], groups=2)
        sums = segment_sum(output.quantized, assign_codes(x, codebook), 11)
        return output.quantized.square().sum() + output.posterior.square().sum() + sums.sum()

    leaves = inputs["x"], inputs["codebook"]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value, expected in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(value, expected)


# ----------------------------------------------------------------------------------------------------------- kernels

CASES = (
    Case(15, 17, 127, "linear with bias", "random", 3, 10.0),
    Case(128, 130, 33, "distance", "random", 4, dtype=torch.bfloat16),
    Case(70, 70, 9, "distance", "all", 70, 0.3, dtype=torch.float16),
    Case(127, 257, 17, "distance", "no mask", 1, 0.5, 0.3, "hard"),
    Case(40, 70, 64, "linear", "random", 1, 0.9, 1.0, "hard", torch.float16),
)


def inputs_of(case, heads=3):
    return make_head_inputs(heads, case.logits, case.mask, case.num_rows, case.num_codes, case.width, case.dtype)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype in FLOATS], ids=str)
def test_kernels_are_within_the_error_budget(case, schedule):
    inputs = inputs_of(case)
    results = kernel_results(inputs, schedule, **case.settings())
    assert_outputs(results, inputs, **case.settings())
    assert_gradients(results, inputs, **case.settings())


@needs_kernels
@every_schedule
def test_kernels_of_one_head_give_the_bits_of_none(schedule):
    case = Case(70, 70, 9, "linear with bias", groups=5)
    expected = kernel_results(case.inputs(), schedule, **case.settings())
    results = kernel_results(inputs_of(case, 1), schedule, **case.settings())
    assert_same({name: value.view_as(expected[name]) for name, value in results.items()}, expected, 0)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("logits", ["distance", "linear with bias"])
def test_kernels_with_splits_and_chunks(logits, schedule, monkeypatch):
    case = Case(260, 150, 9, logits, groups=5, dtype=torch.float16)
    inputs = inputs_of(case, 2) | {"valid": torch.arange(260) % 3 != 1}
    splits = assert_splits_and_chunks_agree(monkeypatch, case, inputs, schedule)
    assert len(splits) > 2  # the forward's, and more than one chunk of the backward


@needs_kernels
@every_schedule
def test_the_other_kernels(schedule):
    x, codebook = (frozen(make_head_inputs(3, num_rows=50, dtype=torch.float32))[name] for name in ("x", "codebook"))
    with kernels(schedule):
        indices = assign_codes(x.to(DEVICE), codebook.to(DEVICE), impl="triton")
        sums = segment_sum(x.to(DEVICE), indices, 11, impl="triton")
    assert torch.equal(indices.cpu(), assign_codes(x, codebook))
    torch.testing.assert_close(sums.cpu(), segment_sum(x, indices.cpu(), 11))
