"""Validation of arguments; errors say what was given, what is allowed and what to do."""

import math
import numbers
import operator

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        # Autocast casts every type but fp64 to fp32.
        if torch.float64 not in (value.dtype, other.dtype) and torch.is_autocast_enabled(other.device.type):
            return
        raise TypeError(f"{name} is {value.dtype} but {other_name} {other.dtype}; convert one of them")


def check_codebook(x: Tensor, codebook: Tensor) -> None:
    """Raise unless ``codebook`` is (N, D), or (H, N, D) for ``x`` of (..., H, D), with its type and device."""
    check_matrix("x", x, ndim=None)
    check_matrix("codebook", codebook, x.shape[-1], ndim=None)
    check_like("codebook", codebook, "x", x)
    if codebook.numel() == 0:
        raise ValueError(f"codebook has no codes or no channels, shape {tuple(codebook.shape)}")
    if codebook.ndim > 3:
        raise ValueError(f"codebook must be (N, D), or (H, N, D) for heads, got shape {tuple(codebook.shape)}")
    if codebook.ndim == 3 and x.shape[-2] != codebook.shape[0]:
        raise ValueError(
            f"codebook {tuple(codebook.shape)} has {codebook.shape[0]} heads: x must be (..., {codebook.shape[0]}, "
            f"{codebook.shape[2]}), got shape {tuple(x.shape)}"
        )


def check_rows(name: str, value: Tensor, shape: torch.Size, x: Tensor) -> None:
    """Raise unless ``value`` is bool, of the leading ``shape`` of ``x``, and on its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have the leading shape of x, {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x on {x.device}; move them to one device")


def check_scalar(name: str, value: Tensor, x: Tensor, *, floating: bool = False) -> None:
    """Raise unless ``value`` is a 0-dim tensor, int64 or floating point, on the device of ``x``."""
    kind = "floating-point" if floating else "int64"
    fits = isinstance(value, Tensor) and value.ndim == 0
    if not fits or not (value.is_floating_point() if floating else value.dtype == torch.int64):
        raise TypeError(f"{name} must be a 0-dim {kind} tensor, got {value!r}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x on {x.device}; move them to one device")


def whole_number(name: str, value: int, kind: str = "an int") -> int:
    """Return ``value`` as an int; raise unless it is a whole number, of any type, that fits into int64."""
    if not isinstance(value, (int, torch.SymInt)):  # index() would specialize a dynamic number
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
    if torch.compiler.is_compiling():  # full() would compile one graph for each value
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
    # torch.compile may treat the number as dynamic: comparisons are traced, math.isinf would break the graph.
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not _is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be greater than 0 and finite, got {value}")


def _is_real(value: object) -> bool:
    """Return whether ``value`` is a number of another library, such as NumPy."""
    return isinstance(value, numbers.Real)


def check_finite(name: str, value: Tensor | None) -> float:
    """Raise if ``value`` (CPU) holds nan or inf; return the largest magnitude in it.

    CUDA tensors pass unchecked, with a magnitude of 0: checking would force a device synchronization.
    """
    if value is None or value.device.type != "cpu" or not value.numel():
        return 0.0
    # aminmax is one pass and propagates nan; isfinite(value).all() takes ten times as long.
    smallest, largest = (extreme.item() for extreme in torch.aminmax(value))
    if not math.isfinite(smallest) or not math.isfinite(largest):
        bad = (~torch.isfinite(value)).nonzero()
        where = tuple(bad[0].tolist())
        raise NonFiniteError(
            f"{name} has {len(bad)} non-finite value(s), the first is {value[where].item()} at {where}"
        )
    return max(-smallest, largest)


def check_overflow(bound: float, dtype: torch.dtype, names: str) -> None:
    """Raise if scores of magnitude ``bound`` would overflow ``dtype``, which gives wrong indices."""
    most = torch.finfo(dtype).max
    if not bound <= most:
        raise ValueError(
            f"scores may reach {bound:.1e}, more than {str(dtype).removeprefix('torch.')} holds ({most:.1e}): make "
            f"{names} smaller, or give float64"
        )
