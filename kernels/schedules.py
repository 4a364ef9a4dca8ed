"""Which way a product goes and in what tiles: the one table, by architecture, type, width and number of codes.

Two schedules compute the same function:

- ``fused``: the kernels multiply tiles with ``tl.dot`` on the tensor cores and use the product where it is. From
  sm_80 on.
- ``chunked``: cuBLAS multiplies a chunk of rows into a buffer and the kernels read it there. Below sm_80, where
  Triton's ``tl.dot`` has no tensor cores, and wherever it measures better.

Tiles are pinned, so that a call costs no search and gives the same bits in every process. ``REGVQ_AUTOTUNE=1`` searches
the neighbours of the pinned ones instead, once for each kind of call; ``REGVQ_SCHEDULE=fused|chunked`` overrides
the schedule, to measure one against the other.

On sm_90 the tiles of 16-bit inputs with D = 256 (InfoNCE: C = 128 and 512) are the fastest without spills of those
tried on an H200. All others follow from counting registers and shared memory, and from the resource reports of
ahead-of-time compilation (``python bench/kernel_resources.py``).
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
import triton

T = TypeVar("T")

# Scores of a chunk of rows in backward, in all and at least in rows: two buffers of half precision (fused), or two of
# fp32 more (chunked). Large enough for full-speed products, a fixed number of MiB whatever M. A chunk of few rows would
# read and write the codes' gradients too often.
CHUNK_SCORES = 1 << 25
MIN_CHUNK_ROWS = 512
# Rows that are ordered together at most: stochastic tiles begin first, and ranking a window takes its length squared.
# Larger chunks are whole windows.
ORDER_WINDOW = 1 << 16


@dataclass(frozen=True)
class Tile:
    """A kernel's tile: BM rows, BN codes, BK channels at a time, warps and pipeline stages of a program."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        # Triton 3.10 turns contraction to fused multiply-adds off unless it is asked for.
        return asdict(self) | {"enable_fp_fusion": True}


