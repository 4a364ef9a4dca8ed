"""The Triton backward of ``vector_quantize`` by error budget against fp64; without a GPU in Triton's interpreter."""

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
    patch_dispatch,
    set_split,
)
from helpers.vq_cases import LEAVES, LOGITS, MASKS, assert_same, copy_leaves, make_inputs, outputs_and_gradients
from helpers.vq_kernel_cases import (
    CASES,
    OUTPUTS,
    Case,
    assert_gradients,
    assert_outputs,
    is_separated,
    kernel_results,
)
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from regvq_fast.dispatch import Tile
from regvq_fast.ops import vector_quantize
from regvq_fast.ops.reference import vector_quantize_reference

pytest.importorskip("triton")

# Lanes beyond the last row or code hold anything.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
CODEBOOK_GRADS = ("soft", "hard", "none")


def small_parts_and_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Set splits of 64 codes and chunks of 128 rows, as large calls have larger ones; the list is ``set_split``'s."""
    patch_dispatch(monkeypatch, "CHUNK_SCORES", 1)
    patch_dispatch(monkeypatch, "MIN_CHUNK_ROWS", 128)
    patch_dispatch(monkeypatch, "FULL_CHUNK_ROWS", 1)
    return set_split(monkeypatch, 64)


@if_kernels_are_elsewhere
@pytest.mark.slow
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------------------- accuracy


@needs_kernels
@every_schedule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_within_the_error_budget(case, schedule):
    inputs = case.inputs()
    results = kernel_results(inputs, schedule, **case.settings())
    assert_outputs(results, inputs, **case.settings())
    assert_gradients(results, inputs, **case.settings())


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_small_widths(width, dtype, schedule):
    """Eight channels are fewer than a tile multiplies: the others are neither read nor written."""
    case = Case(150, 70, width, groups=2, dtype=dtype)
    inputs = case.inputs()
    results = kernel_results(inputs, schedule, **case.settings())
    assert_outputs(results, inputs, **case.settings())
    assert_gradients(results, inputs, **case.settings())


@needs_kernels
@every_schedule
@pytest.mark.parametrize(
    ("codebook_grad", "dtype"),
    [*((codebook_grad, torch.float32) for codebook_grad in CODEBOOK_GRADS), *(("hard", dtype) for dtype in FLOATS[1:])],
)
@pytest.mark.parametrize("logits", LOGITS)
def test_every_kind_of_gradient_in_every_type(logits, codebook_grad, dtype, schedule):
    case = Case(24, 70, 17, logits, groups=3, tau=0.4, codebook_grad=codebook_grad, dtype=dtype)
    arguments = case.settings() | {"row_offset": 2**32 - 9}
    assert_gradients(kernel_results(case.inputs(), schedule, **arguments), case.inputs(), **arguments)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("use", [("quantized",), ("posterior",)])
@pytest.mark.parametrize("codebook_grad", CODEBOOK_GRADS)
def test_one_of_the_two_outputs_alone_carries_its_gradient(codebook_grad, use, schedule):
    case = Case(24, 70, 17, "linear with bias", groups=3, codebook_grad=codebook_grad)
    results = kernel_results(case.inputs(), schedule, use, **case.settings())
    assert_gradients(results, case.inputs(), use, **case.settings())


@needs_kernels
@every_schedule
@pytest.mark.parametrize(
    ("logits", "trained"),
    [("distance", "x"), ("distance", "codebook"), *(("linear with bias", name) for name in LEAVES)],
)
def test_a_single_trained_input_gets_its_whole_gradient(logits, trained, schedule):
    inputs = make_inputs(logits, num_codes=70, dtype=torch.float16)
    expected = kernel_results(inputs, schedule)
    for name, value in inputs.items():
        value.requires_grad_(name == trained)
    results = kernel_results(inputs, schedule)
    assert [name for name in results if name.startswith("d ")] == [f"d {trained}"]
    assert torch.equal(results[f"d {trained}"], expected[f"d {trained}"])


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_that_no_row_is_near_have_a_gradient_of_exactly_zero(dtype, schedule):
    inputs = make_inputs(mask="no mask", num_codes=70, dtype=dtype)
    inputs["codebook"] = inputs["codebook"].detach().clone()
    inputs["codebook"][30:] = 100.0
    inputs["codebook"].requires_grad_()
    results = kernel_results(inputs, schedule)
    assert (results["posterior"][:, 30:] == 0).all()
    assert (results["d codebook"][30:] == 0).all()
    assert_gradients(results, inputs)


