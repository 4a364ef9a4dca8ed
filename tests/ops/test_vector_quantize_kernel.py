"""The Triton forward of ``vector_quantize`` against fp64 and the eager twin; without a GPU in Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import (
    DEVICE,
    FLOATS,
    SCHEDULES,
    every_schedule,
    if_kernels_are_elsewhere,
    kernels,
    needs_kernels,
    pass_in_the_interpreter,
    set_split,
)
from helpers.vq_cases import SEED, assert_same, copy_leaves, frozen, make_inputs
from helpers.vq_kernel_cases import CASES, OUTPUTS, Case, assert_outputs, kernel_results

from regvq_fast.ops import vector_quantize

pytest.importorskip("triton")

# Lanes beyond the last row or code hold anything.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value", "ignore:All-NaN slice")


@if_kernels_are_elsewhere
@pytest.mark.slow
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


def test_float64_has_no_kernels():
    x = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*impl='eager'"):
        vector_quantize(x, x, impl="triton")


# ------------------------------------------------------------------------------------------------ codes and outputs


@needs_kernels
@every_schedule
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_best_code_wins_and_the_outputs_are_its(case, schedule):
    """Check outputs without gradients; the gradient tests check outputs with them."""
    inputs = frozen(case.inputs())
    assert_outputs(kernel_results(inputs, schedule, **case.settings()), inputs, **case.settings())


@needs_kernels
@every_schedule
@pytest.mark.parametrize("row_offset", [0, 2**32 - 7, 2**62 + 3, -5])
def test_the_noise_is_eagers(row_offset, schedule):
    """Equal scores: the noise alone chooses, in ragged tiles, in codes that are no multiple of four."""
    for num_codes in (3, 517):
        inputs = {"x": torch.zeros(37, 2), "codebook": torch.ones(num_codes, 2), "seed": SEED}
        inputs["mask"] = torch.arange(37) % 3 != 0
        results = kernel_results(inputs, schedule, row_offset=torch.tensor(row_offset))
        assert_outputs(results, inputs, row_offset=row_offset)
        assert (results["best_indices"] == 0).all()


@needs_kernels
@every_schedule
def test_a_row_is_the_same_in_any_batch(schedule):
    inputs = frozen(Case(150, 70, 9).inputs())
    start = 2**32 - 100
    whole = kernel_results(inputs, schedule, row_offset=start)
    for part in (slice(0, 47), slice(47, 150)):
        rows = inputs | {"x": inputs["x"][part], "mask": inputs["mask"][part]}
        results = kernel_results(rows, schedule, row_offset=start + part.start)
        for name in ("quantized", "indices", "best_indices", "perturbation"):
            assert torch.equal(results[name], whole[name][part]), name


@needs_kernels
@every_schedule
@pytest.mark.parametrize("mask", ["no mask", "all"])
@pytest.mark.parametrize(
    ("logits", "codes_of_a_split"), [("distance", 1 << 20), ("distance", 64), ("linear with bias", 64)]
)
def test_the_smallest_of_identical_codes_wins(logits, mask, codes_of_a_split, schedule, monkeypatch):
    """Within a tile, across tiles and across parts; where there is noise, with logits so huge that it drowns."""
    parts = set_split(monkeypatch, codes_of_a_split)
    inputs = frozen(make_inputs(logits, mask, 70, 50, 8, torch.float32))
    for name in {"x", "codebook", "weight", "bias"} & inputs.keys():
        inputs[name] = torch.round(8 * inputs[name]) / 8  # sums are exact, in any order
    codes = torch.randint(50, (300,), generator=torch.Generator().manual_seed(0))
    inputs |= {name: inputs[name][codes] for name in ("codebook", "weight", "bias") if name in inputs}
    scale = 1e12 if mask == "all" else 1.0
    results = kernel_results(inputs, schedule, scale=scale)
    assert [number > 1 for number in parts] == [codes_of_a_split == 64]
    assert_outputs(results, inputs, scale=scale)
    first = torch.stack([(codes == code).int().argmax() for code in range(50)])
    for name in ("indices", "best_indices"):
        assert torch.equal(first[codes[results[name]]], results[name])


@needs_kernels
@every_schedule
def test_a_row_of_nan_disturbs_no_other_and_gets_a_code_that_exists(schedule):
    """On a GPU the inputs are not checked for NaN."""
    from regvq_fast.dispatch import Inputs
    from regvq_fast.kernels.vector_quantize import vector_quantize_forward

    inputs = {name: value.to(DEVICE) for name, value in frozen(Case(40, 70, 9).inputs()).items()}
    inputs["mask"][3:5] = torch.tensor([True, False])
    broken = inputs["x"].clone()
    broken[3:5] = torch.nan
    tau, scale, row_offset = (torch.tensor(value, device=DEVICE) for value in (0.9, 1.0, 0))
    others = (inputs["codebook"], None, None, inputs["mask"], inputs["seed"], tau, scale, row_offset, 1, "soft")
    with kernels(schedule):
        expected, results = (vector_quantize_forward(Inputs(x, *others), True) for x in (inputs["x"], broken))
    others = torch.arange(40, device=DEVICE).sub(3.5).abs() > 1
    for place in (0, 2, 3, 4, 5):  # all but the posterior
        assert torch.equal(results[place][others], expected[place][others])
    for indices in results[2:4]:
        assert ((indices >= 0) & (indices < 70)).all()


# --------------------------------------------------------------------------------------------- arguments and layouts


@needs_kernels
@every_schedule
@pytest.mark.parametrize("layout", ["every other", "transposed", "unaligned"])
def test_strides_and_alignment_of_the_inputs_do_not_matter(layout, schedule):
    change = {
        "every other": lambda value: torch.stack([value, value], -1)[..., 0],
        "transposed": lambda value: value.t().contiguous().t(),
        "unaligned": lambda value: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape),
    }[layout]
    inputs = make_inputs("linear with bias", num_rows=40, num_codes=70, width=6, dtype=torch.float32)
    changed = {
        name: change(value.detach()).requires_grad_(value.requires_grad) if value.ndim else value
        for name, value in inputs.items()
    }
    assert changed["x"].storage_offset() == 1 or not changed["x"].is_contiguous()
    assert_same(kernel_results(changed, schedule, groups=2), kernel_results(inputs, schedule, groups=2), 0)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("logits", "mask", "codebook_grad"), [("distance", "all", "soft"), ("linear with bias", "no mask", "hard")]
)
def test_no_rows(logits, mask, codebook_grad, dtype, schedule):
    inputs = make_inputs(logits, mask, 0, dtype=dtype)
    results = kernel_results(inputs, schedule, groups=2, codebook_grad=codebook_grad)
    assert results["quantized"].shape == (0, 5)
    assert results["posterior"].tolist() == [[0] * 11] * 2
    assert all((results[name] == 0).all() for name in results if name.startswith("d "))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tau_and_row_offset_may_be_tensors(dtype):
    inputs = make_inputs(dtype=torch.float32)
    expected = kernel_results(inputs, SCHEDULES[0], tau=0.625, row_offset=2**40)
    tensors = {"tau": torch.tensor(0.625, dtype=dtype), "row_offset": torch.tensor(2**40)}
    assert_same(kernel_results(inputs, SCHEDULES[0], **tensors), expected, 0)


@needs_kernels
@every_schedule
def test_a_mask_of_no_row_is_no_mask(schedule):
    inputs = make_inputs(mask="no mask", num_rows=40, num_codes=70, dtype=torch.float32)
    masked = inputs | {"mask": torch.zeros(40, dtype=torch.bool), "seed": SEED}
    expected = kernel_results(inputs, schedule)
    results = kernel_results(masked, schedule, tau=0.1)
    for name in OUTPUTS:
        assert torch.equal(results[name], expected[name]), name
    assert_same(results, expected, 1e-6)


@needs_kernels
@every_schedule
def test_leading_dimensions_are_rows_in_order(schedule):
    inputs = make_inputs(num_rows=24, dtype=torch.float32)
    expected = kernel_results(inputs, schedule, groups=4)
    folded = inputs | {
        "x": inputs["x"].detach().view(2, 3, 4, 5).requires_grad_(),
        "mask": inputs["mask"].view(2, 3, 4),
    }
    results = kernel_results(folded, schedule, groups=4)
    assert results["indices"].shape == (2, 3, 4)
    assert_same(results, {name: value.reshape(results[name].shape) for name, value in expected.items()}, 0)


@needs_kernels
def test_autocast_gives_the_fp32_result_of_the_rounded_inputs():
    inputs = make_inputs("linear with bias", dtype=torch.bfloat16)
    expected = kernel_results(copy_leaves(inputs, torch.float32), SCHEDULES[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        results = kernel_results(inputs, SCHEDULES[0])
    assert_same({name: results[name] for name in OUTPUTS}, {name: expected[name] for name in OUTPUTS}, 0)
    for name in ("d x", "d codebook", "d weight", "d bias"):
        assert torch.equal(results[name], expected[name].bfloat16()), name


# ------------------------------------------------------------------------------------------------- citizens of torch


@needs_kernels
def test_opcheck():
    inputs = make_inputs("linear with bias", "random", 8, 5, 3, torch.float32)
    inputs = {name: value.detach().to(DEVICE).requires_grad_(value.requires_grad) for name, value in inputs.items()}
    tensors = [inputs[name] for name in ("x", "codebook", "weight", "bias", "mask", "seed")]
    tau, scale, offset = (torch.tensor(value, device=DEVICE) for value in (0.9, 1.5, 7))
    valid = torch.arange(8, device=DEVICE) % 3 != 0
    forward = (*tensors, tau, scale, offset, 2, "hard", valid, True, "triton")
    torch.library.opcheck(torch.ops.regvq.vector_quantize, forward)
    detached = [value.detach() for value in tensors]
    _, _, indices, _, _, lse = torch.ops.regvq.vector_quantize(*detached, *forward[6:])
    grads = torch.randn(8, 3, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    for needs_x, needs_codes in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.regvq.vector_quantize_backward,
            (*detached, *forward[6:-2], *grads, indices, lse, needs_x, needs_codes, "triton"),
        )


@needs_kernels
def test_the_kernels_are_part_of_one_graph():
    inputs = {name: value.detach().to(DEVICE) for name, value in make_inputs(dtype=torch.float32).items()}

    def step(x, codebook):
        output = vector_quantize(x * 1.5, codebook, mask=inputs["mask"], seed=inputs["seed"], impl="triton")
        return output.quantized.square().sum() + output.posterior.square().sum()

    def gradients(step):
        leaves = [inputs[name].clone().requires_grad_() for name in ("x", "codebook")]
        return torch.autograd.grad(step(*leaves), leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value, expected in zip(gradients(compiled), gradients(step), strict=True):
        torch.testing.assert_close(value, expected)


@needs_kernels
def test_more_masked_rows_than_int32_numbers_are_refused():
    few, many = (torch.empty((), device=DEVICE, dtype=dtype) for dtype in (torch.float16, torch.bool))
    with pytest.raises(ValueError, match=r"2147483647 .*2147483648"):
        vector_quantize(
            few.expand(2**31, 1),
            few.expand(1, 1),
            mask=many.expand(2**31),
            seed=torch.tensor(1, device=DEVICE),
            impl="triton",
        )
