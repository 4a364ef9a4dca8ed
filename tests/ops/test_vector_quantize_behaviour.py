"""Behaviour of ``vector_quantize`` beyond its formulas: sampling, offsets, edge shapes, precision."""

import pytest
import torch
from helpers.vq_cases import (
    LEAVES,
    LOGITS,
    SEED,
    assert_same,
    copy_leaves,
    make_inputs,
    outputs_and_gradients,
    plain_low_precision,
)

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.reference import vector_quantize_reference

# --------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("scale", [0.1, 0.3])
@pytest.mark.parametrize("logits", ["distance", "linear with bias"])
def test_stochastic_rows_sample_the_softmax_of_their_scores(logits, scale):
    """argmax(s + g) is a sample of softmax(s): chi-square over 40,000 rows that share one x."""
    num_rows, num_codes = 40_000, 7
    inputs = make_inputs(logits, "no mask", 1, num_codes, 3, torch.float32)
    x = inputs.pop("x").detach()
    mask = torch.ones(num_rows, dtype=torch.bool)
    output = vector_quantize(x.expand(num_rows, 3), **inputs, scale=scale, mask=mask, seed=SEED)
    if logits == "distance":
        scores = -scale * (x - inputs["codebook"]).square().sum(1)
    else:
        scores = scale * inputs["weight"] @ x[0] + inputs["bias"]
    expected = scores.detach().double().softmax(0) * num_rows
    chi_square = ((output.indices.bincount(minlength=num_codes) - expected).square() / expected).sum()
    assert expected.min() > 5
    assert chi_square < 22.46  # 0.1 % point with 6 degrees of freedom


def test_deterministic_rows_ignore_noise_and_temperature():
    inputs = make_inputs(mask="random", num_rows=64)
    noisy = outputs_and_gradients(vector_quantize, inputs, tau=0.3)
    plain = outputs_and_gradients(vector_quantize, inputs | {"mask": None, "seed": None})
    calm = ~inputs["mask"]
    for name in ("quantized", "indices", "best_indices"):
        assert torch.equal(noisy[name][calm], plain[name][calm])
    torch.testing.assert_close(noisy["d x"][calm], plain["d x"][calm], rtol=1e-12, atol=1e-12)
    assert torch.equal(noisy["best_indices"], plain["indices"])
    assert (noisy["perturbation"][calm] == 0).all()
    assert (noisy["perturbation"][inputs["mask"]] > 0).any()


def test_the_perturbation_is_the_squared_distance_to_the_best_code():
    inputs = make_inputs(mask="all")
    output = vector_quantize(**inputs)
    difference = inputs["codebook"][output.indices] - inputs["codebook"][output.best_indices]
    torch.testing.assert_close(output.perturbation, difference.square().sum(1).detach())


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    inputs = make_inputs(mask="all", num_rows=200)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = vector_quantize(**inputs).indices
    other = vector_quantize(**inputs | {"seed": torch.tensor(5)}).indices
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------------ row offsets


def test_a_row_offset_may_be_a_tensor():
    inputs = make_inputs(num_rows=40, mask="all")
    offset = 2**32 - 30
    expected = outputs_and_gradients(vector_quantize, inputs, row_offset=offset)
    assert_same(outputs_and_gradients(vector_quantize, inputs, row_offset=torch.tensor(offset)), expected, 0)


