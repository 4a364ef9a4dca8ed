"""``bench/tile_search.py`` as far as a CPU can tell, its kernels in Triton's interpreter."""

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
    assert search.case.name.startswith(("vector_quantize", "assign_codes", "weighted_info_nce"))


@needs_kernels
def test_each_tile_is_launched_on_the_call_as_it_is(monkeypatch):
    x, codes = (torch.randn(n, 16, requires_grad=True) for n in (40, 70))

    def prepare(self, device):
        def run():
            with kernels("fused"):
                output = vector_quantize(x, codes, impl="triton")
            return torch.autograd.grad(output.quantized.sum(), (x, codes))

        return run

    monkeypatch.setattr(Search, "prepare", prepare)
    search, launched = Search("vector_quantize_backward", 70, 16, "float32"), []

    def clock(run):
        run()  # an error would be seen
        launched.append(vector_quantize_backward.pinned_tile("vector_quantize_backward", torch.float32, 16, CPU))
        return 1.0 / len(launched)

    tiles = search.tiles("cpu")[:3]
    times = tile_search.time_tiles(search, tiles, "cpu", clock)
    assert launched == tiles
    assert list(times.items()) == [(tiles[2], 1 / 3), (tiles[1], 1 / 2), (tiles[0], 1.0)]  # fastest first

    tile_search.compile_tile(search, tiles[0], "cpu")
    (error,) = set(tile_search.time_tiles(Search("assign_codes", 70, 16, "float32"), tiles, "cpu", clock).values())
    assert error.startswith("AssertionError: the op does not launch assign_codes")


@without_interpreter
def test_without_cuda_it_says_so_and_exits_with_2():
    script = Path(tile_search.__file__)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, "vector_quantize_backward"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [tile_search.NO_CUDA])
