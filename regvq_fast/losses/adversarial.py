"""Adversarial losses, their adaptive weight (Esser et al., CVPR 2021, section 3.1), discriminator regularizers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from regvq_fast.ranks import mean_over_ranks

_LOG2_SUM = 9
"""A channel's gradient is scaled to an absolute sum of 2^8 to 2^9. In fp16, features up to 127 then can't overflow the
weight's gradient, and with 40 images of 256 px the mean over pixels stays above 2^-14, the smallest normal number."""


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean relu(1 - real) + mean relu(1 + fake)) / 2`` of logits of any shape; 0-dim float32."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean fake`` of logits of any shape; 0-dim float32."""
    return -fake.float().mean()


def non_saturating_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean softplus(-real) + mean softplus(fake)) / 2`` of logits of any shape; 0-dim float32."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """``mean softplus(-fake)`` of logits of any shape; 0-dim float32 (Goodfellow et al., NeurIPS 2014, section 3)."""
    return F.softplus(-fake.float()).mean()


class AdversarialLoss(NamedTuple):
    """Losses of discriminator and generator, each from logits of any shape to a 0-dim float32."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """(logits of images, logits of reconstructions)"""
    generator: Callable[[Tensor], Tensor]
    """(logits of reconstructions)"""


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator_loss, hinge_generator_loss),
    "non-saturating": AdversarialLoss(non_saturating_discriminator_loss, non_saturating_generator_loss),
}
"""All adversarial losses by their names on the command line."""


class LeCAM(nn.Module):
    """LeCAM regularizer: ``mean relu(real - average_fake)^2 + mean relu(average_real - fake)^2``.

    Tseng et al., CVPR 2021, equation 5; the relu and the decay are those of the authors' code. The averages are
    exponential, debiased, and over the logits of all ranks. Each call updates them first.

    Args:
        weight: weight of the term in the discriminator's loss, to be applied by the caller.
        decay: decay of the averages.
    """

    averages: Tensor

    def __init__(self, weight: float, decay: float = 0.99) -> None:
        super().__init__()
        self.weight, self.decay = weight, decay
        self.register_buffer("averages", torch.zeros(3))  # of real logits, of fake logits, and of 1 for debiasing

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the unweighted term, 0-dim float32, for logits of images and of reconstructions, of any shape."""
        real, fake = real.float(), fake.float()
        means = torch.stack([real.mean(), fake.mean(), torch.ones_like(self.averages[2])])
        self.averages.lerp_(mean_over_ranks(means), 1 - self.decay)
        average_real, average_fake = self.averages[:2] / self.averages[2]
        return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Return half the squared gradient norm of an image's summed logits, mean over images (Mescheder et al., 2018).

    The second derivative needs an uncompiled discriminator. With batch norm in training mode the gradient passes
    through the batch statistics, so that images affect each other, and running statistics are updated once more.

    Args:
        discriminator: (B, C, H, W) -> logits.
        images: real images, (B, C, H, W) float32.

    Returns:
        0-dim, with a gradient to the discriminator's parameters.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def adaptive_weight(
    features: Tensor,
    weight: Tensor,
    grad_reconstruction: Tensor,
    grad_adversarial: Tensor,
    *,
    grad_scale: Tensor | float = 1.0,
    padding: int = 1,
) -> Tensor:
    """Return the weight that balances the two losses' gradients at the decoder's last convolution.

    ``lambda = clamp(|dL_rec/dW| / (|dL_gan/dW| + 1e-4), 0, 1e4)``. The gradients of W follow from the gradients at the
    reconstruction and the convolution's input, without a backward through other layers. They are averaged over the
    ranks, so lambda is that of the whole batch. One convolution in the type of the features computes both; each
    channel is scaled to fit fp16.

    Args:
        features: (B, C, H, W) input of the convolution.
        weight: (3, C, k, k) its weight W.
        grad_reconstruction: (B, 3, H, W) gradient of the reconstruction losses at the reconstruction.
        grad_adversarial: (B, 3, H, W) gradient of the generator loss at the reconstruction.
        grad_scale: loss scale of both gradients, divided out of their norms.
        padding: padding of the convolution, whose stride is 1.

    Returns:
        0-dim float32, without a gradient.
    """
    gradients = torch.cat((grad_reconstruction, grad_adversarial), dim=1)  # one read of the features for both
    sums = torch.linalg.vector_norm(gradients, 1, dim=(0, 2, 3))
    # Scaling by powers of two is exact; the limit keeps them finite for a sum near 0.
    shift = (_LOG2_SUM - torch.frexp(sums).exponent).clamp(max=100)[:, None, None]
    scaled = torch.ldexp(gradients, shift).to(features.dtype)
    shape = (len(sums), *weight.shape[1:])
    by_weight = conv2d_weight(features.detach(), shape, scaled, padding=padding).float()
    by_weight = torch.ldexp(by_weight, -shift[..., None]).reshape(2, -1)
    norms = mean_over_ranks(by_weight).norm(dim=1) / grad_scale
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