def test_two_halves_with_their_offsets_are_the_whole():
    inputs = make_inputs(num_rows=40, mask="all")
    start = 2**32 - 30  # the boundary of the row's low word lies inside
    whole = outputs_and_gradients(vector_quantize, inputs, ("posterior",), groups=2, row_offset=start)
    for half in (slice(0, 20), slice(20, 40)):
        part = inputs | {"x": inputs["x"][half], "mask": inputs["mask"][half]}
        output = vector_quantize(**part, row_offset=start + half.start)
        for name in ("indices", "best_indices", "quantized", "perturbation"):
            assert torch.equal(getattr(output, name), whole[name][half])
        assert torch.equal(output.posterior[0], whole["posterior"][half.start // 20])
    elsewhere = vector_quantize(**inputs, row_offset=start + 1)
    assert not torch.equal(elsewhere.indices, whole["indices"])


def test_two_runs_give_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(num_rows=600, num_codes=300, width=17, dtype=dtype)
        for codebook_grad in ("soft", "hard"):
            first = outputs_and_gradients(vector_quantize, inputs, codebook_grad=codebook_grad)
            assert_same(outputs_and_gradients(vector_quantize, inputs, codebook_grad=codebook_grad), first, 0)


# ------------------------------------------------------------------------------------------------------ edge shapes


@pytest.mark.parametrize(("num_codes", "width"), [(3, 1), (65, 16), (500, 64)])
@pytest.mark.parametrize("logits", LOGITS)
def test_the_smallest_of_identical_codes_wins(logits, num_codes, width):
    inputs = make_inputs(logits, "no mask", 70, num_codes, width, torch.float32)
    doubled = {n: torch.cat([v, v]).detach() if n != "x" else v.detach() for n, v in inputs.items()}
    output = vector_quantize(**doubled)
    assert output.indices.max() < num_codes
    assert torch.equal(output.indices, vector_quantize(**inputs).indices)


def test_identical_codes_share_the_noise_of_nobody():
    """The noise belongs to the code's number: of two identical codes each is sampled about half of the time."""
    mask = torch.ones(4000, dtype=torch.bool)
    indices = vector_quantize(torch.zeros(4000, 2), torch.ones(2, 2), mask=mask, seed=SEED).indices
    assert abs(indices.double().mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_unused_codes_have_no_posterior_and_only_the_soft_gradient():
    inputs = make_inputs(mask="no mask")
    far = inputs["codebook"].detach().clone()
    far[3:] = 100.0
    inputs["codebook"] = far.requires_grad_()
    for codebook_grad in ("soft", "hard"):
        results = outputs_and_gradients(vector_quantize, inputs, codebook_grad=codebook_grad)
        assert (results["posterior"][:, 3:] == 0).all()
        assert (results["d codebook"][3:] == 0).all()  # softmax of -50,000 underflows to an exact zero
        assert (results["d codebook"][:3] != 0).all()


@pytest.mark.parametrize("groups", [1, 3, 24])
def test_every_posterior_sums_to_one(groups):
    output = vector_quantize(**make_inputs(dtype=torch.float32), groups=groups)
    assert output.posterior.shape == (groups, 11)
    assert output.posterior.dtype == torch.float32
    torch.testing.assert_close(output.posterior.sum(1), torch.ones(groups))


@pytest.mark.parametrize("mask", ["no mask", "all"])
@pytest.mark.parametrize("codebook_grad", ["soft", "hard", "none"])
@pytest.mark.parametrize("logits", LOGITS)
def test_no_rows(logits, codebook_grad, mask):
    inputs = make_inputs(logits, mask, num_rows=0)
    results = outputs_and_gradients(vector_quantize, inputs, groups=2, codebook_grad=codebook_grad)
    assert results["quantized"].shape == (0, 5)
    assert results["posterior"].tolist() == [[0] * 11] * 2
    assert all((results[f"d {name}"] == 0).all() for name in LEAVES if name in inputs)


def test_a_single_code_takes_every_row_and_gets_no_softmax_gradient():
    results = outputs_and_gradients(vector_quantize, make_inputs(num_codes=1))
    assert (results["indices"] == 0).all()
    assert results["posterior"].tolist() == [[1]]
    assert (results["d x"] == 0).all()


def test_leading_dimensions_are_rows_in_order():
    inputs = make_inputs(num_rows=24)
    flat = outputs_and_gradients(vector_quantize, inputs, groups=4)
    folded = inputs | {
        "x": inputs["x"].detach().view(2, 3, 4, 5).requires_grad_(),
        "mask": inputs["mask"].view(2, 3, 4),
    }
    results = outputs_and_gradients(vector_quantize, folded, groups=4)
    assert results["indices"].shape == results["perturbation"].shape == (2, 3, 4)
    shaped = {n: v.reshape(results[n].shape) for n, v in flat.items()}
    assert_same(results, shaped, 0)


@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
@pytest.mark.parametrize("logits", ["distance", "linear"])
def test_strides_of_the_inputs_do_not_matter(logits, codebook_grad):
    inputs = make_inputs(logits)
    strided = dict(inputs)
    for name in LEAVES:
        if name in inputs:
            strided[name] = inputs[name].detach().t().contiguous().t().requires_grad_()
            assert not strided[name].is_contiguous()
    strided["mask"] = torch.stack([inputs["mask"], ~inputs["mask"]], 1)[:, 0]
    results = outputs_and_gradients(vector_quantize, strided, codebook_grad=codebook_grad)
    assert_same(results, outputs_and_gradients(vector_quantize, inputs, codebook_grad=codebook_grad))


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook_grad", ["soft", "none"])
@pytest.mark.parametrize("logits", LOGITS)
def test_the_error_is_at_most_that_of_plain_pytorch_in_the_same_type(logits, codebook_grad, dtype):
    inputs = make_inputs(logits, num_rows=60, num_codes=33, width=8, dtype=dtype)
    settings = {"codebook_grad": codebook_grad, "few_digits": False}
    truth = outputs_and_gradients(vector_quantize_reference, copy_leaves(inputs, torch.float64), **settings)
    ours = outputs_and_gradients(vector_quantize, inputs, **settings)
    plain = outputs_and_gradients(plain_low_precision, inputs, **settings)
    assert ours["quantized"].dtype == dtype
    for name in (f"d {leaf}" for leaf in LEAVES if leaf in inputs):
        assert ours[name].dtype == dtype
        size = truth[name].abs().max().clamp(min=1)
        error, allowed = ((v[name].double() - truth[name]).abs().max() / size for v in (ours, plain))
        # fp32 against fp32 is a matter of luck by a few roundings, which depend on the CPU; half types win or tie.
        roundings = 4 if dtype == torch.float32 else 2
        assert error <= allowed + roundings * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits", LOGITS)
def test_the_selected_code_has_the_best_score_within_rounding(logits, dtype):
    inputs = make_inputs(logits, "all", num_rows=500, num_codes=257, width=16, dtype=dtype)
    output = vector_quantize(**inputs)
    exact = {n: v.detach().double() for n, v in inputs.items() if n in LEAVES}
    if logits == "distance":
        scores = -torch.cdist(exact["x"], exact["codebook"]).square()
    else:
        scores = exact["x"] @ exact["weight"].t() + exact.get("bias", 0.0)
    noisy = scores + gumbel_noise(SEED, torch.arange(500), 257).double()
    for values, indices in ((scores, output.best_indices), (noisy, output.indices)):
        missed = values.amax(1) - values.gather(1, indices[:, None]).squeeze(1)
        assert missed.max() <= 1e-4  # fp32 accumulation on scores of size 100, whatever the type of the inputs
    assert torch.equal(output.quantized, inputs["codebook"][output.indices])
