"""torch.compile, switched on in one function."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# A value that several kernels need, computed from at least so many others, is written to memory rather than computed
# again in each. With the compiler's 4, backward of the VQ-GAN writes the fp32 gradient between normalization and swish
# once and reads it three times (docs/training.md, "Speed", has what 8 saves).
_REALIZE_READS = 8


# Steps of a CPU's run that compilation pays for, with a margin: for the preset scenes it takes 56 s and saves 8 % of a
# step, so that it is even after some 2,600 (docs/training.md).
CPU_STEPS = 5000


def worth_compiling(asked: bool, device: torch.device, steps: int) -> tuple[bool, str]:
    """Return whether a run of so many steps compiles, and why not if it was asked to."""
    if asked and device.type == "cpu" and steps < CPU_STEPS:
        return False, f"off: on a CPU it takes longer than it saves in {steps} steps ({CPU_STEPS} and more compile)"
    return asked, ""


def maybe_compile(function: Function, enabled: bool) -> Function:
    """Return the function, compiled as one graph if enabled; a graph break is an error, not a slow-down.

    Give modules uncompiled names (``step = maybe_compile(model, ...)`` and keep ``model``): the original saves clean
    state dicts and evaluates batches of any size.
    """
    if not enabled:
        return function
    options: dict[str, Any] | None = None
    if torch.cuda.is_available():
        options = {"realize_reads_threshold": _REALIZE_READS}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]
