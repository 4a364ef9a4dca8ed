"""torch.compile, switched on in one function."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def maybe_compile(function: Function, enabled: bool) -> Function:
    """``function``, compiled as one graph where enabled; a graph break is an error, not a slow-down.

    Give modules uncompiled names (``step = maybe_compile(model, ...)`` and keep ``model``): the original saves clean
    state dicts and evaluates batches of any size.
    """
    if not enabled:
        return function
    return torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[return-value]
