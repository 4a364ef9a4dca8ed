"""``bench/tile_search.py`` on a CPU, with kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import (
    if_kernels_are_elsewhere,
    kernels,
    needs_kernels,
    pass_in_the_interpreter,
    without_interpreter,
)

pytest.importorskip("triton")

import tile_search
from bench_ops import Case
from tile_search import Search

from regvq_fast import dispatch
from regvq_fast.kernels import vector_quantize_backward
from regvq_fast.ops import vector_quantize

CPU = torch.device("cpu")


@if_kernels_are_elsewhere
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


@pytest.mark.parametrize("kernel", tile_search.KERNELS)
def test_the_pinned_tile_comes_first_and_all_are_possible(kernel):
    search = Search(kernel, 1024, 256, "bfloat16")
    tiles = search.tiles("cpu")
    assert tiles[0] == dispatch.pinned_tile(kernel, torch.bfloat16, 256, CPU)
    assert len(set(tiles)) == len(tiles) > 20
    assert {tile.BK for tile in tiles} == {64, 128, 256}
    assert kernel.startswith(search.case.op)


@needs_kernels
def test_each_tile_is_launched_on_the_call_as_it_is(monkeypatch):
    x, codes = (torch.randn(n, 16, requires_grad=True) for n in (40, 70))

    launched = []

    def run():
        launched.append(vector_quantize_backward.pinned_tile("vector_quantize_backward", torch.float32, 16, CPU))
        with kernels("fused"):
            output = vector_quantize(x, codes, impl="triton")
        return torch.autograd.grad(output.quantized.sum(), (x, codes))

    def examine(name, gradients):
        assert len(launched) > 1, "is off"
        return {}

    monkeypatch.setattr(Case, "prepare", lambda self, device: ({"ours": lambda: run}, examine))
    search = Search("vector_quantize_backward", 70, 16, "float32")
    first, second = search.tiles("cpu")[:2]
    assert tile_search.milliseconds(search, first, "cpu", turns=1) == "WrongResultError: is off"
    assert tile_search.milliseconds(search, second, "cpu", turns=1) > 0
    assert launched[0] == first
    assert set(launched[1:]) == {second}
    with pytest.raises(AssertionError, match="does not launch assign_codes"):
        tile_search.milliseconds(Search("assign_codes", 70, 16, "float32"), first, "cpu", turns=0)


@without_interpreter
def test_without_cuda_it_says_so_and_exits_with_2():
    script = Path(tile_search.__file__)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, "vector_quantize_backward"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, "CUDA GPU" in done.stderr) == (2, "", True)
