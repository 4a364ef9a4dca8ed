"""Training losses: reconstruction group, prior regularizer, adversarial pair, discrete diffusion."""

from regvq_fast.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss
from regvq_fast.losses.discrete_diffusion import DiffusionTerms, MaskAndReplace, diffusion_terms, token_rows
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.losses.prior import prior_kl
from regvq_fast.losses.reconstruction import ReconstructionLoss
from regvq_fast.losses.timesteps import TimestepSampler

__all__ = [
    "LPIPS",
    "DiffusionTerms",
    "MaskAndReplace",
    "ProbabilisticContrastiveLoss",
    "ReconstructionLoss",
    "TimestepSampler",
    "adaptive_weight",
    "diffusion_terms",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "prior_kl",
    "token_rows",
]
