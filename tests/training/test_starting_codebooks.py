"""Codebooks of a model that starts from another's weights: kept, rescaled, fitted anew or refused."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_tokenizer, tiny_vqgan, training_images

from regvq_fast.quantizers import (
    EMAQuantizer,
    FSQQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    NearestQuantizer,
    Quantizer,
    RegularizedQuantizer,
    SimVQQuantizer,
)
from regvq_fast.training.starting import start_model


@pytest.mark.parametrize(
    "quantizer",
    [
        RegularizedQuantizer(32, 4, logits="distance"),
        GumbelQuantizer(32, 4),
        EMAQuantizer(32, 4),
        SimVQQuantizer(32, 4),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_codes_of_a_nearest_code_model_are_kept_with_their_tokens(quantizer: Quantizer) -> None:
    source = tiny_tokenizer()
    source.quantize.embedding.weight.data.mul_(torch.linspace(0.5, 2, 32)[:, None])  # of different lengths
    model = tiny_vqgan(quantizer, z_channels=8)
    report = start_model(model, source, training_images(), micro_batch=5)
    assert torch.equal(model.tokenize(training_images()), source.tokenize(training_images()))
    assert torch.equal(model.quantize.codes(), source.quantize.codes())
    torch.testing.assert_close(model.eval()(training_images()).reconstruction, source(training_images()).reconstruction)
    before, after = (word for word in report.split() if word.replace(".", "").isdigit() and "." in word)
    assert before == after


@pytest.mark.parametrize(("logits", "target"), [("distance", 0.6), ("cosine", 0.6), ("linear", 0.6)])
def test_noise_perturbs_the_target_fraction_from_the_first_step(logits: str, target: float) -> None:
    model = tiny_vqgan(RegularizedQuantizer(32, 4, logits=logits), z_channels=8)
    start_model(model, tiny_tokenizer(), training_images())
    model.train()
    found = [float(model(training_images(), torch.tensor(seed)).quantizer.metrics["perturbed"]) for seed in range(20)]
    assert np.mean(found) == pytest.approx(target, abs=0.1)


@pytest.mark.parametrize("logits", ["cosine", "linear"])
def test_codes_of_one_length_behind_the_latents_scales_decode_to_the_same_images(logits: str) -> None:
    source = tiny_tokenizer()
    z = source.encode(training_images()).detach().permute(0, 2, 3, 1).flatten(0, 2)
    std, mean = torch.std_mean(z, dim=0)
    directions = torch.nn.functional.normalize(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    source.quantize.embedding.weight.data.copy_(mean + 1.7 * std * directions)
    model = tiny_vqgan(RegularizedQuantizer(32, 4, logits=logits), z_channels=8)
    start_model(model, source, training_images())
    codes = torch.arange(32).view(2, 4, 4)
    torch.testing.assert_close(model.decode_indices(codes), source.decode_indices(codes), rtol=1e-4, atol=1e-5)
    rows = source.quantize.codes().T[None, :, None].detach()  # each code is its own best one
    assert torch.equal(model.quantize.eval()(rows).indices.flatten(), torch.arange(32))


def test_codes_of_reg_vq_go_into_a_nearest_code_model_with_their_scales() -> None:
    source = tiny_vqgan(RegularizedQuantizer(32, 4), z_channels=8)
    source.initialize_quantizer(training_images())
    assert not torch.allclose(source.quantize.gain, torch.ones(4))
    model = tiny_vqgan(NearestQuantizer(32, 4), z_channels=8)
    start_model(model, source.eval(), training_images())
    assert torch.equal(model.tokenize(training_images()), source.tokenize(training_images()))
    torch.testing.assert_close(model.eval()(training_images()).reconstruction, source(training_images()).reconstruction)


def test_the_same_kind_is_copied_with_its_buffers() -> None:
    source = tiny_vqgan(RegularizedQuantizer(32, 4), z_channels=8)
    source.initialize_quantizer(training_images())
    model = tiny_vqgan(RegularizedQuantizer(32, 4, tau=0.5), z_channels=8)
    start_model(model, source.eval(), training_images())
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "quantizer",
    [
        NearestQuantizer(50, 4),
        RegularizedQuantizer(50, 4),
        GumbelQuantizer(50, 4),
        SimVQQuantizer(50, 4),
        IBQQuantizer(50, 4),
    ],
    ids=lambda q: type(q).__name__,
)
def test_a_new_codebook_is_of_latents_and_in_use(quantizer: Quantizer) -> None:
    model = tiny_vqgan(quantizer, z_channels=8)
    report = start_model(model, tiny_tokenizer(), training_images(), reset_codebook=True)
    assert report.startswith("50 codes fitted to latents")
    assert len(model.tokenize(training_images()).unique()) > 40


def test_learned_logits_stay_with_their_kind() -> None:
    for source, name in (
        (GumbelQuantizer(32, 4), "gumbel-vq"),
        (IBQQuantizer(32, 4), "ibq"),
        (RegularizedQuantizer(32, 4, logits="linear"), "reg-vq"),
    ):
        model = tiny_vqgan(NearestQuantizer(32, 4))
        with pytest.raises(ValueError, match=rf"--quantizer {name}.*--reset-codebook"):
            start_model(model, tiny_vqgan(source).eval(), training_images())
        start_model(model, tiny_vqgan(source).eval(), training_images(), reset_codebook=True)


def test_fsq_of_other_levels_is_another_kind() -> None:
    source = tiny_vqgan(FSQQuantizer(60, 3, levels=(3, 4, 5)))
    start_model(tiny_vqgan(FSQQuantizer(60, 3, levels=(3, 4, 5))), source.eval(), training_images())
    for other in (FSQQuantizer(60, 3, levels=(5, 4, 3)), NearestQuantizer(60, 3)):
        with pytest.raises(ValueError, match=r"fsq .*not select codes by distance: .*levels"):
            start_model(tiny_vqgan(other), source, training_images())
