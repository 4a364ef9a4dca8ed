"""The masked prior: an image's tokens in a few steps, the most confident first, given a map or label."""

from regvq_fast.priors.maskgit.model import MaskGIT
from regvq_fast.priors.maskgit.sampler import sample_maskgit

__all__ = ["MaskGIT", "sample_maskgit"]
