"""Time a kernel in many tiles on a GPU: how the pinned tiles of ``regvq_fast/dispatch.py`` are found.

    python bench/tile_search.py vector_quantize_backward            N = 1024 and 8192, bf16, D = 256
    python bench/tile_search.py vector_quantize assign_codes --codes 8192 --width 64 --dtype float16 --out tiles.json

Tried are the pinned tile and its neighbours, and those with other steps over the channels: 135 at most. All are
compiled first, on every core; then they are timed one after the other as CUDA graphs, launches hidden. A tile that
spills registers, or doesn't fit, is reported and not timed. Results go to standard output, fastest first, and to
``--out`` as JSON.
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
from typing import Any
from unittest import mock

import gpu_cases
import gpu_info_nce
import machine
import records
import torch
from gpu_cases import Case
from gpu_info_nce import InfoNceCase
from peers import TensorRun
from triton.runtime.jit import JITFunction

from regvq_fast import dispatch
from regvq_fast.dispatch import Tile
from regvq_fast.kernels import vector_quantize, vector_quantize_backward, weighted_info_nce

NO_CUDA = "bench/tile_search.py measures on a CUDA GPU, and PyTorch finds none on this machine."
STEPS = (64, 128, 256)  # BK
# Those that the benchmarks' cases launch: distance logits, one posterior.
KERNELS = tuple(name for name in dispatch.KERNELS if not name.endswith("_heavy"))


@dataclasses.dataclass(frozen=True)
class Search:
    """A kernel and what it is called on; of InfoNCE the codes are the places of a map."""

    kernel: str
    codes: int
    width: int
    dtype: str

    @property
    def case(self) -> Case | InfoNceCase:
        if self.kernel.startswith("weighted_info_nce"):
            return InfoNceCase("forward+backward", self.codes, self.width, self.dtype)
        part = "assign" if self.kernel == "assign_codes" else "forward+backward"
        return Case(part, self.codes, self.dtype, width=self.width)

    def prepare(self, device: str) -> TensorRun:
        """A call of the op, warm, that launches the kernel."""
        op: Any = gpu_info_nce if isinstance(self.case, InfoNceCase) else gpu_cases
        run: TensorRun = op.competitors(self.case, op.make_inputs(self.case, device))["ours"]()
        run()
        return run

    def tiles(self, device: str) -> list[Tile]:
        pinned = dispatch.pinned_tile(self.kernel, getattr(torch, self.dtype), self.width, torch.device(device))
        around = neighbours(pinned)
        stepping = [
            dataclasses.replace(tile, BK=step)
            for step in STEPS
            for tile in around
            if step <= self.width and tile.num_stages == pinned.num_stages
        ]
        return list(dict.fromkeys([*around, *stepping]))


@contextmanager
def launched_with(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, ``kernel`` is launched with ``tile`` instead of its pinned one."""

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
def _prepared(search: Search, device: str) -> TensorRun:
    return search.prepare(device)


def try_tile(search: Search, tile: Tile, device: str) -> str:
    """Why a tile can't be used, "" if it can. It is compiled, and is on disk for other processes."""
    spills = []
    launch_kernel = JITFunction.run

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


def time_tiles(search: Search, tiles: list[Tile], device: str, clock: Callable[[Callable[[], Any]], float]) -> Any:
    """Milliseconds of the op by tile, fastest first: what differs between two tiles is the kernel's."""
    times: dict[Tile, float] = {}
    run = search.prepare(device)
    for tile in tiles:
        with launched_with(search.kernel, tile):
            times[tile] = clock(run)
    return dict(sorted(times.items(), key=lambda pair: pair[1]))


def neighbours(pinned: Tile) -> list[Tile]:
    """The pinned tile first, then those with half or twice its rows, codes, warps, and one stage more or fewer."""
    shapes = itertools.product(
        (pinned.BM, pinned.BM // 2, pinned.BM * 2),
        (pinned.BN, pinned.BN // 2, pinned.BN * 2),
        (pinned.num_warps, pinned.num_warps // 2, pinned.num_warps * 2),
        (pinned.num_stages, pinned.num_stages - 1, pinned.num_stages + 1),
    )
    return [
        Tile(BM, BN, pinned.BK, warps, stages)
        for BM, BN, warps, stages in shapes
        if 16 <= BM <= 256 and 16 <= BN <= 256 and 2 <= warps <= 16 and 1 <= stages <= 5
    ]


def report(search: Search, times: dict[Tile, float], bad: dict[Tile, str], pinned: Tile) -> str:
    def name(tile: Tile) -> str:
        mark = "  <- pinned" if tile == pinned else ""
        return f"{tile.BM} x {tile.BN} x {tile.BK}, {tile.num_warps} warps, {tile.num_stages} stages{mark}"

    lines = [f"{search.kernel}: {search.case.name}"]
    lines += [f"{1e3 * ms:9.1f} us  {name(tile)}" for tile, ms in times.items()]
    return "\n".join(lines + [f"{'-':>9}     {name(tile)}: {reason}" for tile, reason in bad.items()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: all; {', '.join(KERNELS)}")
    parser.add_argument("--codes", nargs="+", type=int, default=[1024, 8192], help="N; of InfoNCE, L")
    parser.add_argument("--width", nargs="+", type=int, default=[256], help="D; of InfoNCE, C")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"], help="of the inputs"
    )
    parser.add_argument("--out", type=records.path_to_write, help="JSON to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(KERNELS):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}; choose from {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    sizes = [(codes, width, dtype) for codes in options.codes for width in options.width for dtype in options.dtype]
    searches = [Search(kernel, *size) for kernel in options.kernels or KERNELS for size in sizes]
    jobs = [(search, tile) for search in searches for tile in search.tiles("cuda")]
    spawn = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
    workers = max(1, (os.cpu_count() or 2) - 1)
    problems: dict[tuple[Search, Tile], str] = {}
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        futures = {pool.submit(try_tile, *job, "cuda"): job for job in jobs}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            problems[futures[future]] = future.result()
            print(f"\rcompiled {done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    def clock(run: Callable[[], Any]) -> float:
        import triton

        return float(triton.testing.do_bench_cudagraph(run, rep=10, return_mode="median"))

    found: list[dict[str, Any]] = []
    for search in searches:
        tiles = search.tiles("cuda")
        bad = {tile: problems[search, tile] for tile in tiles if problems[search, tile]}
        times = time_tiles(search, [tile for tile in tiles if tile not in bad], "cuda", clock)
        print(report(search, times, bad, tiles[0]), flush=True)
        rows = [dataclasses.asdict(tile) | {"ms": ms} for tile, ms in times.items()]
        rows += [dataclasses.asdict(tile) | {"problem": reason} for tile, reason in bad.items()]
        found.append(dataclasses.asdict(search) | {"pinned": dataclasses.asdict(tiles[0]), "tiles": rows})
        if options.out:
            where = machine.describe_gpu() | machine.describe_software()
            records.save(options.out, {"machine": where, "searches": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
