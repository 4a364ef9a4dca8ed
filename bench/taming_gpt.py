"""The autoregressive prior of taming-transformers, from its own module: what ours is tested and measured against.

``pip install --no-deps taming-transformers-rom1504`` is enough: of transformers it needs one function, which newer
versions don't have any more.
"""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import peers
from torch import Tensor

from regvq_fast.priors.choosing import restrict


def _top_k_top_p_filtering(logits: Tensor, top_k: int, top_p: float | None = None) -> Tensor:
    return restrict(logits, top_k=top_k, top_p=top_p)


@functools.cache
def module() -> Any:
    """``taming.modules.transformer.mingpt``; raises SkippedError where it is not installed."""
    stand_in = ModuleType("transformers")
    vars(stand_in)["top_k_top_p_filtering"] = _top_k_top_p_filtering
    try:
        with mock.patch.dict(sys.modules, {"transformers": stand_in}):
            return importlib.import_module("taming.modules.transformer.mingpt")
    except ImportError as error:
        name = "taming-transformers-rom1504"
        raise peers.SkippedError(f"{name} is not installed: pip install --no-deps {name} ({error})") from error
