"""Quantizers with one interface: (B, D, H, W) maps in, :class:`QuantizerOutput` out."""

from regvq_fast.quantizers.base import Quantizer, QuantizerOutput
from regvq_fast.quantizers.ema import EMAQuantizer
from regvq_fast.quantizers.gumbel import GumbelQuantizer
from regvq_fast.quantizers.nearest import NearestQuantizer
from regvq_fast.quantizers.regularized import RegularizedQuantizer

__all__ = [
    "EMAQuantizer",
    "GumbelQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "RegularizedQuantizer",
]
