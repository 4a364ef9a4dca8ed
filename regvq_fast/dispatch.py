"""Dispatch of a call: Triton kernels or PyTorch, schedule, tiles.

Two schedules compute the same function in the same kernels:

- ``fused``, from sm_80 on: the kernels multiply tiles with ``tl.dot`` on the tensor cores and keep the products in
  registers.
- ``chunked``, below sm_80, where Triton's ``tl.dot`` has no tensor cores: cuBLAS multiplies a chunk of rows into a
  buffer, which the kernels read.

``REGVQ_SCHEDULE=fused|chunked`` overrides the choice, to measure one against the other.

Tiles are pinned in one table, so that a call needs no search and gives the same bits in every process.
``python bench/tile_search.py`` times neighbouring tiles on a GPU. On sm_90 the tiles of 16-bit inputs with D = 256
(InfoNCE: C = 128 and 512) were the fastest without spills among those tried on an H200. All others were chosen by
counting registers and shared memory, checked by ahead-of-time compilation (``python tests/kernel_resources.py``).
"""

import functools
import importlib.util
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch

Impl = Literal["auto", "triton", "eager"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when the kernels are imported

# Scores of a chunk of rows, large enough for full-speed products and independent of M; and its fewest rows, since every
# chunk reads and writes the codes' gradients.
CHUNK_SCORES = 1 << 25
MIN_CHUNK_ROWS = 512
# The fused backward has only two buffers, so its chunks may have more rows: 4096, with which its products for dx fill a
# GPU (D = 256, tiles of 128 x 128), unless a buffer exceeds these bytes.
FULL_CHUNK_ROWS = 4096
FULL_CHUNK_BYTES = 1 << 29
# Most rows that are ordered together: ranking them takes time quadratic in their number. Larger chunks are a multiple.
ORDER_WINDOW = 1 << 16


class Inputs(NamedTuple):
    """Checked arguments of ``vector_quantize`` for the kernels or the PyTorch fallback.

    [H] is a dimension that only calls with heads have.
    """

    x: torch.Tensor  # (M, [H], D)
    codebook: torch.Tensor  # ([H], N, D)
    weight: torch.Tensor | None  # ([H], N, D), of linear logits
    bias: torch.Tensor | None  # ([H], N), of linear logits
    mask: torch.Tensor | None  # (M,) bool
    seed: torch.Tensor | None  # () int64
    tau: torch.Tensor  # () floating point
    scale: torch.Tensor  # () floating point
    row_offset: torch.Tensor  # () int64
    groups: int
    codebook_grad: str
    valid: torch.Tensor | None = None  # (M,) bool


INPUTS_SCHEMA = (  # in the syntax of torch.library
    "Tensor x, Tensor codebook, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? seed, Tensor tau, Tensor scale, "
    "Tensor row_offset, int groups, str codebook_grad, Tensor? valid"
)


@dataclass(frozen=True)
class Tile:
    """A kernel's tile: BM rows, BN codes, BK channels per step, warps and pipeline stages of a program."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        # Triton 3.10 contracts to fused multiply-adds only on request.
        return asdict(self) | {"enable_fp_fusion": True}


# Tiles by the largest width D that they serve (None: any). Rows of up to BK channels are loaded once; wider ones are
# loaded again, in steps of BK, for every tile of codes.
Tiles = dict[int | None, Tile]
_STAYING: Tiles = {128: Tile(128, 64, 128, 8, 3), 256: Tile(128, 64, 256, 8, 2), None: Tile(128, 64, 64, 8, 3)}
_STEPPING: Tiles = {None: Tile(64, 64, 64, 8, 2)}
# Up to D = 64 the noise dominates: many warps help, but warps that share a row must reduce across warps.
_NARROW: Tiles = {64: Tile(128, 32, 64, 4, 3)}
_NARROW_MORE_WARPS: Tiles = {64: Tile(128, 32, 64, 8, 3)}
_NARROW_BACKWARD: Tiles = {64: Tile(64, 32, 64, 4, 3)}
_TWO_PRODUCTS: Tiles = {128: Tile(128, 32, 128, 8, 2), 256: Tile(64, 32, 256, 4, 2), None: Tile(64, 64, 64, 8, 2)}
_SMALL: Tiles = {None: Tile(64, 64, 32, 8, 2)}
_SMALL_DEEP: Tiles = {64: Tile(64, 64, 32, 8, 3), None: Tile(64, 64, 32, 8, 2)}
# fp32 inputs, which each warp splits into TF32 terms: one warp per 16 rows, since more would split the same rows again.
_FP32_SMALL: Tiles = {None: Tile(64, 32, 32, 4, 2)}
_FP32_SMALL_STAYING: Tiles = {64: Tile(64, 32, 64, 4, 2)}
_FP32_SMALL_HEAVY: Tiles = {
    16: Tile(128, 32, 16, 8, 2),
    64: Tile(64, 32, 32, 4, 2),
    None: Tile(64, 32, 16, 4, 2),
}
_FP32_SQUARE: Tiles = {None: Tile(64, 64, 32, 4, 3)}
_FP32: Tiles = {64: Tile(128, 32, 64, 8, 2), None: Tile(128, 32, 32, 8, 2)}
_FP32_DEEP: Tiles = {None: Tile(128, 32, 64, 8, 2)}
_FP32_WIDE: Tiles = {None: Tile(128, 64, 64, 8, 2)}
# By generation and kernel, for 16-bit and for 32-bit inputs.
_FUSED: dict[int, dict[str, tuple[Tiles, Tiles]]] = {
    80: {
        "vector_quantize": (_NARROW | _STAYING | {None: Tile(128, 64, 64, 8, 2)}, _FP32_SMALL_STAYING | _FP32_SMALL),
        "assign_codes": (_NARROW | _STAYING, _FP32_SQUARE),
        "vector_quantize_backward": (_NARROW_BACKWARD | _TWO_PRODUCTS, _FP32_SMALL),
        "vector_quantize_backward_heavy": (_NARROW_BACKWARD | _TWO_PRODUCTS, _FP32_SMALL_HEAVY),
        "weighted_info_nce": (_NARROW | _STAYING, _FP32_SMALL_STAYING | _FP32_SQUARE),
        "weighted_info_nce_backward": (_NARROW | _STAYING, _FP32_SMALL_STAYING | _FP32_SQUARE),
    },
    # sm_80's instructions with 99 KiB of shared memory: sm_86, sm_89, sm_120.
    86: {
        "vector_quantize": (_STEPPING, _FP32_SMALL_STAYING | _FP32_SMALL),
        "assign_codes": (_STEPPING, _FP32_SQUARE),
        "vector_quantize_backward": (_STEPPING, _FP32_SMALL),
        "vector_quantize_backward_heavy": (_STEPPING, _FP32_SMALL_HEAVY),
        "weighted_info_nce": (
            {128: Tile(64, 64, 128, 8, 2), None: Tile(64, 64, 64, 8, 2)},
            _FP32_SMALL_STAYING | _FP32_SQUARE,
        ),
        "weighted_info_nce_backward": (_STEPPING, _FP32_SMALL_STAYING | _FP32_SQUARE),
    },
    90: {
        "vector_quantize": (_NARROW_MORE_WARPS | _STAYING | {256: Tile(64, 64, 256, 4, 2)}, _FP32_DEEP),
        "assign_codes": (
            {
                64: Tile(128, 64, 64, 4, 3),
                128: Tile(128, 128, 128, 8, 3),
                256: Tile(128, 128, 256, 8, 2),
                None: Tile(128, 64, 64, 8, 3),
            },
            _FP32_WIDE,
        ),
        "vector_quantize_backward": (_NARROW_MORE_WARPS | _STAYING | {None: Tile(64, 64, 64, 8, 3)}, _FP32),
        "vector_quantize_backward_heavy": (
            _NARROW_MORE_WARPS | {256: Tile(64, 64, 256, 8, 2), None: Tile(64, 64, 64, 8, 3)},
            _FP32,
        ),
        "weighted_info_nce": (_STAYING | {None: Tile(128, 128, 64, 8, 4)}, _FP32_WIDE),
        "weighted_info_nce_backward": (
            _STAYING | {None: Tile(128, 128, 64, 8, 4)},
            {64: Tile(128, 64, 64, 8, 2), None: Tile(128, 64, 32, 8, 3)},
        ),
    },
    100: {
        "vector_quantize": (_NARROW | _STAYING | {256: Tile(128, 64, 256, 4, 2)}, _SMALL_DEEP),
        "assign_codes": (_STAYING | {128: Tile(128, 128, 128, 8, 3)}, _FP32_SQUARE),
        "vector_quantize_backward": (
            _NARROW_BACKWARD | {256: Tile(64, 64, 256, 4, 2), None: Tile(64, 64, 64, 8, 3)},
            _SMALL_DEEP,
        ),
        "vector_quantize_backward_heavy": (
            _NARROW_BACKWARD | {256: Tile(64, 64, 256, 8, 2), None: Tile(64, 64, 64, 8, 3)},
            _SMALL,
        ),
        "weighted_info_nce": (_STAYING | {None: Tile(128, 128, 64, 8, 3)}, _SMALL),
        "weighted_info_nce_backward": (_STAYING, _SMALL),
    },
}
# Tiles of the ``chunked`` schedule: few rows, so that a chunk has many programs.
_CHUNKED: dict[str, Tile] = {
    "vector_quantize": Tile(16, 128, 16, 4, 2),
    "assign_codes": Tile(16, 128, 16, 4, 2),
    "vector_quantize_backward": Tile(32, 128, 16, 8, 1),
    "vector_quantize_backward_heavy": Tile(32, 128, 16, 8, 1),
    "weighted_info_nce": Tile(16, 128, 16, 4, 2),
    "weighted_info_nce_backward": Tile(16, 128, 16, 4, 2),
}
KERNELS = tuple(_CHUNKED)


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> Literal["triton", "eager"]:
    """Return the implementation that runs; nothing else decides it."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got {impl!r}")
    if impl == "eager":
        return "eager"
    if impl == "auto":
        return "triton" if device.type == "cuda" and _HAS_TRITON and dtype != torch.float64 else "eager"
    if not _HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton: pip install triton, or use impl='auto'")
    if dtype == torch.float64:
        raise ValueError("impl='triton' has no float64: use impl='eager', or fp32, bf16 or fp16")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl='triton' runs on CUDA tensors, got {device}: use impl='auto', or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels in Triton's interpreter"
        )
    return "triton"


