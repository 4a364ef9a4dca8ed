"""Quantizers with one interface: (B, D, H, W) maps in, :class:`QuantizerOutput` out."""

from regvq_fast.quantizers.bsq import BSQQuantizer
from regvq_fast.quantizers.ema import EMAQuantizer
from regvq_fast.quantizers.fsq import FSQQuantizer
from regvq_fast.quantizers.gumbel import GumbelQuantizer
from regvq_fast.quantizers.index_backpropagation import IBQQuantizer
from regvq_fast.quantizers.lfq import LFQQuantizer
from regvq_fast.quantizers.nearest import NearestQuantizer
from regvq_fast.quantizers.quantizer import CodebookQuantizer, Quantizer, QuantizerOutput, QuantizerSettings
from regvq_fast.quantizers.regularized import RegularizedQuantizer
from regvq_fast.quantizers.residual import ResidualQuantizer
from regvq_fast.quantizers.simvq import SimVQQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "reg-vq": RegularizedQuantizer,
    "vq-gan": NearestQuantizer,
    "gumbel-vq": GumbelQuantizer,
    "vq-vae": EMAQuantizer,
    "fsq": FSQQuantizer,
    "lfq": LFQQuantizer,
    "bsq": BSQQuantizer,
    "simvq": SimVQQuantizer,
    "ibq": IBQQuantizer,
}
"""All quantizers by name on the command line; one added before `regvq_fast.config` is imported has flags, too."""

__all__ = [
    "QUANTIZERS",
    "BSQQuantizer",
    "CodebookQuantizer",
    "EMAQuantizer",
    "FSQQuantizer",
    "GumbelQuantizer",
    "IBQQuantizer",
    "LFQQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSettings",
    "RegularizedQuantizer",
    "ResidualQuantizer",
    "SimVQQuantizer",
]
