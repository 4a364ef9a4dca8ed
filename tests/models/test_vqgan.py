"""The autoencoder: taming's names and shapes, its methods, and what it refuses."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from regvq_fast.models.vqgan import VQGAN
from regvq_fast.quantizers import NearestQuantizer, RegularizedQuantizer

TAMING_SHAPES = Path(__file__).parent / "data" / "taming_vqgan_imagenet_f16_1024.json"
TINY = {"image_size": 16, "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "z_channels": 6}


class Quantized(NamedTuple):
    quantized: Tensor
    indices: Tensor


class NearestCode(nn.Module):
    """The least that VQGAN asks of a quantizer; noisy in training, so that a leak of training mode shows."""

    def __init__(self, num_codes: int = 12, code_dim: int = 4):
        super().__init__()
        self.num_codes, self.code_dim = num_codes, code_dim
        self.embedding = nn.Embedding(num_codes, code_dim)
        self.register_buffer("steps", torch.zeros(()))

    def codes_of(self, indices):
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).unsqueeze(3)  # (B, h, w, 1, D)
        distances = (rows - self.embedding.weight.to(z.dtype)).square().sum(-1)
        if self.training:
            distances = distances + torch.rand_like(distances)
        indices = distances.argmin(-1)
        return Quantized(z + (self.codes_of(indices) - z).detach(), indices)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQGAN(NearestCode(), **TINY).double().eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- taming's layout -------------------------------------------------------------------------------------------------


def test_default_names_and_shapes_are_tamings():
    with torch.device("meta"):
        model = VQGAN(NearestCode(1024, 256))
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    del ours["quantize.steps"]  # the stand-in quantizer's own
    assert ours == json.loads(TAMING_SHAPES.read_text())


def test_a_taming_checkpoint_loads(model, images):
    checkpoint = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    del checkpoint["quantize.steps"]
    model.quantize.steps.fill_(7)
    model.load_taming_state_dict({"epoch": 3, "state_dict": checkpoint | {"loss.discriminator.main.0.bias": 0}})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in checkpoint.items())
    assert model.quantize.steps == 7
    assert model(images).reconstruction.isfinite().all()


def test_a_wrong_checkpoint_is_refused_as_a_whole(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    del wrong["encoder.conv_in.bias"], wrong["quantize.embedding.weight"]
    wrong["encoder.conv_im.bias"] = torch.zeros(8)
    wrong["decoder.conv_out.weight"] = torch.zeros(3, 4, 3, 3)
    with pytest.raises(ValueError, match=r"fit .*VQGAN") as error:
        model.load_taming_state_dict(wrong)
    assert str(error.value).splitlines()[1:] == [
        "  missing: encoder.conv_in.bias",
        "  missing: quantize.embedding.weight",
        "  unexpected: encoder.conv_im.bias",
        "  wrong shape: decoder.conv_out.weight is (3, 4, 3, 3), should be (3, 8, 3, 3)",
    ]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_not_strict_loads_what_fits_by_name(model):
    bias = model.encoder.conv_in.bias.detach() + 1
    model.load_taming_state_dict({"encoder.conv_in.bias": bias, "colorize": torch.zeros(1)}, strict=False)
    assert torch.equal(model.encoder.conv_in.bias, bias)
    with pytest.raises(ValueError, match="wrong shape"):
        model.load_taming_state_dict({"encoder.conv_in.bias": bias[1:]}, strict=False)


def test_weights_on_a_width_that_taming_normalises_otherwise_are_warned_of(model):
    with pytest.warns(UserWarning, match="32 groups"):
        model.load_taming_state_dict(model.state_dict())


def test_attention_stands_at_the_resolutions_named():
    model = VQGAN(NearestCode(), **TINY | {"ch_mult": (1, 1, 2), "attn_resolutions": (4, 16)})
    assert [len(level.attn) for level in model.encoder.down] == [1, 0, 1]
    assert [len(level.attn) for level in model.decoder.up] == [2, 0, 2]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_shapes(model, images):
    output = model(images)
    assert (model.downsampling_factor, model.token_shape) == (2, (8, 8))
    assert model.encode(images).shape == (2, 4, 8, 12)
    assert output.quantizer.indices.shape == (2, 8, 12)
    assert output.features.shape == (2, 8, 16, 24)
    assert output.reconstruction.shape == images.shape


def test_every_parameter_takes_part(model, images):
    output = model(images)
    codes = model.quantize.codes_of(output.quantizer.indices)
    (output.reconstruction.sum() + codes.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_last_layer_gradient_follows_from_the_features(model, images):
    output = model(images)
    gradient = torch.randn_like(output.reconstruction)
    (wanted,) = torch.autograd.grad(output.reconstruction, model.last_layer, gradient)
    formed = torch.nn.grad.conv2d_weight(output.features, model.last_layer.shape, gradient, padding=1)
    torch.testing.assert_close(formed, wanted)


def test_tokens_decode_to_the_reconstruction(model, images):
    output = model(images)
    tokens = model.tokenize(images)
    assert torch.equal(tokens, output.quantizer.indices)
    torch.testing.assert_close(model.decode_indices(tokens), output.reconstruction)
    torch.testing.assert_close(model.decode(output.quantizer.quantized), output.reconstruction)


def test_tokens_do_not_depend_on_the_mode(images):
    model = VQGAN(NearestCode(), **TINY, dropout=0.5).double().eval()
    tokens = model.tokenize(images)
    decoded = model.decode_indices(tokens)
    model.train()
    model.encoder.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.tokenize(images), tokens)
    assert torch.equal(model.decode_indices(tokens), decoded)
    with pytest.raises(ValueError, match="multiple"):
        model.tokenize(images[..., 1:])
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model.decode(model.quantize.codes_of(tokens)), decoded)  # the dropout is there


def test_channels_last(model, images):
    expected = model(images)
    output = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output.reconstruction, expected.reconstruction)
    assert output.features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_checkpointed_activations_leave_the_gradients_as_they_are(model, images, compile):
    gradients, kept = [], []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        sizes: list[int] = []
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compile else model
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = forward(images).reconstruction.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        kept.append(sum(sizes))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.5 * kept[0] or compile


def test_compiles_without_a_graph_break(model, images):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled.reconstruction, model(images).reconstruction)
    tokens = torch.compile(model.tokenize, fullgraph=True, backend="eager")(images)
    assert torch.equal(tokens, compiled.quantizer.indices)


def test_features_have_the_type_that_the_last_convolution_computes_in(model, images):
    """Though a GPU normalizes in fp32 under autocast."""
    model, images = model.float(), images.float()
    model.decoder.norm_out.register_forward_hook(lambda module, inputs, output: output.float())
    assert model(images).features.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).features.dtype == torch.bfloat16


def test_bfloat16_autocast(model, images):
    model, images = model.float(), images.float()
    expected = model.decode(model.encode(images))
    with torch.autocast("cpu", torch.bfloat16):
        output = model.decode(model.encode(images))
    assert output.dtype == torch.bfloat16
    error = (output.float() - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 17}, r"image_size 17 .*\b2$"),
        ({"image_size": 0}, r"image_size .*\b0$"),
        ({"ch": 0}, r"^ch .*\b0$"),
        ({"num_res_blocks": 0}, r"num_res_blocks .*\b0$"),
        ({"z_channels": -1}, r"z_channels .*-1$"),
        ({"in_channels": 0}, r"in_channels .*\b0$"),
        ({"ch_mult": ()}, r"ch_mult .*\(\)"),
        ({"ch_mult": (1, 0)}, r"ch_mult .*\(1, 0\)"),
        ({"dropout": 1.0}, r"dropout .*\b1\.0$"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        VQGAN(NearestCode(), **TINY | change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16), r"\(B, 3, H, W\).*\(2, 3, 16\)"),
        ((2, 1, 16, 16), r"\(B, 3, H, W\).*\(2, 1, 16, 16\)"),
        ((2, 3, 15, 16), r"height 15 .*\b2$"),
        ((2, 3, 16, 9), r"width 9 .*\b2$"),
    ],
)
def test_bad_images(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape, dtype=torch.float64))


def test_bad_indices(model):
    with pytest.raises(ValueError, match=r"\(B, h, w\).*\(8, 8\)"):
        model.decode_indices(torch.zeros(8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"int64.*torch\.float32"):
        model.decode_indices(torch.zeros(1, 8, 8))
    for token in (-1, 12):
        with pytest.raises(ValueError, match=rf"indices .*\[0, 12\).*{token}"):
            model.decode_indices(torch.full((1, 8, 8), token))


def test_images_that_are_no_floats_in_the_range_are_refused(model, images):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        model.tokenize(images * 255)
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        model.tokenize((images.abs() * 127).to(torch.uint8))


def test_tokens_and_latents_of_another_shape_are_not_decoded(model):
    with pytest.raises(TypeError, match="decode_indices"):
        model.decode(torch.zeros(1, 8, 8, dtype=torch.int64))
    for shape in ((1, 3, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match=str(shape[-1])):
            model.decode(torch.zeros(shape))


@pytest.mark.parametrize("quantizer", [RegularizedQuantizer, NearestQuantizer])
def test_a_model_in_bfloat16_takes_images_in_fp32(quantizer):
    model = VQGAN(quantizer(12, 4), **TINY).to(torch.bfloat16)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = model.tokenize(images)
    assert model.decode_indices(tokens).dtype == torch.bfloat16
    model.initialize_quantizer(images)
    output = model(images, torch.tensor(1))
    assert output.reconstruction.dtype == torch.bfloat16
    output.reconstruction.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