@needs_kernels
@every_schedule
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_codes_of_tiny_probability_keep_the_digits_of_their_gradient(dtype, schedule):
    """Each by itself: from code to code p falls by e^-2, to 1e-6, of which fp16 has four bits left."""
    case = Case(64, 8, 16, "linear with bias", "no mask", spread=0.1, dtype=dtype)
    inputs, arguments = case.inputs(), case.settings() | {"loss_scale": 1024.0}
    inputs["bias"] = (-2.0 * torch.arange(8)).to(dtype).requires_grad_()
    results = kernel_results(inputs, schedule, **arguments)
    truth = outputs_and_gradients(vector_quantize_reference, copy_leaves(inputs, torch.float64), **arguments)
    for name in ("d codebook", "d weight"):
        error, size = (results[name] - truth[name]).abs().amax(1), truth[name].abs().amax(1)
        assert (error <= 4 * torch.finfo(dtype).eps * size).all(), f"{name}: {error / size}"


@needs_kernels
@every_schedule
# The size of dLoss and those of x and of the keys, whose logits stay the same: f dS overflows fp16, or vanishes in it.
@pytest.mark.parametrize(("loss_scale", "x_size", "key_size"), [(65536 / 2048, 2**-6, 2**-6), (2**-13, 1.0, 8.0)])
@pytest.mark.parametrize("logits", ["distance", "linear with bias"])
def test_fp16_gradients_keep_their_digits_whatever_the_loss_scale(logits, loss_scale, x_size, key_size, schedule):
    case = Case(64, 257, 16, logits, tau=0.1, groups=4, dtype=torch.float16)
    inputs, arguments = case.inputs(), case.settings() | {"loss_scale": loss_scale}
    for name, size in (("x", x_size), ("codebook" if logits == "distance" else "weight", key_size)):
        inputs[name] = (inputs[name].detach() * size).requires_grad_()
    arguments["scale"] /= x_size * key_size
    assert is_separated(inputs, **arguments)
    results = kernel_results(inputs, schedule, **arguments)
    truth = outputs_and_gradients(vector_quantize_reference, copy_leaves(inputs, torch.float64), **arguments)
    for name in (name for name in truth if name.startswith("d ")):
        size = truth[name].abs().max()
        rounding = (truth[name].half() - truth[name]).abs().max()
        error = (results[name] - truth[name]).abs().max()
        assert rounding < 2**-9 * size, "fp16 can't hold the gradient itself"
        assert error <= rounding + 2**-9 * size, f"{name}: {error / size:.1e}, its rounding alone {rounding / size:.1e}"


# ------------------------------------------------------------------------------------------- parts, chunks and tiles


@needs_kernels
@pytest.mark.parametrize("mask", ["random", "no mask"])
@pytest.mark.parametrize(("schedule", "dtype"), [("fused", torch.float16), ("chunked", torch.float32)])
def test_parts_of_the_codes_and_chunks_of_the_rows_change_nothing(schedule, dtype, mask, monkeypatch):
    if schedule not in SCHEDULES:
        pytest.skip("needs sm_80 or newer")
    case = Case(260, 300, 9, "linear with bias", mask, groups=5, tau=0.5, dtype=dtype)
    inputs = case.inputs()
    whole = kernel_results(inputs, schedule, **case.settings())
    parts = small_parts_and_chunks(monkeypatch)
    results = kernel_results(inputs, schedule, **case.settings())
    assert len(parts) >= 1 + 2  # forward, and every chunk of the backward
    assert min(parts) > 1
    for name in OUTPUTS:
        assert torch.equal(results[name], whole[name]), name
    assert_gradients(results, inputs, **case.settings())
    assert_same(kernel_results(inputs, schedule, **case.settings()), results, 0)  # to the bit


