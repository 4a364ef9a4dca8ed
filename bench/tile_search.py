"""Time a kernel in many tiles on a GPU: how the pinned tiles of ``regvq_fast/dispatch.py`` are found.

    python bench/tile_search.py vector_quantize_backward            N = 1024 and 8192, bf16, D = 256
    python bench/tile_search.py vector_quantize assign_codes --codes 8192 --width 64 --dtype float16 --out tiles.json

Tried are the pinned tile and its neighbours, and those with other steps over the channels. All are compiled first, on
every core; then they are timed one after the other as CUDA graphs, launches hidden. A tile that spills registers, or
doesn't fit, is reported and not timed. Results go to standard output, fastest first, and to ``--out`` as JSON.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measuring
import torch
from bench_ops import ASSIGN, STEP, Case, InfoNce, Quantize
from triton.runtime.jit import JITFunction

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
        kind: type[Case] = InfoNce if self.kernel.startswith("weighted_info_nce") else Quantize
        return kind(ASSIGN if self.kernel == "assign_codes" else STEP, self.codes, self.dtype, self.width)

    def prepare(self, device: str) -> measuring.Run:
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


@contextmanager
def launched_with(kernel: str, tile: Tile) -> Iterator[None]:
    """Launch ``kernel`` with ``tile`` instead of its pinned one inside."""
    names = []

    def chosen(name: str, *inputs: Any) -> Tile:
        names.append(name)
        return tile if name == kernel else dispatch.pinned_tile(name, *inputs)

    with ExitStack() as stack:
        for module in (vector_quantize, vector_quantize_backward, weighted_info_nce):
            stack.enter_context(mock.patch.object(module, "pinned_tile", chosen))
        yield
    assert kernel in names, f"the op does not launch {kernel} here"


@functools.lru_cache(maxsize=1)
def _prepared(search: Search, device: str) -> measuring.Run:
    return search.prepare(device)


def try_tile(search: Search, tile: Tile, device: str) -> str:
    """Return why a tile can't be used, "" if it can. It is compiled, and is on disk for other processes."""
    spills, launch_kernel = [0], JITFunction.run

    def record(self: Any, *args: Any, **options: Any) -> Any:
        compiled = launch_kernel(self, *args, **options)
        if options.get("BK") == tile.BK and options.get("BM") == tile.BM:  # not the small kernels beside
            spills.append(compiled.n_spills or 0)
        return compiled

    try:
        run = _prepared(search, device)
        with launched_with(search.kernel, tile), mock.patch.object(JITFunction, "run", record):
            run()
            torch.cuda.synchronize()
    except Exception as error:  # too many registers, too much shared memory: whatever it is, the tile is out
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return f"spills {max(spills)} registers" if any(spills) else ""


def time_tiles(search: Search, tiles: list[Tile], device: str, clock: Callable[[measuring.Run], float]) -> Any:
    """Return milliseconds of the op by tile, fastest first: what differs between two tiles is the kernel's."""
    times, run = {}, search.prepare(device)
    for tile in tiles:
        with launched_with(search.kernel, tile):
            times[tile] = clock(run)
    return dict(sorted(times.items(), key=lambda pair: pair[1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: all; {', '.join(KERNELS)}")
    parser.add_argument("--codes", nargs="+", type=int, default=[1024, 8192], help="N; of InfoNCE, L")
    parser.add_argument("--width", nargs="+", type=int, default=[256], help="D; of InfoNCE, C")
    types = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", nargs="+", choices=types, default=["bfloat16"], help="of the inputs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(KERNELS):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}; choose from {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    from triton.testing import do_bench_cudagraph

    clock = functools.partial(do_bench_cudagraph, rep=10, return_mode="median")
    sizes = (options.kernels or KERNELS, options.codes, options.width, options.dtype)
    jobs = {search: search.tiles("cuda") for search in itertools.starmap(Search, itertools.product(*sizes))}
    spawn = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
    found: dict[str, Any] = {"machine": measuring.describe_machine("cuda"), "records": []}
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), spawn) as pool:
        tried = {
            search: [pool.submit(try_tile, search, tile, "cuda") for tile in tiles] for search, tiles in jobs.items()
        }
        for search, tiles in jobs.items():
            problems = dict(zip(tiles, (future.result() for future in tried[search]), strict=True))
            concurrent.futures.wait([future for futures in tried.values() for future in futures])
            times = time_tiles(search, [tile for tile in tiles if not problems[tile]], "cuda", clock)
            print(f"{search.kernel}: {search.case.name}; pinned: {tiles[0]}")
            for tile in [*times, *(tile for tile in tiles if problems[tile])]:
                result = {"ms": times.get(tile), "problem": problems[tile], "pinned": tile == tiles[0]}
                found["records"].append(search._asdict() | dataclasses.asdict(tile) | result)
                print(f"{1e3 * times[tile]:9.1f} us" if tile in times else f"{problems[tile]:>12}", tile, flush=True)
            if options.out:
                measuring.save(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
