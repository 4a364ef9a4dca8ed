"""What the ops share: argument checks that speak to people, the choice of implementation, and tiles of rows."""

import importlib.util
import math
import numbers
import operator
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "eager"]

_IMPLS = ("auto", "triton", "eager")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when the kernels are imported

# Elements of one tile of scores, rows x codes; the memory of a call does not depend on M. On a CPU 4 MiB in fp32: a
# tile and its few temporaries stay in the caches, and its hundred calls and the packing of the codes for its products
# weigh little. On a GPU 64 MiB, since the eager path is a hundred launches a tile.
TILE_ELEMENTS = 1 << 20
CUDA_TILE_ELEMENTS = 1 << 24
# Scores that the eager forward keeps for its backward, if a call has no more (8 MiB in fp32): to draw their noise and
# multiply again would take a third of a small call's time.
KEPT_ELEMENTS = 1 << 21
# Each tile adds to all N x D sums of the backward pass: with fewer rows that traffic outweighs its products.
_MIN_TILE_ROWS = 64
# Columns of a block in the search of a row's maximum on a CPU; with how many columns, and scores in all, it pays.
_ARGMAX_BLOCK, _ARGMAX_COLUMNS, _ARGMAX_SCORES = 64, 512, 1 << 18


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> Literal["triton", "eager"]:
    """The implementation that runs: the single place that decides it."""
    if impl not in _IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, _IMPLS))}, got {impl!r}")
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


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """A context in which kernels run on the device of ``x``: Triton launches on the current one, whatever it is given.

    Nothing happens for a tensor of the CPU, whose kernels Triton's interpreter runs.
    """
    return torch.cuda.device_of(x)


def check_matrix(name: str, value: Tensor, columns: int | None = None, *, ndim: int | None = 2) -> None:
    """Raise unless ``value`` is a floating-point tensor of ``ndim`` dimensions (None: two or more) and ``columns``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be floating point (fp16, bf16, fp32 or fp64), got {value.dtype}")
    if value.ndim < 2 if ndim is None else value.ndim != ndim:
        wanted = "at least 2 dimensions" if ndim is None else f"{ndim} dimension(s)"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(value.shape)}")
    if columns is not None and value.shape[-1] != columns:
        raise ValueError(f"{name} must have {columns} in its last dimension, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` has the device and, autocast aside, the type of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} on {other.device}; move them to one device")
    if value.dtype != other.dtype:
        # Autocast makes fp32 of every type but fp64.
        if torch.float64 not in (value.dtype, other.dtype) and torch.is_autocast_enabled(other.device.type):
            return
        raise TypeError(f"{name} is {value.dtype} but {other_name} {other.dtype}; convert one of them")


def check_scalar(name: str, value: Tensor, x: Tensor, *, floating: bool = False) -> None:
    """Raise unless ``value`` is a 0-dim tensor, int64 or floating point, on the device of ``x``."""
    kind = "floating-point" if floating else "int64"
    fits = isinstance(value, Tensor) and value.ndim == 0
    if not fits or not (value.is_floating_point() if floating else value.dtype == torch.int64):
        raise TypeError(f"{name} must be a 0-dim {kind} tensor, got {value!r}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x on {x.device}; move them to one device")


def whole_number(name: str, value: int, kind: str = "an int") -> int:
    """``value`` as an int, if it is a whole number of any type, NumPy's say, that int64 holds; raise if not."""
    if not isinstance(value, (int, torch.SymInt)):  # index() would fix a dynamic number
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be {kind}, got {value!r}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into int64, got {value}")
    return value


def as_scalar(value: float | Tensor, x: Tensor) -> Tensor:
    """Return a number as a 0-dim tensor on the device of ``x`` (fp64 if it was a float), without a gradient."""
    if isinstance(value, Tensor):
        return value.detach()
    if torch.compiler.is_compiling():  # a product takes a number that changes; full() would compile one graph a value
        return torch.ones((), dtype=torch.float64, device=x.device) * value
    return torch.full((), value, dtype=torch.float64, device=x.device)


class NonFiniteError(ValueError, FloatingPointError):
    """An input holds nan or inf."""


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a number, no tensor, greater than 0 and finite."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, since it gets no gradient, got a {type(value).__name__}: give {name}.item(), or "
            f"to train it multiply the inputs instead and leave {name} fixed"
        )
    # A number that torch.compile treats as dynamic is compared, and nothing else: math.isinf would break the graph.
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not _is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be greater than 0 and finite, got {value}")


def _is_real(value: object) -> bool:
    """Return whether it is a number of another library, such as NumPy's."""
    return isinstance(value, numbers.Real)


def check_finite(name: str, value: Tensor | None) -> float:
    """Raise if ``value`` (CPU) holds nan or inf; return the largest magnitude in it.

    CUDA tensors pass unchecked, with a magnitude of 0: looking would stop the device.
    """
    if value is None or value.device.type != "cpu" or not value.numel():
        return 0.0
    # One pass, in which nan wins over all numbers; isfinite(value).all() takes ten times as long.
    smallest, largest = (extreme.item() for extreme in torch.aminmax(value))
    if not math.isfinite(smallest) or not math.isfinite(largest):
        bad = (~torch.isfinite(value)).nonzero()
        where = tuple(bad[0].tolist())
        raise NonFiniteError(
            f"{name} has {len(bad)} non-finite value(s), the first is {value[where].item()} at {where}"
        )
    return max(-smallest, largest)


def check_overflow(bound: float, dtype: torch.dtype, names: str) -> None:
    """Raise if scores up to ``bound`` may overflow the type they are computed in: indices would be wrong without it."""
    most = torch.finfo(dtype).max
    if not bound <= most:
        raise ValueError(
            f"scores may reach {bound:.1e}, more than {str(dtype).removeprefix('torch.')} holds ({most:.1e}): make "
            f"{names} smaller, or give float64"
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays fp64 (for oracles), everything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_argmax(scores: Tensor) -> Tensor:
    """Column of each row's maximum, the first one of equals: (rows, N) -> (rows,) int64."""
    num_columns = scores.shape[1]
    if scores.device.type != "cpu" or num_columns < _ARGMAX_COLUMNS or scores.numel() <= _ARGMAX_SCORES:
        return scores.max(1).indices  # on some CPUs argmax(1) takes several times as long for the same answer
    # A CPU finds maxima with vector instructions, but their places one element after the other: so the best block of
    # columns is found first, and the place in that block alone. Both times the first of equals.
    whole = num_columns // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    tops = [scores[:, :whole].unflatten(1, (-1, _ARGMAX_BLOCK)).amax(2)]
    if whole < num_columns:
        tops.append(scores[:, whole:].amax(1, keepdim=True))
    start = torch.cat(tops, 1).max(1).indices.mul_(_ARGMAX_BLOCK).unsqueeze(1)
    columns = (start + torch.arange(_ARGMAX_BLOCK)).clamp_(max=num_columns - 1)
    return scores.gather(1, columns).max(1).indices.add_(start.squeeze(1))


def rows_per_tile(num_columns: int, device: torch.device) -> int:
    """Rows of a tile of scores with ``num_columns`` of them a row."""
    elements = CUDA_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS
    return max(_MIN_TILE_ROWS, elements // num_columns)
