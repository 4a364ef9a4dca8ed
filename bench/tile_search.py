"""Time a kernel in many tiles on a GPU: how the pinned tiles of ``regvq_fast/dispatch.py`` are found.

    python bench/tile_search.py vector_quantize_backward            N = 1024, bf16, D = 256
    python bench/tile_search.py assign_codes --codes 8192 --width 64 --dtype float16

Tried are the pinned tile and its neighbours, and those with other steps over the channels. All are compiled first, on
every core; then they are timed one after the other as CUDA graphs, launches hidden. Results go to standard output,
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
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench_ops import ASSIGN, INFO_NCE, QUANTIZE, STEP, Case
from measuring import Run, describe_machine

from regvq_fast import dispatch
from regvq_fast.dispatch import Tile
from regvq_fast.kernels import vector_quantize, vector_quantize_backward, weighted_info_nce

NO_CUDA = "bench/tile_search.py measures on a CUDA GPU, and PyTorch finds none on this machine."
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
            return Case(INFO_NCE, STEP, self.codes, self.dtype, self.width, max(1, 65536 // self.codes))
        op, part = (ASSIGN, "assign") if self.kernel == ASSIGN else (QUANTIZE, STEP)
        return Case(op, part, self.codes, self.dtype, self.width)

    def prepare(self, device: str) -> Run:
        """Return a warm call of the op, which launches the kernel."""
        run = self.case.prepare(device)[0]["ours"]()
        run()
        return run

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


@functools.lru_cache(maxsize=1)
def _prepared(search: Search, device: str) -> Run:
    return search.prepare(device)


def compile_tile(search: Search, tile: Tile, device: str) -> None:
    """Compile a tile, which is then on disk for other processes; what fails will fail again when it is timed."""
    with contextlib.suppress(Exception), launched_with(search.kernel, tile):
        _prepared(search, device)()


def time_tiles(search: Search, tiles: list[Tile], device: str, clock: Callable[[Run], float]) -> dict[Tile, Any]:
    """Return milliseconds of the op by tile, fastest first, then the errors of those that don't run.

    What differs between two tiles is the kernel's.
    """
    times: dict[Tile, float] = {}
    errors: dict[Tile, str] = {}
    run = search.prepare(device)
    for tile in tiles:
        try:
            with launched_with(search.kernel, tile):
                times[tile] = clock(run)
        except Exception as error:  # too many registers, too much shared memory: whatever it is, the tile is out
            errors[tile] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return dict(sorted(times.items(), key=lambda pair: pair[1])) | errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--codes", type=int, default=1024, help="N; of InfoNCE, L")
    parser.add_argument("--width", type=int, default=256, help="D; of InfoNCE, C")
    types = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=types, default="bfloat16", help="of the inputs")
    search = Search(**vars(parser.parse_args()))
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    from triton.testing import do_bench_cudagraph

    clock = functools.partial(do_bench_cudagraph, rep=10, return_mode="median")
    tiles, spawn = search.tiles("cuda"), multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), spawn) as pool:
        list(pool.map(functools.partial(compile_tile, search, device="cuda"), tiles))
    print(f"{search.kernel}: {search.case.name}; pinned: {tiles[0]}\n{describe_machine('cuda')}")
    for tile, found in time_tiles(search, tiles, "cuda", clock).items():
        print(found if isinstance(found, str) else f"{1e3 * found:9.1f} us", tile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
