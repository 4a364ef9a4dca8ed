"""Hinge losses of the patch discriminator and their adaptive weight (Esser et al., CVPR 2021, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from regvq_fast.ranks import mean_over_ranks


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean relu(1 - real) + mean relu(1 + fake)) / 2`` of logits of any shape; 0-dim float32."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean fake`` of logits of any shape; 0-dim float32."""
    return -fake.float().mean()


def adaptive_weight(
    features: Tensor,
    weight: Tensor,
    grad_reconstruction: Tensor,
    grad_adversarial: Tensor,
    *,
    grad_scale: Tensor | float = 1.0,
    padding: int = 1,
) -> Tensor:
    """Balance of the adversarial gradient at the decoder's last convolution.

    ``lambda = clamp(|dL_rec/dW| / (|dL_gan/dW| + 1e-4), 0, 1e4)``. The gradients of W are formed from the two
    gradients at the reconstruction and the convolution's input: nothing behind the last layer is walked for them. In a
    distributed run they are the means over the ranks, and so is lambda the whole batch's.

    Args:
        features: (B, C, H, W) input of the convolution.
        weight: (3, C, k, k) its weight W.
        grad_reconstruction: (B, 3, H, W) gradient of the reconstruction losses at the reconstruction.
        grad_adversarial: (B, 3, H, W) gradient of the generator loss there.
        grad_scale: factor that both gradients carry; divided out behind the convolution, since in fp16 the gradients of
            an image's mean error would be 0 without it.
        padding: of the convolution, whose stride is 1.

    Returns:
        0-dim float32, without a gradient.
    """
    features = features.detach()
    gradients = [
        conv2d_weight(features, weight.shape, grad.to(features.dtype), padding=padding).float()
        for grad in (grad_reconstruction, grad_adversarial)
    ]
    norms = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1) / grad_scale
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
