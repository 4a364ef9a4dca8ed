import math

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from regvq_fast.losses import (
    LeCAM,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from regvq_fast.models import PatchDiscriminator


def test_hinge_losses_of_hand_worked_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor(0.5 * (2.5 / 3 + 3 / 3)))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(1 / 3))


def test_non_saturating_losses_are_cross_entropies_of_the_logits() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
    real_losses = [-math.log(1 / (1 + math.exp(-x))) for x in (2.0, -1.0)]
    fake_losses = [-math.log(1 - 1 / (1 + math.exp(-x))) for x in (-3.0, 0.5)]
    expected = 0.5 * (sum(real_losses) / 2 + sum(fake_losses) / 2)
    torch.testing.assert_close(non_saturating_discriminator_loss(real, fake), torch.tensor(expected))
    generated = [-math.log(1 / (1 + math.exp(-x))) for x in (-3.0, 0.5)]
    torch.testing.assert_close(non_saturating_generator_loss(fake), torch.tensor(sum(generated) / 2))
    assert non_saturating_generator_loss(torch.tensor([-1e4])) == 1e4


def test_lecam_pulls_logits_to_the_averages_of_the_other_kind() -> None:
    lecam = LeCAM(weight=1.0, decay=0.75)
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0, 3.0], requires_grad=True)
    # The first averages are the means, 2 and 1: relu(real - 1) = 0, 2; relu(2 - fake) = 3, 0
    value = lecam(real, fake)
    torch.testing.assert_close(value, torch.tensor(4 / 2 + 9 / 2))
    value.backward()
    torch.testing.assert_close((real.grad, fake.grad), (torch.tensor([0.0, 2.0]), torch.tensor([-3.0, 0.0])))
    # Then they weigh the means 6 and 0 by 0.25, those before by 0.1875 (of 0.4375).
    average_real, average_fake = (0.25 * 6 + 0.1875 * 2) / 0.4375, 0.1875 * 1 / 0.4375
    torch.testing.assert_close(
        lecam(torch.tensor([6.0]), torch.tensor([0.0])), torch.tensor((6 - average_fake) ** 2 + average_real**2)
    )


def test_r1_of_a_quadratic_by_hand() -> None:
    """D(x) = a/2 |x|^2 has the gradient a x: R1 is a^2 |x|^2 / 2, and its derivative by a is a |x|^2."""

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, images: Tensor) -> Tensor:
            return self.a / 2 * images.square()

    discriminator = Quadratic()
    images = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)  # mean |x|^2 = 2.5
    penalty = r1_penalty(discriminator, images)
    penalty.backward()
    torch.testing.assert_close((penalty, discriminator.a.grad), (torch.tensor(9 * 2.5 / 2), torch.tensor(3 * 2.5)))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_r1_of_the_patch_discriminator_has_the_slope_of_its_values(norm: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(filters=4, num_layers=1, norm=norm).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    parameters = list(discriminator.parameters())
    # The biases of the last layers may have none: they add a constant to the logits.
    gradients = torch.autograd.grad(r1_penalty(discriminator, images), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    direction = [g / torch.cat([g.flatten() for g in gradients]).norm() for g in gradients]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    values = []
    for step in (1e-6, -1e-6):  # too small for an activation to change its sign
        with torch.no_grad():
            moved = {n: p + step * d for (n, p), d in zip(discriminator.named_parameters(), direction, strict=True)}

        def call(x: Tensor, moved: dict[str, Tensor] = moved) -> Tensor:
            return torch.func.functional_call(discriminator, moved, x)

        values.append(float(r1_penalty(call, images).detach()))  # type: ignore[arg-type]
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)
    assert slope > 0


def test_adaptive_weight_is_the_ratio_of_the_last_layers_gradients() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 5, 8, 8)
    conv = torch.nn.Conv2d(5, 3, 3, padding=1)
    image = conv(features)
    losses = image.square().mean(), 0.1 * image.sin().mean()
    by_layer = [torch.autograd.grad(loss, conv.weight, retain_graph=True)[0].norm() for loss in losses]
    at_image = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    weight = adaptive_weight(features, conv.weight, *at_image)
    torch.testing.assert_close(weight, (by_layer[0] / (by_layer[1] + 1e-4)).detach())
    assert not weight.requires_grad


@pytest.mark.parametrize("grad_scale", [1.0, 2.0**16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)], ids=str
)
def test_adaptive_weight_neither_overflows_nor_underflows(
    dtype: torch.dtype, tolerance: float, grad_scale: float
) -> None:
    """Against fp64: a gradient whose sum exceeds fp16 when scaled, and one below fp16's smallest number."""
    generator = torch.Generator().manual_seed(0)
    features = 8 + torch.randn(2, 8, 64, 64, generator=generator)
    same_sign = torch.full((2, 3, 64, 64), 1 / 24576)
    tiny = 2e-8 * torch.rand(2, 3, 64, 64, generator=generator)
    shape = (3, 8, 3, 3)
    rec, adv = (conv2d_weight(features.double(), shape, grad.double(), padding=1).norm() for grad in (same_sign, tiny))
    found = adaptive_weight(
        features.to(dtype), torch.zeros(shape), grad_scale * same_sign, grad_scale * tiny, grad_scale=grad_scale
    )
    torch.testing.assert_close(found.double(), rec / (adv + 1e-4), rtol=tolerance, atol=0)


def test_adaptive_weight_is_clamped_where_the_adversarial_gradient_vanishes() -> None:
    features, weight = torch.ones(1, 2, 4, 4), torch.zeros(3, 2, 3, 3)
    large, zero = torch.full((1, 3, 4, 4), 1e6), torch.zeros(1, 3, 4, 4)
    assert float(adaptive_weight(features, weight, large, zero)) == 1e4
    assert float(adaptive_weight(features, weight, zero, large)) == 0
