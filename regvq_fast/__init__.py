"""Fused, exact and deterministic regularized vector quantization for tokenized image synthesis."""

from regvq_fast.losses import ProbabilisticContrastiveLoss
from regvq_fast.quantizers import (
    EMAQuantizer,
    GumbelQuantizer,
    NearestQuantizer,
    QuantizerOutput,
    RegularizedQuantizer,
)
from regvq_fast.version import __version__

__all__ = [
    "EMAQuantizer",
    "GumbelQuantizer",
    "NearestQuantizer",
    "ProbabilisticContrastiveLoss",
    "QuantizerOutput",
    "RegularizedQuantizer",
    "__version__",
]
