"""The autoregressive prior: one token after the other, given a semantic map."""

from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.autoregressive.sampler import sample_autoregressive

__all__ = ["TokenTransformer", "sample_autoregressive"]