def on_device_of(x: torch.Tensor) -> torch.cuda.device_of:
    """Make the GPU of ``x`` the current device, on which Triton launches; no effect for a CPU tensor."""
    return torch.cuda.device_of(x)


def capability(device: torch.device) -> int:
    """Return the compute capability as one number, 90 for sm_90; also 90 on a CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_chunked(device: torch.device) -> bool:
    """Return whether kernels on a device use the ``chunked`` schedule."""
    wanted = os.environ.get("REGVQ_SCHEDULE", "")
    if wanted not in ("", "fused", "chunked"):
        raise ValueError(f"REGVQ_SCHEDULE must be fused or chunked, got {wanted!r}")
    if wanted == "fused" and capability(device) < 80:
        raise ValueError(
            "REGVQ_SCHEDULE=fused needs tensor cores that Triton can use, sm_80 or newer, and this GPU is "
            f"sm_{capability(device)}: leave it unset"
        )
    return wanted == "chunked" if wanted else capability(device) < 80


def pinned_tile(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Tile:
    """Return the tile of one of :data:`KERNELS` for inputs of a type and D = ``width`` channels."""
    if is_chunked(device):
        return _CHUNKED[kernel]
    architecture = capability(device)
    small_memory = architecture in (86, 87, 89) or architecture >= 120
    generation = 86 if small_memory else max(known for known in _FUSED if known <= architecture)
    tiles = _FUSED[generation][kernel][dtype == torch.float32]
    chosen = next(tile for limit, tile in tiles.items() if limit is None or width <= limit)
    if width >= chosen.BK:
        return chosen
    # No wider than the rows; tl.dot needs 16 channels.
    return replace(chosen, BK=max(16, 1 << (width - 1).bit_length()))


def chunk_rows(num_codes: int, least: int | None = None) -> int:
    """Return the rows of a chunk, at least ``least`` (None: MIN_CHUNK_ROWS), in whole tiles."""
    rows = max(least or MIN_CHUNK_ROWS, CHUNK_SCORES // num_codes)
    return rows // _unit(rows) * _unit(rows)


def fused_backward_rows(num_codes: int, itemsize: int) -> int:
    """Return the rows of a chunk of the fused backward, whose buffers have ``itemsize`` bytes per score.

    They are FULL_CHUNK_ROWS, or fewer to fit FULL_CHUNK_BYTES, but at least CHUNK_SCORES scores and 2 KiB per code.
    """
    full = min(FULL_CHUNK_ROWS, FULL_CHUNK_BYTES // (num_codes * itemsize))
    return chunk_rows(num_codes, max(MIN_CHUNK_ROWS * 4 // itemsize, full))


def equal_chunks(num_rows: int, most: int) -> int:
    """Return the rows of chunks of about equal size, at most ``most``, in whole tiles."""
    rows = _ceil_div(num_rows, max(1, _ceil_div(num_rows, most)))
    return min(most, max(1, _ceil_div(rows, _unit(rows))) * _unit(rows))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _unit(rows: int) -> int:
    """Return the number that a chunk's rows are a multiple of: a tile, or a window if it has several."""
    return 128 if rows <= ORDER_WINDOW else ORDER_WINDOW


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of ``tl.dot``: for fp32 three TF32 products, which keep 21 bits; exact for 16 bits."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


# Waves of programs if some take several times as long as others: with more waves, fewer processors wait at the end.
NOISY_WAVES = 4


def codes_per_split(num_rows: int, num_codes: int, tile: Tile, least: int, device: torch.device, waves: int = 1) -> int:
    """Return the number of codes of a split, a multiple of BN: all of them, unless rows alone do not fill the GPU.

    These are the fewest splits, of at least ``least`` codes, whose programs fill 90 % of at least ``waves`` waves.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    splits = _num_splits(_ceil_div(num_rows, tile.BM), max(1, num_codes // least), waves, processors)
    return _ceil_div(_ceil_div(num_codes, splits), tile.BN) * tile.BN


@functools.lru_cache(1024)  # every call of an op would repeat the search
def _num_splits(programs: int, most: int, waves: int, processors: int) -> int:
    def fullness(splits: int) -> float:
        return programs * splits / (max(waves, _ceil_div(programs * splits, processors)) * processors)

    enough = next((splits for splits in range(1, most + 1) if fullness(splits) >= 0.9), None)
    return enough or max(range(1, most + 1), key=fullness)
