"""Training losses of tokenizers: reconstruction, prior regularization, adversarial losses."""

from regvq_fast.losses.adversarial import (
    LeCAM,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.losses.prior import prior_kl
from regvq_fast.losses.reconstruction import ReconstructionLoss

__all__ = [
    "LPIPS",
    "LeCAM",
    "ProbabilisticContrastiveLoss",
    "ReconstructionLoss",
    "adaptive_weight",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "non_saturating_discriminator_loss",
    "non_saturating_generator_loss",
    "prior_kl",
    "r1_penalty",
]
