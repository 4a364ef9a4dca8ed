"""One training step against the textbook: separate backward passes through everything."""

import copy
import functools

import pytest
import torch
from helpers.tiny_models import tiny_vqgan
from torch import Tensor, nn

from regvq_fast.losses import (
    LeCAM,
    ReconstructionLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from regvq_fast.losses.adversarial import ADVERSARIAL_LOSSES
from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.models import VQGAN, PatchDiscriminator, VGGFeatures
from regvq_fast.precision import Precision
from regvq_fast.quantizers import GumbelQuantizer, NearestQuantizer, RegularizedQuantizer
from regvq_fast.training.vqgan_step import VQGANStep

FP32 = Precision(torch.device("cpu"), None, "test")
LAYERS = ("relu1_2", "relu2_2")


def build_parts(
    quantizer: str = "reg-vq", ch_mult: tuple[int, ...] = (1, 2), layers: tuple[str, ...] = LAYERS
) -> tuple[VQGAN, PatchDiscriminator, ReconstructionLoss]:
    torch.manual_seed(0)
    codebook = RegularizedQuantizer(16, 4) if quantizer == "reg-vq" else NearestQuantizer(16, 4)
    model = tiny_vqgan(codebook, ch_mult=ch_mult)
    discriminator = PatchDiscriminator(filters=4, num_layers=1)
    features = VGGFeatures("vgg16", layers)
    contrastive = ProbabilisticContrastiveLoss(num_patches=16)
    loss = ReconstructionLoss(features, LPIPS(features), contrastive, contrastive_weight=0.1)
    return model, discriminator, loss


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": p.grad.clone()
        for i, module in enumerate(modules)
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest gradient: those of biases before a normalisation are rounding only."""
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        difference = float((actual[name] - value).abs().max())
        assert difference <= tolerance * max(largest, 1e-6), f"{name}: {difference} of {largest}"


def textbook(
    model: VQGAN, discriminator: PatchDiscriminator, loss: ReconstructionLoss, batch: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """taming's computation: lambda by two walks from the losses to the last layer, then one sum, one backward."""
    out = model(batch, seed)
    reconstruction_loss, _ = loss(batch, out.reconstruction, out.quantizer.perturbation, seed)
    discriminator.requires_grad_(False)
    generator_loss = hinge_generator_loss(discriminator(out.reconstruction))
    discriminator.requires_grad_(True)
    (nll_grad,) = torch.autograd.grad(reconstruction_loss, model.last_layer, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(generator_loss, model.last_layer, retain_graph=True)
    factor = (nll_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0, 1e4).detach()
    (reconstruction_loss + 0.8 * factor * generator_loss + out.quantizer.loss).backward()
    hinge_discriminator_loss(discriminator(batch), discriminator(out.reconstruction.detach())).backward()
    return reconstruction_loss, factor


@pytest.mark.parametrize("quantizer", ["reg-vq", "vq-gan"])
def test_step_equals_the_textbook_computation(quantizer: str) -> None:
    parts = build_parts(quantizer)
    copies = copy.deepcopy(parts)
    batch, seed = images(), torch.tensor(3)
    expected_loss, factor = textbook(*copies, batch, seed)
    metrics, indices = VQGANStep(*parts, FP32)(batch, seed, adversarial=True)
    torch.testing.assert_close(metrics["lambda"], factor, rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["loss"] - metrics["quantizer"], expected_loss.detach(), rtol=1e-5, atol=1e-6)
    assert indices.shape == (2, 8, 8)
    actual, expected = gradients(*parts), gradients(*copies)
    assert actual.keys() == expected.keys()
    assert not any(name.startswith("2.") for name in actual), "the feature network must not collect gradients"
    assert_same_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_regularizers_and_another_loss_train_the_discriminator_as_a_textbook_would(loss_scale: float) -> None:
    parts = build_parts()
    model, discriminator, _ = copy.deepcopy(parts)
    batch, seed = images(), torch.tensor(3)
    other = ADVERSARIAL_LOSSES["non-saturating"]
    step = VQGANStep(*parts, FP32, adversarial_loss=other, lecam=LeCAM(0.3), r1_weight=10.0)
    metrics, _ = step(batch, seed, adversarial=True, penalize=True, loss_scale=loss_scale)

    reconstruction = model(batch, seed).reconstruction.detach()
    torch.testing.assert_close(metrics["generator"], non_saturating_generator_loss(discriminator(reconstruction)))
    penalty, lecam = r1_penalty(discriminator, batch), LeCAM(0.3)
    real, fake = discriminator(batch), discriminator(reconstruction)
    expected = {"discriminator": non_saturating_discriminator_loss(real, fake), "lecam": lecam(real, fake)}
    (expected["discriminator"] + 0.3 * expected["lecam"] + 10 * penalty).backward()
    for name, value in {**expected, "r1": penalty}.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-7)
    assert penalty > 0
    found = {name: value / loss_scale for name, value in gradients(parts[1]).items()}
    assert_same_gradients(found, gradients(discriminator), 1e-5)


def test_r1_is_refused_where_batch_norm_communicates() -> None:
    model, discriminator, loss = build_parts()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    VQGANStep(model, synchronized, loss, FP32, lecam=LeCAM(1.0))
    with pytest.raises(ValueError, match=r"--r1-weight .*--disc-norm group"):
        VQGANStep(model, synchronized, loss, FP32, r1_weight=1.0)


def test_l1_and_l2_stand_beside_each_other() -> None:
    batch, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    arguments = batch, reconstruction, torch.zeros(1, 1, 1), torch.tensor(0)
    for l1_weight, l2_weight, value, slope in ((2, 0, 1.0, 2), (0, 3, 0.75, 3), (2, 3, 1.75, 5), (0, 0, 0.0, 0)):
        loss = ReconstructionLoss(
            nn.Identity(), nn.Identity(), None, l1_weight=l1_weight, l2_weight=l2_weight, perceptual_weight=0
        )
        total, terms = loss(*arguments)
        assert total.item() == value
        assert {name: float(term) for name, term in terms.items()} == {"l1": 0.5} | ({"l2": 0.25} if l2_weight else {})
        (gradient,) = torch.autograd.grad(total, reconstruction)
        torch.testing.assert_close(gradient, torch.full_like(gradient, slope / 12))  # 12 values, d l2 = 2 * 0.5


def test_discriminator_costs_nothing_before_it_joins() -> None:
    model, discriminator, loss = build_parts()
    calls = []
    discriminator.register_forward_hook(lambda *_: calls.append(1))
    metrics, _ = VQGANStep(model, discriminator, loss, FP32)(images(), torch.tensor(0))
    assert not calls
    assert not gradients(discriminator)
    assert "lambda" not in metrics


def test_autoencoder_runs_forward_once_and_the_features_once_on_each_image() -> None:
    model, discriminator, loss = build_parts()
    calls = {"encoder": 0, "decoder": 0, "features": 0}
    for name, module in (("encoder", model.encoder), ("decoder", model.decoder.mid), ("features", loss.features)):
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    VQGANStep(model, discriminator, loss, FP32)(images(), torch.tensor(0), adversarial=True)
    assert calls == {"encoder": 1, "decoder": 1, "features": 2}


def test_loss_scale_scales_every_gradient_and_leaves_lambda_alone() -> None:
    results = []
    for scale in (1.0, 1024.0):
        parts = build_parts()
        metrics, _ = VQGANStep(*parts, FP32)(images(), torch.tensor(0), adversarial=True, loss_scale=scale)
        results.append((metrics, gradients(*parts)))
    (plain, small), (scaled, large) = results
    torch.testing.assert_close(plain["lambda"], scaled["lambda"])
    assert_same_gradients({name: value / 1024 for name, value in large.items()}, small, 1e-5)


def test_parts_of_a_batch_draw_the_same_selection_as_the_whole() -> None:
    batch = images(4)
    model, discriminator, loss = build_parts()
    step = VQGANStep(model, discriminator, loss, FP32)
    _, whole = step(batch, torch.tensor(5))
    parts = [step(batch[first : first + 2], torch.tensor(5), first_image=first)[1] for first in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_any_number_of_parts_compiles_once() -> None:
    torch._dynamo.reset()
    model, _, _ = build_parts()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in range(10):
            compiled(images(), torch.tensor(5), torch.full((), 64 * first))


def test_compiled_networks_have_no_graph_break_and_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    bf16 = Precision(torch.device("cpu"), torch.bfloat16, "test")
    step = VQGANStep(*build_parts(), bf16, lecam=LeCAM(0.1), r1_weight=1.0, compile=True)
    batch = images().contiguous(memory_format=torch.channels_last)

    def run(seed: int) -> None:
        number, scale = torch.tensor(2 * seed), torch.tensor(2.0**seed)
        turns = {"adversarial": seed >= 2, "penalize": seed == 3}
        step(batch, torch.tensor(seed), first_image=number, loss_scale=scale, **turns)

    for seed in range(3):
        run(seed)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Autoencoder, losses, and the discriminator with and without gradients of its weights.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(3)


def test_a_quantizer_without_a_loss_of_its_own_trains() -> None:
    model, discriminator, loss = build_parts()
    model.quantize = GumbelQuantizer(16, 4, kl_weight=0)
    VQGANStep(model, discriminator, loss, FP32)(images(), torch.tensor(0))
    assert gradients(model)


@pytest.mark.slow
def test_compiled_step_equals_the_eager_one_on_both_sides_of_disc_start() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        # No resampling, whose compiled gradients test_layers.py looks at: each kernel takes a second or two to compile.
        parts = build_parts(ch_mult=(1,), layers=LAYERS[:1])
        step = VQGANStep(*parts, FP32, lecam=LeCAM(0.1), r1_weight=1.0, compile=compiled)
        # Twice on each side: several backward passes over compiled graphs must not share buffers, and none may be
        # differentiated again.
        metrics = [step(images(), torch.tensor(s), adversarial=s >= 2, penalize=s == 3)[0] for s in range(4)]
        results.append((metrics, gradients(*parts)))
    (eager, eager_gradients), (compiled_metrics, compiled_gradients) = results
    for a, b in zip(eager, compiled_metrics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_same_gradients(compiled_gradients, eager_gradients, 1e-3)


def test_contrastive_loss_of_the_masked_region_and_of_every_place_reach_the_encoder() -> None:
    losses = []
    for region in ("all", "masked"):
        model, discriminator, loss = build_parts()
        assert loss.contrastive is not None
        loss.contrastive.num_patches, loss.contrastive.max_positions, loss.contrastive.region = None, 64, region
        loss.l1_weight = loss.perceptual_weight = 0
        metrics, _ = VQGANStep(model, discriminator, loss, FP32)(images(), torch.tensor(3))
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
        losses.append(float(metrics["contrastive"]))
    assert losses[0] != losses[1]
