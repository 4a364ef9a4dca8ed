"""diffusers' VQModel, before and after."""

import copy

import pytest
import torch
from helpers.same_steps import assert_same_steps, largest_tensor

from regvq_fast.integrations import swap_quantizers

pytest.importorskip("diffusers.models.autoencoders.vae")
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"sane_index_shape": True}])
def test_vector_quantizer(options):
    torch.manual_seed(0)
    assert_same_steps(VectorQuantizer(64, 8, beta=0.25, **options), torch.randn(3, 8, 5, 4) / 64)


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_the_whole_model(norm_type, tmp_path):
    torch.manual_seed(0)
    model = VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=32, norm_type=norm_type).eval()
    images = torch.randn(2, 3, 8, 8)
    accelerated = copy.deepcopy(model)
    assert swap_quantizers(accelerated).swapped == {"quantize": "VectorQuantizer"}
    with torch.no_grad():
        assert torch.equal(accelerated(images).sample, model(images).sample)
        accelerated.save_pretrained(tmp_path)
        assert torch.equal(VQModel.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_nothing_is_as_large_as_the_distances():
    quantizer, z = VectorQuantizer(256, 8, beta=0.25), torch.randn(4, 8, 8, 8)
    assert largest_tensor(quantizer, z) >= 256 * 256
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, z) < 256 * 256 / 8