# Fused kernels by generation, on 16-bit and on 32-bit inputs, by the largest width (None: any). A width within BK is
# loaded once for a tile of rows and stays; a larger one goes through in steps of BK for every tile of codes.
Tiles = dict[int | None, Tile]
_STAYING: Tiles = {128: Tile(128, 64, 128, 8, 3), 256: Tile(128, 64, 256, 8, 2), None: Tile(128, 64, 64, 8, 3)}
_STEPPING: Tiles = {None: Tile(64, 64, 64, 8, 2)}
_NARROW: Tiles = {64: Tile(128, 32, 64, 8, 3)}
_TWO_PRODUCTS: Tiles = {128: Tile(128, 32, 128, 8, 2), 256: Tile(64, 32, 256, 4, 2), None: Tile(64, 64, 64, 8, 2)}
_SMALL: Tiles = {None: Tile(64, 64, 32, 8, 2)}
_SMALL_DEEP: Tiles = {64: Tile(64, 64, 32, 8, 3), None: Tile(64, 64, 32, 8, 2)}
_SMALLER: Tiles = {None: Tile(64, 32, 16, 8, 2)}
_FUSED: dict[int, dict[str, tuple[Tiles, Tiles]]] = {
    80: {
        "vector_quantize": (_STAYING | {None: Tile(128, 64, 64, 8, 2)}, _SMALLER),
        "assign_codes": (_STAYING, {None: Tile(64, 64, 32, 4, 3)}),
        "vector_quantize_backward": (_TWO_PRODUCTS, _SMALLER),
        "vector_quantize_backward_heavy": (_TWO_PRODUCTS, _SMALLER),
        "weighted_info_nce": (_STAYING, _SMALLER),
        "weighted_info_nce_backward": (_STAYING, _SMALLER),
    },
    # A100's instructions with 99 KiB of shared memory: sm_86, sm_89, sm_120.
    86: {
        "vector_quantize": (_STEPPING, _SMALLER),
        "assign_codes": (_STEPPING, {None: Tile(64, 64, 32, 4, 3)}),
        "vector_quantize_backward": (_STEPPING, _SMALLER),
        "vector_quantize_backward_heavy": (_STEPPING, _SMALLER),
        "weighted_info_nce": ({128: Tile(64, 64, 128, 8, 2), None: Tile(64, 64, 64, 8, 2)}, _SMALLER),
        "weighted_info_nce_backward": (_STEPPING, _SMALLER),
    },
    90: {
        "vector_quantize": (_STAYING | {256: Tile(64, 64, 256, 4, 2)}, _SMALL),
        "assign_codes": (
            {128: Tile(128, 128, 128, 8, 3), 256: Tile(128, 128, 256, 8, 2), None: Tile(128, 64, 64, 8, 3)},
            {None: Tile(64, 64, 32, 4, 3)},
        ),
        "vector_quantize_backward": (_STAYING | {None: Tile(64, 64, 64, 8, 3)}, _SMALL),
        "vector_quantize_backward_heavy": ({256: Tile(64, 64, 256, 8, 2), None: Tile(64, 64, 64, 8, 3)}, _SMALL),
        "weighted_info_nce": (_STAYING | {None: Tile(128, 128, 64, 8, 4)}, {None: Tile(64, 64, 32, 4, 3)}),
        "weighted_info_nce_backward": (_STAYING | {None: Tile(128, 128, 64, 8, 4)}, {None: Tile(64, 64, 32, 4, 3)}),
    },
    100: {
        "vector_quantize": (_STAYING | {256: Tile(128, 64, 256, 4, 2)}, _SMALL_DEEP),
        "assign_codes": (_STAYING | {128: Tile(128, 128, 128, 8, 3)}, {None: Tile(64, 64, 32, 4, 3)}),
        "vector_quantize_backward": (
            _NARROW | {256: Tile(64, 64, 256, 4, 2), None: Tile(64, 64, 64, 8, 3)},
            _SMALL_DEEP,
        ),
        "vector_quantize_backward_heavy": (
            _NARROW | {256: Tile(64, 64, 256, 8, 2), None: Tile(64, 64, 64, 8, 3)},
            _SMALL,
        ),
        "weighted_info_nce": (_STAYING | {None: Tile(128, 128, 64, 8, 3)}, _SMALL),
        "weighted_info_nce_backward": (_STAYING, _SMALL),
    },
}
# Kernels that read their products: few rows, so that many programs share a chunk.
_CHUNKED: dict[str, Tile] = {
    "vector_quantize": Tile(16, 128, 16, 4, 2),
    "assign_codes": Tile(16, 128, 16, 4, 2),
    "vector_quantize_backward": Tile(32, 128, 16, 8, 1),
    "vector_quantize_backward_heavy": Tile(32, 128, 16, 8, 1),
    "weighted_info_nce": Tile(16, 128, 16, 4, 2),
    "weighted_info_nce_backward": Tile(16, 128, 16, 4, 2),
}
KERNELS = tuple(_CHUNKED)


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90; that of the interpreter, which runs on a CPU, is 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def schedule(device: torch.device) -> str:
    """The schedule of a device's kernels, "fused" or "chunked"."""
    wanted = os.environ.get("REGVQ_SCHEDULE", "")
    if wanted not in ("", "fused", "chunked"):
        raise ValueError(f"REGVQ_SCHEDULE must be fused or chunked, got {wanted!r}")
    if wanted == "fused" and capability(device) < 80:
        raise ValueError(
            "REGVQ_SCHEDULE=fused needs tensor cores that Triton can use, sm_80 or newer, and this GPU is "
            f"sm_{capability(device)}: leave it unset"
        )
    return wanted or ("fused" if capability(device) >= 80 else "chunked")


