"""Quantizers with one interface: (B, D, H, W) maps in, :class:`QuantizerOutput` out."""

from regvq_fast.quantizers.ema import EMAQuantizer
from regvq_fast.quantizers.gumbel import GumbelQuantizer
from regvq_fast.quantizers.index_backpropagation import IBQQuantizer
from regvq_fast.quantizers.nearest import NearestQuantizer
from regvq_fast.quantizers.quantizer import CodebookQuantizer, Quantizer, QuantizerOutput, QuantizerSettings
from regvq_fast.quantizers.regularized import RegularizedQuantizer
from regvq_fast.quantizers.simvq import SimVQQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "reg-vq": RegularizedQuantizer,
    "vq-gan": NearestQuantizer,
    "gumbel-vq": GumbelQuantizer,
    "vq-vae": EMAQuantizer,
    "simvq": SimVQQuantizer,
    "ibq": IBQQuantizer,
}
"""All quantizers by their names on the command line; one that is added before `regvq_fast.config` is imported has its
settings there, too."""

__all__ = [
    "QUANTIZERS",
    "CodebookQuantizer",
    "EMAQuantizer",
    "GumbelQuantizer",
    "IBQQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSettings",
    "RegularizedQuantizer",
    "SimVQQuantizer",
]
