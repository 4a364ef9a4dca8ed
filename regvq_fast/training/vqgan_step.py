"""One training step of the VQ-GAN.

    image -> encoder -> z -> quantizer -> decoder -> reconstruction -> losses -> one backward

The autoencoder runs forward once, and backward visits each part of the graph once. The gradients of the reconstruction
and of the adversarial losses are taken at the reconstruction. Together with the input of the decoder's last convolution
they give two gradients of that layer's weight, whose norms determine the adaptive weight. Then one combined gradient
goes through decoder and encoder.

In a distributed run each rank has an equal fraction of the batch, and DistributedDataParallel averages the gradients
over the ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regvq_fast.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss, LeCAM, adaptive_weight, r1_penalty
from regvq_fast.losses.reconstruction import ReconstructionLoss
from regvq_fast.models.discriminator import PatchDiscriminator
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import Precision
from regvq_fast.ranks import distributed, synchronized
from regvq_fast.training.compilation import maybe_compile


class VQGANStep:
    """Forward and backward pass of a batch, which leaves gradients in the parameters for the caller's optimizers.

    Args:
        model: the autoencoder.
        discriminator: the discriminator.
        reconstruction_loss: the losses that need no discriminator.
        precision: see :func:`regvq_fast.precision.choose_precision`.
        adversarial_loss: of generator and discriminator.
        disc_weight: of the adversarial loss, on top of its adaptive factor.
        lecam: regularizer of the discriminator, or None.
        r1_weight: of the R1 penalty of the discriminator, in steps with a penalty.
        compile: compile the networks. A discriminator with batch norm over several ranks is not compiled, since it
            communicates in its forward pass.

    Raises:
        ValueError: R1 with such a discriminator, which has no second derivative.
    """

    def __init__(
        self,
        model: VQGAN,
        discriminator: PatchDiscriminator,
        reconstruction_loss: ReconstructionLoss,
        precision: Precision,
        *,
        adversarial_loss: AdversarialLoss = ADVERSARIAL_LOSSES["hinge"],
        disc_weight: float = 0.8,
        lecam: LeCAM | None = None,
        r1_weight: float = 0.0,
        compile: bool = False,
    ) -> None:
        self.model, self.discriminator = model, discriminator
        self.precision, self.adversarial_loss, self.disc_weight = precision, adversarial_loss, disc_weight
        self.lecam, self.r1_weight = lecam, r1_weight
        self._plain = _Networks(model, discriminator, discriminator, reconstruction_loss)
        exchanges = any(isinstance(module, nn.SyncBatchNorm) for module in discriminator.modules())
        if exchanges and r1_weight > 0:
            raise ValueError(
                "--r1-weight needs second derivatives, which --disc-norm batch over several GPUs does not have: use "
                "--disc-norm group or none"
            )
        discriminate = maybe_compile(discriminator, compile and not exchanges)
        self._networks = _Networks(
            distributed(maybe_compile(model, compile)),
            discriminate,
            distributed(discriminate),
            maybe_compile(reconstruction_loss, compile),
        )

    def __call__(
        self,
        images: Tensor,
        seed: Tensor,
        *,
        first_image: int | Tensor = 0,
        adversarial: bool = False,
        penalize: bool = False,
        loss_scale: Tensor | float = 1.0,
        synchronize: bool = True,
        plain: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of one batch to the parameters of autoencoder and discriminator.

        Args:
            images: (B, 3, H, W) float in [-1, 1].
            seed: 0-dim int64 tensor, of mask, noise and sampled positions.
            first_image: index of the batch's first image in the global batch; a 0-dim int64 tensor if it changes, so
                that new values don't recompile.
            adversarial: include the discriminator.
            penalize: add the R1 penalty to the discriminator's loss; requires ``adversarial``.
            loss_scale: factor of all gradients (fp16 loss scaling, gradient accumulation).
            synchronize: average the gradients over the ranks; False for all but the last micro-batch.
            plain: use the networks as they are, neither compiled nor distributed.

        Returns:
            Losses and other numbers of this rank by name (0-dim, unscaled), and the selected codes (B, h, w).
        """
        networks = self._plain if plain else self._networks
        with synchronized(*networks, enabled=synchronize):
            metrics, reconstruction, indices = self._autoencode(
                networks, images, seed, first_image, adversarial, loss_scale
            )
            if adversarial:
                metrics |= self._discriminate(networks, images, reconstruction, penalize, loss_scale)
            return metrics, indices

    def _autoencode(
        self,
        networks: "_Networks",
        images: Tensor,
        seed: Tensor,
        first_image: int | Tensor,
        adversarial: bool,
        loss_scale: Tensor | float,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Add the gradients of the autoencoder; return its numbers, reconstruction and codes."""
        height, width = self.model.token_shape
        with self.precision.autocast():
            out = networks.autoencode(images, seed, first_image * height * width)
            # A leaf between the graphs of the autoencoder and of the losses.
            reconstruction = out.reconstruction.detach().float().requires_grad_()
            loss, metrics = networks.reconstruction_loss(
                images, reconstruction, out.quantizer.perturbation, seed, first_image, out.quantizer.mask
            )
        (gradient,) = torch.autograd.grad(loss_scale * loss, reconstruction)
        metrics["quantizer"] = out.quantizer.loss.detach()
        metrics |= out.quantizer.metrics
        metrics["loss"] = loss.detach() + metrics["quantizer"]

        if adversarial:
            with self.precision.autocast(), _frozen(self.discriminator):
                generator_loss = self.adversarial_loss.generator(networks.discriminate(reconstruction))
            (gan_gradient,) = torch.autograd.grad(loss_scale * generator_loss, reconstruction)
            factor = adaptive_weight(out.features, self.model.last_layer, gradient, gan_gradient, grad_scale=loss_scale)
            gradient = gradient + self.disc_weight * factor * gan_gradient
            metrics |= {"generator": generator_loss.detach(), "lambda": factor}

        ends = [(out.reconstruction, gradient.to(out.reconstruction.dtype))]
        ends.append((out.quantizer.loss, loss_scale * torch.ones_like(out.quantizer.loss)))
        ends = [(output, value) for output, value in ends if output.requires_grad]  # parts may be frozen
        torch.autograd.backward([output for output, _ in ends], [value for _, value in ends])

        return metrics, reconstruction.detach(), out.quantizer.indices

    def _discriminate(
        self,
        networks: "_Networks",
        images: Tensor,
        reconstruction: Tensor,
        penalize: bool,
        loss_scale: Tensor | float,
    ) -> dict[str, Tensor]:
        """Add the gradients of the discriminator; return its numbers."""
        regularizers = {}
        if penalize:
            # Compiled networks have no second derivative. This comes first: DistributedDataParallel averages it over
            # the ranks with the gradients of the forward passes below.
            penalty = r1_penalty(self.discriminator, images)
            (loss_scale * self.r1_weight * penalty).backward()
            regularizers["r1"] = penalty.detach()
        with self.precision.autocast():
            real = networks.train_discriminate(images)
            fake = networks.train_discriminate(reconstruction)
            loss = discriminator_loss = self.adversarial_loss.discriminator(real, fake)
            if self.lecam is not None:
                lecam = self.lecam(real, fake)
                loss, regularizers["lecam"] = loss + self.lecam.weight * lecam, lecam.detach()
        (loss_scale * loss).backward()
        return {
            "discriminator": discriminator_loss.detach(),
            "logits_real": real.detach().float().mean(),
            "logits_fake": fake.detach().float().mean(),
            **regularizers,
        }


class _Networks(NamedTuple):
    """The networks as a step calls them."""

    autoencode: nn.Module
    discriminate: nn.Module  # for the generator's loss, where its parameters get no gradient
    train_discriminate: nn.Module
    reconstruction_loss: nn.Module


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of the parameters inside the block; backward computes only the input's."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
