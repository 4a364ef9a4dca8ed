import pytest
import torch
from torch.nn.grad import conv2d_weight

from regvq_fast.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss


def test_hinge_losses_of_hand_worked_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor(0.5 * (2.5 / 3 + 3 / 3)))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(1 / 3))


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
