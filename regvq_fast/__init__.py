"""Fused, exact and deterministic regularized vector quantization for tokenized image synthesis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regvq_fast.version import __version__

if TYPE_CHECKING:
    from regvq_fast.losses import ProbabilisticContrastiveLoss
    from regvq_fast.quantizers import (
        BSQQuantizer,
        EMAQuantizer,
        FSQQuantizer,
        GumbelQuantizer,
        IBQQuantizer,
        LFQQuantizer,
        NearestQuantizer,
        QuantizerOutput,
        RegularizedQuantizer,
        SimVQQuantizer,
    )

__all__ = [
    "BSQQuantizer",
    "EMAQuantizer",
    "FSQQuantizer",
    "GumbelQuantizer",
    "IBQQuantizer",
    "LFQQuantizer",
    "NearestQuantizer",
    "ProbabilisticContrastiveLoss",
    "QuantizerOutput",
    "RegularizedQuantizer",
    "SimVQQuantizer",
    "__version__",
]


def __getattr__(name: str) -> Any:  # lazy: `regvq --help` must not wait for PyTorch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = "losses" if name == "ProbabilisticContrastiveLoss" else "quantizers"
    return getattr(import_module(f"{__name__}.{package}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
