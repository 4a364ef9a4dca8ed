"""The ops as ``torch.library`` citizens: opcheck, torch.compile without a break or a recompilation, autocast."""

import pytest
import torch
from helpers.vq_cases import LOGITS, copy_leaves, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from regvq_fast.matmul import compute_dtype
from regvq_fast.ops import assign_codes, softmax_statistics, vector_quantize, weighted_info_nce
from regvq_fast.quantizers import RegularizedQuantizer


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other tests neither count nor slow this one down."""
    torch._dynamo.reset()


def features(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 6, 4, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return query, key, torch.rand(2, 6, generator=generator)


@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
@pytest.mark.parametrize("mask", ["no mask", "random"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("keeps", [False, True])
def test_opcheck_vector_quantize(logits, mask, codebook_grad, keeps):
    inputs = make_inputs(logits, mask, 8, 5, 3, torch.float32)
    tensors = [inputs.get(name) for name in ("x", "codebook", "weight", "bias", "mask", "seed")]
    tau, scale = torch.tensor(0.9), torch.tensor(1.5)
    offset, kept = torch.tensor(7), torch.randn(8 if keeps else 0, 5)
    valid = None if mask == "no mask" else torch.arange(8) % 3 != 0
    forward = (*tensors, tau, scale, offset, 2, codebook_grad, valid, keeps, "eager")
    torch.library.opcheck(torch.ops.regvq.vector_quantize, forward)
    detached = [None if t is None else t.detach() for t in tensors]
    grads = torch.randn(8, 3), torch.randn(2, 5)
    indices = torch.zeros(8, dtype=torch.int64)
    for needs_x, needs_codes in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.regvq.vector_quantize_backward,
            (*detached, *forward[6:-2], *grads, indices, kept, needs_x, needs_codes, "eager"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_the_other_ops(dtype):
    torch.library.opcheck(
        torch.ops.regvq.assign_codes, (torch.randn(8, 3).to(dtype), torch.randn(5, 3).to(dtype), "eager")
    )
    query, key, weight = features(dtype)
    for w in (None, weight):
        for keeps in (True, False):
            torch.library.opcheck(torch.ops.regvq.weighted_info_nce, (query, key, w, 0.07, keeps, "eager"))
        rows = (torch.rand(2, 6) + 5, torch.rand(2, 6))
        for kept in (torch.rand(2, 6, 6), torch.empty(0, 6, 6)):
            tensors = (torch.rand(2, 6), query.detach(), key.detach(), *rows, kept.to(compute_dtype(query)))
            for needs in ((True, True), (True, False), (False, True)):
                torch.library.opcheck(torch.ops.regvq.weighted_info_nce_backward, (*tensors, 0.07, "eager", *needs))


def training_step(inputs, tau, groups=2, scale=1.0):
    """Quantizer between ordinary PyTorch on both sides, as in a model."""
    x, codebook = inputs["x"] * 1.5, inputs["codebook"]
    output = vector_quantize(x, codebook, mask=inputs["mask"], seed=inputs["seed"], tau=tau, groups=groups, scale=scale)
    prior = (output.posterior * output.posterior.clamp(min=1e-9).log()).sum()
    contrast = weighted_info_nce(x.unflatten(0, (2, -1)), output.quantized.unflatten(0, (2, -1)))
    return output.quantized.square().sum() + prior + contrast.sum(), output.indices, assign_codes(x, codebook)


def step_and_gradients(step, inputs, tau, scale=1.0):
    loss, *indices = step(inputs, tau, scale=scale)
    return [loss.detach(), *torch.autograd.grad(loss, (inputs["x"], inputs["codebook"])), *indices]


def assert_close(results, expected):
    """Within the rounding of fp32 sums, relative to the largest: another processor adds in another order."""
    for value, other in zip(results, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5 * max(10.0, float(other.abs().max())))


def test_inductor_compiles_a_whole_training_step_and_agrees_with_eager():
    inputs = make_inputs(num_rows=20, dtype=torch.float32)
    tau = torch.tensor(0.7)
    compiled = torch.compile(training_step, fullgraph=True)
    assert_close(step_and_gradients(compiled, inputs, tau), step_and_gradients(training_step, inputs, tau))
    transposed = inputs | {
        name: inputs[name].detach().t().contiguous().t().requires_grad_() for name in ("x", "codebook")
    }
    assert_close(step_and_gradients(compiled, transposed, tau), step_and_gradients(training_step, inputs, tau))


def test_neither_tau_nor_scale_nor_the_seed_nor_the_number_of_rows_recompiles():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step, fullgraph=True, backend=counter)
    for num_rows, tau, seed in ((20, 0.9, 3), (20, 0.5, 4), (34, 0.4, 5), (48, 0.3, 6)):
        inputs = make_inputs(num_rows=num_rows, dtype=torch.float32) | {"seed": torch.tensor(seed)}
        for name in ("x", "mask"):
            torch._dynamo.mark_dynamic(inputs[name], 0)
        values = torch.tensor(tau), torch.tensor(2 * tau)
        results = step_and_gradients(compiled, inputs, *values)
        assert_close(results, step_and_gradients(training_step, inputs, *values))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_may_change_from_call_to_call(dynamic):
    inputs, (query, key, weight) = make_inputs(dtype=torch.float32), features()

    def quantize(number):
        return vector_quantize(**inputs, tau=number, scale=number).quantized

    def others(number):
        return weighted_info_nce(query, key, weight, tau=number), softmax_statistics(
            query[0], key[0], temperature=number
        )

    for function, graphs in ((quantize, 1 if dynamic else 2), (others, None)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
        for number in (0.9, 0.7, 0.5, 0.3):
            torch.testing.assert_close(compiled(number), function(number))
        assert graphs is None or counter.frame_count <= graphs  # a number is fixed at first, dynamic from the second on


def test_a_quantizer_is_exported_with_a_dynamic_batch():
    quantizer = RegularizedQuantizer(16, 8).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(quantizer, (torch.randn(4, 8, 2, 2),), dynamic_shapes={"z": {0: batch}}).module()
    z = torch.randn(7, 8, 2, 2)
    assert torch.equal(exported(z).indices, quantizer(z).indices)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_gives_the_fp32_result_of_the_rounded_inputs(compiled):
    inputs = make_inputs("linear with bias", dtype=torch.bfloat16)
    query, key, weight = features(torch.bfloat16)

    def step(inputs, query, key):
        with torch.autocast("cpu", torch.bfloat16):
            output = vector_quantize(**inputs)
            nearest = assign_codes(inputs["x"], inputs["codebook"])
            return output, nearest, weighted_info_nce(query, key, weight)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    output, nearest, loss = run(inputs, query, key)
    single = copy_leaves(inputs, torch.float32)
    expected = vector_quantize(**single)
    for name, value in output._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name
    assert output.quantized.dtype == torch.float32
    assert torch.equal(nearest, assign_codes(single["x"], single["codebook"]))
    assert torch.equal(loss, weighted_info_nce(query.float(), key.float(), weight))

    # Gradients come back in the inputs' own type, rounded once.
    (gradient,) = torch.autograd.grad(output.quantized.sum() + output.posterior.square().sum(), inputs["x"])
    (true,) = torch.autograd.grad(expected.quantized.sum() + expected.posterior.square().sum(), single["x"])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), true, rtol=2**-8, atol=1e-5)


def test_the_ops_run_under_inference_mode():
    inputs, contrasted = make_inputs(dtype=torch.float32), features()

    def results():
        nearest = assign_codes(inputs["x"], inputs["codebook"])
        return *vector_quantize(**inputs), nearest, weighted_info_nce(*contrasted)

    with torch.inference_mode():
        inferred = results()
    assert all(map(torch.equal, inferred, results()))


def test_meta_tensors_give_shapes_without_computing():
    inputs = make_inputs(dtype=torch.float16)
    real = vector_quantize(**inputs, groups=3)
    output = vector_quantize(**{name: value.detach().to("meta") for name, value in inputs.items()}, groups=3)
    for value, other in zip(output, real, strict=True):
        assert value.is_meta
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
