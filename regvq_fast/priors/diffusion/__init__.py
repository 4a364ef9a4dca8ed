"""The diffusion prior: all tokens in parallel, from masked to final ones, given a caption or label."""

from regvq_fast.priors.diffusion.loss import DiffusionTerms, MaskAndReplace, diffusion_terms, token_rows
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.sampler import sample_diffusion
from regvq_fast.priors.diffusion.text import LabelEncoder, PretrainedTextEncoder, TextEncoder, WordEncoder
from regvq_fast.priors.diffusion.timesteps import TimestepSampler

__all__ = [
    "DiffusionTerms",
    "LabelEncoder",
    "MaskAndReplace",
    "PretrainedTextEncoder",
    "TextEncoder",
    "TimestepSampler",
    "VQDiffusion",
    "WordEncoder",
    "diffusion_terms",
    "sample_diffusion",
    "token_rows",
]
