"""Sampling from the priors over tokens."""

from regvq_fast.sampling.autoregressive import sample_autoregressive
from regvq_fast.sampling.choosing import choose_tokens, restrict
from regvq_fast.sampling.diffusion import sample_diffusion

__all__ = ["choose_tokens", "restrict", "sample_autoregressive", "sample_diffusion"]
