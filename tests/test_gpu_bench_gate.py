"""The gate of the benchmarks: a result that fp64 doesn't confirm gets no time."""

import gpu_cases
import pytest
import torch
from gpu_cases import Case, WrongResultError

STEP = Case("forward+backward", 24, "float32", rows=96, width=8)
ASSIGN = Case("assign", 24, "float32", rows=96, width=8)


@pytest.fixture(scope="module", params=[STEP, Case("forward", 24, "bfloat16", rows=96, width=8), ASSIGN])
def right(request):
    """A case, its inputs, the truth and a right result of it."""
    case = request.param
    inputs = gpu_cases.make_inputs(case, "cpu")
    return case, inputs, gpu_cases.truth_of(case, inputs), gpu_cases.run_ours(case, inputs)


def test_the_gate_lets_a_right_result_through(right):
    case, *rest = right
    gpu_cases.check(case, *rest)


def _next_code(value):
    wrong = value.clone()
    wrong[5] = (wrong[5] + 1) % 24
    return wrong


def _off(value):
    wrong = value.clone()
    wrong[..., 3] += wrong.abs().max() / 10
    return wrong


def _nan(value):
    wrong = value.clone()
    wrong[..., 3] = torch.nan
    return wrong


def _replaced(results, place, change):
    return (*results[:place], change(results[place]), *results[place + 1 :])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, _off, "quantized isn't"),
        (1, _off, "posterior isn't"),
        (2, _next_code, "indices differ"),
        (2, lambda indices: indices - 24, "indices aren't codes"),
        (3, _next_code, "best_indices differ"),
        (4, _off, "perturbation isn't"),
        (5, _off, "dx is off"),
        (5, _nan, "dx is off by nan"),
        (6, _off, "dcodebook is off"),
    ],
)
def test_the_gate_refuses_a_wrong_step(place, change, message):
    inputs = gpu_cases.make_inputs(STEP, "cpu")
    truth, results = gpu_cases.truth_of(STEP, inputs), gpu_cases.run_ours(STEP, inputs)
    with pytest.raises(WrongResultError, match=message):
        gpu_cases.check(STEP, inputs, truth, _replaced(results, place, change))


def test_the_gate_refuses_another_seeds_indices():
    inputs = gpu_cases.make_inputs(STEP, "cpu")
    other = gpu_cases.run_ours(STEP, inputs._replace(seed=inputs.seed + 1))
    with pytest.raises(WrongResultError, match="indices differ from those of fp64"):
        gpu_cases.check(STEP, inputs, gpu_cases.truth_of(STEP, inputs), other)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_few_rows_may_tie_and_may_not_lose(noisy):
    """On one row in 200 the second best code, at a score that equals the best one's, or doesn't."""
    case = Case("forward", 24, "float64", rows=200, width=8)
    inputs = gpu_cases.make_inputs(case, "cpu")
    mask = torch.full((200,), noisy)
    inputs = inputs._replace(mask=mask)
    indices = gpu_cases.truth_of(case, inputs).indices
    row = 11
    second = (indices[row] + 1) % 24
    chosen = indices.clone()
    chosen[row] = second
    with pytest.raises(WrongResultError, match="miss a better code"):
        gpu_cases.check_indices("indices", chosen, indices, inputs, mask)
    if noisy:
        return
    tied = inputs.codebook.detach().clone()
    tied[second] = tied[indices[row]]  # a duplicate: the two scores are the same
    gpu_cases.check_indices("indices", chosen, indices, inputs._replace(codebook=tied), mask)


def test_the_noise_counts_in_a_tie():
    """Two equal codes: on a stochastic row the noise decides between them, on a deterministic one nothing does."""
    case = Case("forward", 2, "float64", rows=200, width=8)
    inputs = gpu_cases.make_inputs(case, "cpu")
    inputs = inputs._replace(codebook=inputs.codebook.detach()[:1].repeat(2, 1).requires_grad_())
    mask = torch.zeros(200, dtype=torch.bool)
    mask[11] = True
    inputs = inputs._replace(mask=mask)
    indices = gpu_cases.truth_of(case, inputs).indices
    for row, tie in ((11, False), (12, True)):
        other = indices.clone()
        other[row] = 1 - other[row]
        if tie:
            gpu_cases.check_indices("indices", other, indices, inputs, mask)
        else:
            with pytest.raises(WrongResultError, match="miss a better code"):
                gpu_cases.check_indices("indices", other, indices, inputs, mask)


class Replay:
    """Stands for a CUDA graph: fixed outputs, which a replay fills by the seed in the inputs."""

    def __init__(self, inputs, stale=False, shift=0):
        self.inputs, self.stale, self.shift = inputs, stale, shift
        self.outputs = gpu_cases.run_ours(STEP, inputs)

    def __call__(self):
        seed = torch.tensor(123456789) if self.stale else self.inputs.seed + self.shift
        for output, value in zip(self.outputs, gpu_cases.run_ours(STEP, self.inputs._replace(seed=seed)), strict=True):
            output.copy_(value)
        return self.outputs


def test_a_replay_follows_the_seed():
    inputs = gpu_cases.make_inputs(STEP, "cpu")
    call = gpu_cases.make_ours(STEP, inputs)
    gpu_cases.check_replay(STEP, inputs, Replay(inputs), call)
    assert inputs.seed.item() == 123456789


@pytest.mark.parametrize("wrong", ["keeps its seed", "has another seed", "differs from a call"])
def test_a_replay_that_does_not_follow_the_seed_is_refused(wrong):
    inputs = gpu_cases.make_inputs(STEP, "cpu")
    replay = Replay(inputs, stale=wrong == "keeps its seed", shift=int(wrong == "has another seed"))
    call = gpu_cases.make_ours(STEP, inputs)
    other = gpu_cases.run_ours(STEP, inputs)
    message = "new seed differ from a call's" if wrong == "differs from a call" else "indices differ from those of fp64"
    with pytest.raises(WrongResultError, match=message):
        gpu_cases.check_replay(STEP, inputs, replay, (lambda: other) if wrong == "differs from a call" else call)