def tile(kernel: str, how: str, dtype: torch.dtype, width: int, device: torch.device) -> Tile:
    """The pinned tile of one of :data:`KERNELS` under a schedule, for inputs of a type and D = ``width`` channels."""
    if how == "chunked":
        return _CHUNKED[kernel]
    architecture = capability(device)
    small_memory = architecture in (86, 87, 89) or architecture >= 120
    generation = 86 if small_memory else max(known for known in _FUSED if known <= architecture)
    tiles = _FUSED[generation][kernel][dtype == torch.float32]
    chosen = next(tile for limit, tile in tiles.items() if limit is None or width <= limit)
    if width >= chosen.BK:
        return chosen
    # No wider than the matrix; 16 channels are the least of a product.
    return replace(chosen, BK=max(16, triton.next_power_of_2(width)))


_tuned: dict[tuple[object, ...], Tile] = {}


def run(
    kernel: str,
    how: str,
    dtype: torch.dtype,
    width: int,
    kind: tuple[object, ...],
    device: torch.device,
    launch: Callable[[Tile], T],
) -> T:
    """``launch`` a kernel with its pinned tile or, with ``REGVQ_AUTOTUNE=1``, with the fastest of the neighbours.

    ``kind`` is what else decides which one that is: sizes and flags of the call. The search calls ``launch`` any number
    of times, and synchronises: warm up before a CUDA graph is captured.
    """
    chosen = tile(kernel, how, dtype, width, device)
    wanted = os.environ.get("REGVQ_AUTOTUNE", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"REGVQ_AUTOTUNE must be 0 or 1, got {wanted!r}")
    if wanted == "1":
        key = (kernel, how, dtype, width, kind, device)
        if key not in _tuned:
            times = {}
            for candidate in neighbours(chosen):
                with contextlib.suppress(triton.runtime.errors.OutOfResources, triton.CompilationError):
                    times[candidate] = milliseconds(functools.partial(launch, candidate))
            _tuned[key] = min(times, key=lambda tile: times[tile])
        chosen = _tuned[key]
    return launch(chosen)


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    return triton.testing.do_bench(run, return_mode="median")


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


def chunk_rows(num_codes: int, least: int | None = None) -> int:
    """Rows of a chunk, ``least`` of them or more (None: as the table says); a multiple of every tile."""
    rows = max(least or MIN_CHUNK_ROWS, CHUNK_SCORES // num_codes)
    return rows // _unit(rows) * _unit(rows)


def equal_chunks(num_rows: int, most: int) -> int:
    """Rows of a chunk so that none is much smaller than the others; a multiple of every tile, at most ``most``."""
    rows = triton.cdiv(num_rows, max(1, triton.cdiv(num_rows, most)))
    return min(most, max(1, triton.cdiv(rows, _unit(rows))) * _unit(rows))


def _unit(rows: int) -> int:
    """What a chunk of about so many rows is a multiple of: of every tile, and of the windows where it has several."""
    return 128 if rows <= ORDER_WINDOW else ORDER_WINDOW


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: fp32 as three TF32 products, which keep 21 bits and more; 16 bits as they are."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


# Where some programs take several times as long as others, so many waves of them leave few multiprocessors waiting for
# the last one.
NOISY_WAVES = 4


def part_codes(num_rows: int, num_codes: int, tile: Tile, least: int, device: torch.device, waves: int = 1) -> int:
    """Codes that one program sweeps, a multiple of BN: all of them, unless rows alone leave the GPU partly idle.

    The fewest parts, of ``least`` codes at least, whose programs come in ``waves`` waves or more that are full to nine
    tenths on average.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    parts = _num_parts(triton.cdiv(num_rows, tile.BM), max(1, num_codes // least), waves, processors)
    return triton.cdiv(triton.cdiv(num_codes, parts), tile.BN) * tile.BN


@functools.lru_cache(1024)  # a search, on every call of an op and chunk
def _num_parts(programs: int, most: int, waves: int, processors: int) -> int:
    def fullness(parts: int) -> float:
        return programs * parts / (max(waves, triton.cdiv(programs * parts, processors)) * processors)

    enough = next((parts for parts in range(1, most + 1) if fullness(parts) >= 0.9), None)
    return enough or max(range(1, most + 1), key=fullness)
