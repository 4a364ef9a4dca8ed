"""torch.compile, switched on in one function."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# A value that several kernels use is written to memory, not recomputed in each, if it is computed from at least this
# many others. With the compiler's default of 4, the VQ-GAN's backward writes the fp32 gradient between normalization
# and swish once and reads it three times; docs/training.md, "Speed", measures 8.
_REALIZE_READS = 8


# Steps from which on compilation pays on a CPU, with a margin: for the preset scenes it takes 56 s and saves 8 % of a
# step, which breaks even after about 2,600 steps (docs/training.md).
CPU_STEPS = 5000


def worth_compiling(asked: bool, device: torch.device, steps: int) -> tuple[bool, str]:
    """Return whether a run of ``steps`` steps compiles, and the reason if it does not although ``asked``."""
    if asked and device.type == "cpu" and steps < CPU_STEPS:
        return False, f"off: on a CPU it costs more than it saves below {CPU_STEPS:,} steps; this run has {steps:,}"
    return asked, ""


def maybe_compile(function: Function, enabled: bool) -> Function:
    """Return the function, compiled as one graph if enabled; a graph break is an error.

    Keep the uncompiled module (``step = maybe_compile(model, ...)``, then save and evaluate ``model``): its state dict
    has clean names, and it takes batches of any size.
    """
    if not enabled:
        return function
    options: dict[str, Any] | None = None
    if torch.cuda.is_available():
        options = {"realize_reads_threshold": _REALIZE_READS}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]