@needs_kernels
@every_schedule
def test_rows_are_ordered_in_windows_that_chunks_are_multiples_of(schedule, monkeypatch):
    """Ranking takes the square of a window's length."""
    from regvq_fast.kernels import utils, vector_quantize

    case = Case(700, 20, 9, groups=7)
    inputs = case.inputs(1)
    windows = []

    def prepare(*args, **options):
        windows.append(options["window"])
        return utils.prepare(*args, **options)

    monkeypatch.setattr(vector_quantize, "prepare", prepare)
    for name, value in {"ORDER_WINDOW": 128, "CHUNK_SCORES": 1, "MIN_CHUNK_ROWS": 300, "FULL_CHUNK_ROWS": 1}.items():
        patch_dispatch(monkeypatch, name, value)
    results = kernel_results(inputs, schedule, **case.settings())
    assert windows == [128, 128]
    assert_outputs(results, inputs, **case.settings())
    assert_gradients(results, inputs, **case.settings())


@needs_kernels
@every_schedule
def test_other_tiles_change_nothing(schedule, monkeypatch):
    case = Case(70, 70, 20, groups=2)
    inputs = case.inputs()
    whole = kernel_results(inputs, schedule, **case.settings())
    launched = []
    patch_dispatch(monkeypatch, "pinned_tile", lambda kernel, *_: launched.append(kernel) or Tile(16, 32, 16, 4, 1))
    results = kernel_results(inputs, schedule, **case.settings())
    for name in OUTPUTS:
        assert torch.equal(results[name], whole[name]), name
    assert_gradients(results, inputs, **case.settings())
    assert launched == ["vector_quantize", "vector_quantize_backward_heavy"]


@needs_kernels
@every_schedule
def test_gradients_that_come_expanded_are_read_rightly(schedule):
    """``sum()`` hands back one number with strides of 0."""
    inputs = make_inputs(dtype=torch.float32)
    inputs = {name: value.detach().to(DEVICE).requires_grad_(value.requires_grad) for name, value in inputs.items()}
    leaves = (inputs["x"], inputs["codebook"])
    with kernels(schedule):
        output = vector_quantize(**inputs, groups=2, impl="triton")
        results = torch.autograd.grad(output.quantized.sum() + output.posterior.sum(), leaves, retain_graph=True)
        ones = [torch.ones_like(value) for value in output[:2]]
        expected = torch.autograd.grad(output[:2], leaves, ones)
    for value, other in zip(results, expected, strict=True):
        assert torch.equal(value, other)


# ----------------------------------------------------------------------------------------------------------- fuzzing


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_and_setting(data):
    groups = data.draw(st.integers(1, 4), "groups")
    case = Case(
        groups * data.draw(st.integers(1, 40), "rows of a group"),
        data.draw(st.integers(1, 200), "codes"),
        data.draw(st.sampled_from((1, 3, 16, 33, 130)), "width"),
        data.draw(st.sampled_from(LOGITS), "logits"),
        data.draw(st.sampled_from(MASKS), "mask"),
        groups,
        data.draw(st.floats(0.05, 10), "tau"),
        data.draw(st.sampled_from((0.01, 1.0, 5.0)), "spread"),
        data.draw(st.sampled_from(CODEBOOK_GRADS), "codebook_grad"),
        data.draw(st.sampled_from(FLOATS), "dtype"),
    )
    seed = data.draw(st.integers(0, 99), "inputs")
    inputs = case.inputs(seed)
    if seed % 2:
        inputs["valid"] = torch.arange(case.num_rows) % 3 != 1
    arguments = case.settings() | {"row_offset": data.draw(st.integers(0, 1 << 40), "row_offset")}
    assume(is_separated(inputs, **arguments))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if data.draw(st.booleans(), "small parts and chunks"):
            small_parts_and_chunks(monkeypatch)
        results = kernel_results(inputs, data.draw(st.sampled_from(SCHEDULES), "schedule"), **arguments)
    assert_outputs(results, inputs, **arguments)
    assert_gradients(results, inputs, **arguments)


@needs_kernels
def test_a_gradient_under_vmap_whose_forward_kept_nothing_is_refused():
    x, codebook = torch.randn(2, 6, 4, device=DEVICE, requires_grad=True), torch.randn(8, 4, device=DEVICE)
    quantized = torch.func.vmap(lambda rows: vector_quantize(rows, codebook, impl="triton").quantized)(x)
    with pytest.raises(RuntimeError, match="impl='eager'"):
        quantized.sum().backward()
