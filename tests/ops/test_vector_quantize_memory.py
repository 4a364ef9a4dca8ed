"""Memory of ``vector_quantize``: tiles and kept scores, which change no result, and what a step takes at its peak."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.vq_cases import LOGITS, assert_same, make_inputs, outputs_and_gradients

from regvq_fast.ops import tiling, vector_quantize


def set_kept(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Let calls of no more scores keep them for their backward, with noise or without."""
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", elements)
    monkeypatch.setattr(tiling, "NOISY_KEPT_ELEMENTS", elements)


@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("elements", [1, 11 * 40, 1 << 30])
@pytest.mark.parametrize("logits", LOGITS)
def test_neither_tiles_nor_kept_scores_change_anything(monkeypatch, logits, elements, kept, codebook_grad):
    inputs = make_inputs(logits, num_rows=150, mask="random")
    expected = outputs_and_gradients(vector_quantize, inputs, groups=3, codebook_grad=codebook_grad)
    set_kept(monkeypatch, kept)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    results = outputs_and_gradients(vector_quantize, inputs, groups=3, codebook_grad=codebook_grad)
    for name in ("quantized", "indices", "best_indices", "posterior", "perturbation"):
        assert torch.equal(results[name], expected[name])
    assert_same(results, expected)


def test_tiles_of_mixed_rows_as_on_a_gpu_give_the_same_result(monkeypatch):
    inputs = make_inputs(num_rows=150, mask="random")
    expected = outputs_and_gradients(vector_quantize, inputs, groups=3, tau=0.3)
    set_kept(monkeypatch, 0)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1600)
    module = sys.modules["regvq_fast.ops.vector_quantize_fallback"]
    monkeypatch.setattr(module, "_order_rows", lambda mask: (torch.arange(len(mask)), len(mask)))
    results = outputs_and_gradients(vector_quantize, inputs, groups=3, tau=0.3)
    assert torch.equal(results["indices"], expected["indices"])
    assert_same(results, expected)


@pytest.mark.parametrize("logits", ["distance", "linear with bias"])
def test_only_few_scores_are_kept_for_the_backward(monkeypatch, logits):
    inputs = make_inputs(logits, num_rows=500, num_codes=400, width=8, dtype=torch.float32)

    def largest_saved():
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            vector_quantize(**inputs)
        return max(saved)

    assert largest_saved() == 500 * 400 <= tiling.KEPT_ELEMENTS
    set_kept(monkeypatch, 500 * 400 - 1)
    assert largest_saved() == 500 * 8


def test_keeping_the_noisy_scores_alone_changes_nothing(monkeypatch):
    inputs = make_inputs(num_rows=150, mask="random")
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1600)
    expected = outputs_and_gradients(vector_quantize, inputs, groups=3)
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", 0)
    results = outputs_and_gradients(vector_quantize, inputs, groups=3)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-12, atol=1e-12)


def test_a_backward_leaves_what_was_kept_to_the_next_one():
    inputs = make_inputs(mask="random")
    output = vector_quantize(**inputs)
    loss = output.quantized.square().sum() + output.posterior.square().sum()
    first, second = (torch.autograd.grad(loss, inputs["x"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def peak_of_allocations(function) -> int:
    """Most bytes that were allocated at one time inside ``function``, from the allocator's own log."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    # profile.events() folds what an op allocates and frees into one number; the raw log has every step.
    log = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(log, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_temporary_memory_does_not_grow_with_the_rows(monkeypatch):
    set_kept(monkeypatch, 0)  # as in calls of more scores

    def peak(num_rows):
        inputs = make_inputs(num_rows=num_rows, num_codes=4096, width=4, dtype=torch.float32)
        return peak_of_allocations(lambda: outputs_and_gradients(vector_quantize, inputs))

    small, large = peak(1024), peak(4096)
    tile = 4 * tiling.TILE_ELEMENTS
    assert tile < small < 8 * tile
    assert large - small < tile  # (M, D) and (M,) tensors; one more of (M, N) would be 12 tiles


MEASURE = """
import sys
import torch
from regvq_fast.ops import vector_quantize
from regvq_fast.ops.reference import vector_quantize_reference

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

op = {"fused": vector_quantize, "plain": vector_quantize_reference}[sys.argv[1]]
torch.manual_seed(0)

def run(rows, codes):
    x, codebook = torch.randn(rows, 64).requires_grad_(), torch.randn(codes, 64).requires_grad_()
    output = op(x, codebook, mask=torch.rand(rows) < 0.4, seed=torch.tensor(1))
    (output.quantized.sum() + output.posterior.square().sum()).backward()

run(64, 64)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = status("VmRSS:")
run(4096, 8192)
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_training_step_takes_at_most_a_tenth_of_the_plain_expressions_memory():
    """M = 4096, N = 8192, D = 64, forward and backward, in processes of their own: growth of resident memory in KiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {
        op: subprocess.Popen([sys.executable, "-c", MEASURE, op], stdout=subprocess.PIPE, text=True, env=environment)
        for op in ("fused", "plain")
    }
    growth = {op: int(run.communicate(timeout=300)[0]) for op, run in runs.items()}
    assert growth["plain"] > 4 * 4096 * 8192 / 1024, growth
    assert growth["fused"] <= growth["plain"] / 10, growth
