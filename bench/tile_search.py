"""Time a kernel in many tiles on a GPU: how the pinned tiles of ``regvq_fast/dispatch.py`` are found.

    python bench/tile_search.py vector_quantize_backward            N = 1024, bf16, D = 256
    python bench/tile_search.py assign_codes --codes 8192 --width 64 --dtype float16

Tried are the pinned tile and its neighbours, and those with other steps over the channels. All are compiled first, on
every core; then each is checked and timed as a case of the benchmarks, in a CUDA graph. Results go to standard output,
fastest first, then the tiles that don't fit. `python tests/kernel_resources.py` says which spill registers.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench_ops import ASSIGN, GRAPH, INFO_NCE, QUANTIZE, STEP, Case
from measuring import describe_machine, measure_side_by_side

from regvq_fast import dispatch
from regvq_fast.dispatch import Tile
from regvq_fast.kernels import vector_quantize, vector_quantize_backward, weighted_info_nce

# Those that the benchmarks' cases launch: distance logits, one posterior.
KERNELS = tuple(name for name in dispatch.KERNELS if not name.endswith("_heavy"))


class Search(NamedTuple):
    """A kernel and what it is called on; of InfoNCE the codes are the positions of a map."""

    kernel: str
    codes: int
    width: int
    dtype: str

    @property
    def case(self) -> Case:
        if self.kernel.startswith(INFO_NCE):
            return Case(INFO_NCE, STEP, self.codes, self.dtype, self.width, max(1, 65536 // self.codes), GRAPH)
        op, part = (ASSIGN, "assign") if self.kernel == ASSIGN else (QUANTIZE, STEP)
        return Case(op, part, self.codes, self.dtype, self.width, variant=GRAPH)

    def tiles(self, device: str) -> list[Tile]:
        """Return the pinned tile first, then half or twice its extents, one stage more or fewer, and other steps."""
        pinned = dispatch.pinned_tile(self.kernel, getattr(torch, self.dtype), self.width, torch.device(device))
        extents = ((value, value // 2, value * 2) for value in (pinned.BM, pinned.BN, pinned.num_warps))
        stages = (pinned.num_stages, pinned.num_stages - 1, pinned.num_stages + 1)
        around = [
            Tile(BM, BN, pinned.BK, warps, stages)
            for BM, BN, warps, stages in itertools.product(*extents, stages)
            if 16 <= BM <= 256 and 16 <= BN <= 256 and 2 <= warps <= 16 and 1 <= stages <= 5
        ]
        same = [tile for tile in around if tile.num_stages == pinned.num_stages]
        steps = [step for step in (64, 128, 256) if step <= self.width]
        return list(dict.fromkeys([*around, *(dataclasses.replace(t, BK=step) for step in steps for t in same)]))


@contextlib.contextmanager
def launched_with(kernel: str, tile: Tile) -> Iterator[None]:
    """Launch ``kernel`` with ``tile`` instead of its pinned one inside."""
    names = []

    def chosen(name: str, *inputs: Any) -> Tile:
        names.append(name)
        return tile if name == kernel else dispatch.pinned_tile(name, *inputs)

    with contextlib.ExitStack() as stack:
        for module in (vector_quantize, vector_quantize_backward, weighted_info_nce):
            stack.enter_context(mock.patch.object(module, "pinned_tile", chosen))
        yield
    assert kernel in names, f"the op does not launch {kernel} here"


def milliseconds(search: Search, tile: Tile, device: str = "cuda", turns: int | None = None) -> float | str:
    """Return the time of the op, or why the tile doesn't run; what differs between two tiles is the kernel's."""
    makers, examine = search.case.prepare(device)
    with launched_with(search.kernel, tile):
        outcome = measure_side_by_side({"ours": makers["ours"]}, examine, device, turns=turns)["ours"]
    if isinstance(outcome, Exception):  # too many registers, too much shared memory: whatever it is, the tile is out
        return f"{type(outcome).__name__}: {outcome}".splitlines()[0][:120]
    return 1e3 * statistics.median(outcome[1] or [0.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--codes", type=int, default=1024, help="N; of InfoNCE, L")
    parser.add_argument("--width", type=int, default=256, help="D; of InfoNCE, C")
    types = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=types, default="bfloat16", help="of the inputs")
    search = Search(**vars(parser.parse_args()))
    if not torch.cuda.is_available():
        parser.error("it measures on a CUDA GPU, and PyTorch finds none on this machine")
    tiles, spawn = search.tiles("cuda"), multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), spawn) as pool:
        list(pool.map(functools.partial(milliseconds, search, turns=0), tiles))  # which leaves it on disk, compiled
    print(f"{search}; pinned: {tiles[0]}\n{describe_machine('cuda')}")
    times = {tile: milliseconds(search, tile) for tile in tiles}
    for tile, ms in sorted(times.items(), key=lambda pair: (isinstance(pair[1], str), pair[1])):
        print(ms if isinstance(ms, str) else f"{1e3 * ms:9.1f} us", tile)


if __name__ == "__main__":
    main()
