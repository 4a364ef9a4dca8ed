"""Fused, exact and deterministic regularized vector quantization for tokenized image synthesis."""

from regvq_fast.version import __version__

__all__ = ["__version__"]
