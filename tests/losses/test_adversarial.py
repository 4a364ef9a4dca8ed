import torch

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


def test_gradients_too_small_for_fp16_are_weighed_by_their_scale() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(1, 4, 8, 8), torch.zeros(3, 4, 3, 3)
    large, small = 1e-2 * torch.randn(1, 3, 8, 8), 1e-2 * torch.randn(1, 3, 8, 8)
    expected = adaptive_weight(features, weight, large, small)
    scaled = adaptive_weight(features.half(), weight, 2.0**10 * large, 2.0**10 * small, grad_scale=2.0**10)
    torch.testing.assert_close(scaled, expected, rtol=1e-2, atol=0)


def test_adaptive_weight_is_clamped_where_the_adversarial_gradient_vanishes() -> None:
    features, weight = torch.ones(1, 2, 4, 4), torch.zeros(3, 2, 3, 3)
    large, zero = torch.full((1, 3, 4, 4), 1e6), torch.zeros(1, 3, 4, 4)
    assert float(adaptive_weight(features, weight, large, zero)) == 1e4
    assert float(adaptive_weight(features, weight, zero, large)) == 0
