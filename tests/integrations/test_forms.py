"""Our quantizers with other libraries' interfaces, by themselves and in those libraries' models."""

import copy
import importlib
import io
import pickle
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regvq_fast.integrations import as_diffusers, as_lucidrains, as_taming, forms, swap_quantizers
from regvq_fast.quantizers import QUANTIZERS, NearestQuantizer, Quantizer, QuantizerOutput, RegularizedQuantizer

CODES, WIDTH = 64, 8
MAPS = (4, WIDTH, 6, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def initialized(**settings):
    quantizer = RegularizedQuantizer(CODES, WIDTH, **settings)
    quantizer.initialize(torch.randn(MAPS))
    return quantizer


def outputs(quantizer, x, seed=0):
    torch.manual_seed(seed)
    return quantizer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_tamings_interface(name, training):
    num_codes, width = QUANTIZERS[name].Settings().sizes(256, WIDTH)
    plain = QUANTIZERS[name](num_codes, width).train(training)
    z = torch.randn(4, width, 6, 5)
    plain.initialize(z)
    quantizer = as_taming(copy.deepcopy(plain))
    out = outputs(plain, z)
    quantized, loss, (perplexity, encodings, indices) = outputs(quantizer, z)
    assert torch.equal(quantized, out.quantized)
    assert torch.equal(loss, out.loss)
    assert torch.equal(indices, out.indices.flatten())
    assert encodings is None
    share = F.one_hot(indices, num_codes).float().mean(0)
    torch.testing.assert_close(perplexity, torch.special.entr(share).sum().exp())
    codes = plain.eval().codes_of(out.indices)
    assert torch.equal(quantizer.get_codebook_entry(indices, (4, 6, 5, width)), codes)
    assert torch.equal(quantizer.get_codebook_entry(out.indices), codes.permute(0, 2, 3, 1))
    assert torch.equal(quantizer.embed_code(out.indices), codes)
    assert torch.equal(quantizer.codebook[indices], codes.permute(0, 2, 3, 1).flatten(0, 2))
    assert (quantizer.n_e, quantizer.e_dim) == (num_codes, width)


class Signs(Quantizer):
    """The sign of each channel: a quantizer without parameters."""

    def forward(self, z, seed=None, row_offset=0):
        indices = ((z > 0).long() << torch.arange(self.code_dim).view(-1, 1, 1)).sum(1)
        codes = self.codes_of(indices)
        return QuantizerOutput(codes, indices, z.new_zeros(()), {}, torch.zeros_like(codes[:, 0]), indices < 0)

    def codes_of(self, indices):
        return ((indices.unsqueeze(1) >> torch.arange(self.code_dim).view(-1, 1, 1)) & 1) * 2.0 - 1


def test_a_quantizer_without_parameters():
    z = torch.randn(MAPS)
    quantizer = as_taming(Signs(2**WIDTH, WIDTH))
    quantized, _, (_, _, indices) = quantizer(z)
    assert torch.equal(quantized, z.sign())
    assert torch.equal(quantizer.codebook[indices], z.sign().permute(0, 2, 3, 1).flatten(0, 2))
    assert quantizer.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "to_x"),
    [
        ({}, lambda z: z.flatten(2).transpose(1, 2)),
        ({"channel_last": False}, lambda z: z.flatten(2)),
        ({"accept_image_fmap": True}, lambda z: z),
    ],
    ids=["rows", "channel_last=False", "accept_image_fmap"],
)
def test_layouts_of_lucidrains(options, to_x):
    plain = initialized()
    quantizer, z = as_lucidrains(copy.deepcopy(plain), **options), torch.randn(MAPS)
    out, x = outputs(plain, z), to_x(z)
    quantized, indices, loss = outputs(quantizer, x)
    assert torch.equal(quantized, to_x(out.quantized))
    assert torch.equal(indices.flatten(1), out.indices.flatten(1))
    assert indices.shape == ((4, 6, 5) if x.ndim == 4 else (4, 30))
    assert loss > 0
    assert torch.equal(quantizer.get_codes_from_indices(indices), to_x(plain.codes_of(out.indices)))
    assert torch.equal(quantizer.get_output_from_indices(indices), quantizer.get_codes_from_indices(indices))
    assert quantizer.codebook.shape == (quantizer.codebook_size, WIDTH)
    assert quantizer.eval()(x)[2] == 0


def test_rows_of_a_batch_share_a_mask():
    quantizer = as_lucidrains(initialized(perturbed=0.9))
    x = torch.randn(200, WIDTH)
    quantized, indices, _ = quantizer(x)
    assert quantized.shape == (200, WIDTH)
    moved = (indices != quantizer.eval()(x)[1]).float().mean()
    assert 0.2 < moved < 0.4, "of the 80 rows with noise nine tenths"
    assert torch.equal(quantizer.get_codes_from_indices(indices), quantizer.codebook[indices])


@pytest.mark.parametrize("wrap", [as_taming, as_lucidrains])
@pytest.mark.parametrize("std", [0.01, 30.0])
def test_a_fresh_quantizer_needs_nothing_before_it_trains(std, wrap):
    """In an encoder of somebody else, with latents of any size: noise that means something, and codes that are used."""
    quantizer = wrap(RegularizedQuantizer(256, 16), **({"accept_image_fmap": True} if wrap is as_lucidrains else {}))
    encoder = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.GELU(), nn.Conv2d(64, 16, 1))
    decoder = nn.ConvTranspose2d(16, 3, 4, 4)
    with torch.no_grad():
        scale = std / encoder(torch.randn(8, 3, 32, 32)).std()
        encoder[2].weight.mul_(scale)
        encoder[2].bias.mul_(scale)
    optimizer = torch.optim.Adam([*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()], 1e-3)
    for step in range(20):
        images = F.interpolate(torch.randn(8, 3, 8, 8), scale_factor=4.0)
        result = quantizer(encoder(images))
        loss = F.mse_loss(decoder(result[0]), images) + (result[1] if wrap is as_taming else result[2])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in [encoder[0].weight, quantizer.embedding.weight]), step
        optimizer.step()
    out = RegularizedQuantizer.forward(quantizer, encoder(images))
    assert float(out.metrics["perturbed"]) == pytest.approx(0.6, abs=0.2)
    assert len(out.indices.unique()) > 100


def test_the_first_batch_in_training_initializes_and_no_other():
    quantizer, z = as_taming(RegularizedQuantizer(CODES, WIDTH)), 30 * torch.randn(MAPS) + 5
    fresh = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(z)
    torch.testing.assert_close(quantizer.state_dict(), fresh, rtol=0, atol=0)
    plain = RegularizedQuantizer(CODES, WIDTH)
    torch.manual_seed(1)
    plain.initialize(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs(quantizer.train(), z, seed=1)
    assert quantizer.initialized
    for name in ("shift", "gain", "log_scale", "embedding.weight"):
        assert torch.equal(quantizer.state_dict()[name], plain.state_dict()[name]), name
    codes, shift = quantizer.codebook.clone(), quantizer.shift.clone()
    quantizer(torch.randn(MAPS))
    assert torch.equal(quantizer.codebook, codes)
    assert torch.equal(quantizer.shift, shift)


@pytest.mark.parametrize("wrap", [as_taming, as_lucidrains])
def test_weights_that_were_loaded_stay(wrap):
    plain, image = initialized(), {"accept_image_fmap": True} if wrap is as_lucidrains else {}
    quantizer, z = wrap(RegularizedQuantizer(CODES, WIDTH), **image), torch.randn(MAPS)
    assert quantizer.state_dict().keys() == {*plain.state_dict(), "initialized"}
    assert wrap(NearestQuantizer(CODES, WIDTH), **image).state_dict().keys() == {"embedding.weight"}
    quantizer.load_state_dict(plain.state_dict())  # of a quantizer without the interface
    codes = quantizer.codebook.clone()
    for other in (quantizer, wrap(plain, **image)):
        other(z)
        assert torch.equal(other.codebook, codes)
    again = wrap(RegularizedQuantizer(CODES, WIDTH), **image)
    again.load_state_dict(quantizer.state_dict())
    again(z)
    assert torch.equal(again.codebook, codes)
    fresh = wrap(RegularizedQuantizer(CODES, WIDTH), **image)
    again.load_state_dict(fresh.state_dict())  # of one that never trained
    again(z)
    assert not torch.equal(again.codebook, fresh.codebook)


def test_codes_of_a_taming_checkpoint_stay():
    model = nn.ModuleDict({"quantize": as_taming(RegularizedQuantizer(CODES, WIDTH, logits="distance"))})
    codes = torch.randn(CODES, WIDTH)
    model.load_state_dict({"quantize.embedding.weight": codes}, strict=False)
    model["quantize"](torch.randn(MAPS))
    assert torch.equal(model["quantize"].codebook, codes)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), "torch"])
def test_copies_have_the_interface(copier):
    quantizer, z = as_lucidrains(RegularizedQuantizer(CODES, WIDTH), channel_last=False), torch.randn(4, WIDTH, 30)
    if copier == "torch":
        file = io.BytesIO()
        torch.save(quantizer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copier(quantizer)
    for _ in range(2):
        torch.testing.assert_close(outputs(copied, z), outputs(quantizer, z), rtol=0, atol=0)
    assert isinstance(copied, RegularizedQuantizer)


def test_compiled_it_starts_by_itself_and_is_one_graph_then():
    quantizer, z = as_taming(RegularizedQuantizer(CODES, WIDTH)), torch.randn(MAPS)
    eager = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, z), outputs(eager, z))
    whole = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(whole, z, seed=1), outputs(eager, z, seed=1))


def test_rank_0_starts_for_all_and_each_rank_has_its_own_noise(monkeypatch):
    """As rank 1 of two; what rank 0 would send are zeros."""
    monkeypatch.setattr(forms, "world_size", lambda: 2)
    monkeypatch.setattr(forms, "gather_rows", lambda rows: torch.cat([torch.zeros_like(rows), rows]))
    quantizer = as_taming(RegularizedQuantizer(CODES, WIDTH))
    quantizer.initialize(torch.randn(MAPS))
    assert not any(tensor.any() for tensor in quantizer.state_dict().values())
    quantizer, z = as_taming(initialized()), torch.randn(MAPS)
    indices = []
    for rank in (0, 1):
        monkeypatch.setattr(forms, "rank", lambda rank=rank: rank)
        indices.append(outputs(copy.deepcopy(quantizer), z)[2][2])
    assert not torch.equal(*indices)


def test_in_bf16_the_output_has_the_models_type():
    quantizer = as_taming(initialized()).bfloat16()
    assert quantizer(torch.randn(MAPS).bfloat16())[0].dtype == torch.bfloat16
    assert as_taming(initialized())(torch.randn(MAPS).bfloat16())[0].dtype == torch.float32
    fresh = as_taming(RegularizedQuantizer(CODES, WIDTH).bfloat16())
    fresh(torch.randn(MAPS).bfloat16())
    assert fresh.shift.any(), "the first batch initializes it, too"


def test_what_is_refused():
    quantizer = as_lucidrains(RegularizedQuantizer(CODES, WIDTH))
    with pytest.raises(ValueError, match=r"\(\.\.\., 8\).*\(4, 8, 30\)"):
        quantizer(torch.randn(4, WIDTH, 30))
    with pytest.raises(ValueError, match=r"RegularizedQuantizer .*mask, topk"):
        quantizer(torch.randn(4, 30, WIDTH), mask=torch.ones(4, 30), topk=2, lens=None, freeze_codebook=False)
    with pytest.raises(ValueError, match=r"temp=0\.5"):
        as_taming(RegularizedQuantizer(CODES, WIDTH))(torch.randn(MAPS), temp=0.5)
    with pytest.raises(ValueError, match="already"):
        as_taming(quantizer)
    with pytest.raises(TypeError, match="Linear"):
        as_taming(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module of it is a known quantizer"):
        swap_quantizers(quantizer)


def training_steps(model, images, forward):
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        reconstruction, loss = forward(model, images)
        total = F.mse_loss(reconstruction, images) + loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0]
    assert model.quantize.initialized


def test_in_tamings_model():
    pytest.importorskip("einops")
    pytest.importorskip("taming.modules.diffusionmodules.model")
    stand_ins = {
        "pytorch_lightning": SimpleNamespace(LightningModule=nn.Module),
        "taming.main": SimpleNamespace(instantiate_from_config=lambda config: nn.Identity()),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        vqgan = importlib.import_module("taming.models.vqgan")
    sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3}
    sizes |= {"resolution": 8, "z_channels": WIDTH, "double_z": False}
    model, images = vqgan.VQModel(sizes, {}, n_embed=CODES, embed_dim=WIDTH), torch.randn(2, 3, 8, 8)
    names = model.state_dict().keys()
    model.quantize = as_taming(RegularizedQuantizer(CODES, WIDTH))
    assert names <= model.state_dict().keys()
    training_steps(model, images, lambda model, images: model(images))
    model.eval()
    quantized, _, (_, _, indices) = model.encode(images)
    torch.testing.assert_close(model.decode_code(indices.view(2, 8, 8)), model.decode(quantized))


def test_in_diffusers_model(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("diffusers.models.autoencoders.vae")

    def build():
        model = diffusers.VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=CODES)
        model.quantize = as_diffusers(RegularizedQuantizer(CODES, 4))
        return model

    model, images = build(), torch.randn(2, 3, 8, 8)
    training_steps(model, images, lambda model, images: model(images, return_dict=False)[:2])
    model.eval().save_pretrained(tmp_path)
    from safetensors.torch import load_file

    again = build().eval()
    again.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images).sample, model(images).sample)
        latents = model.encode(images).latents
        _, _, (_, _, indices) = model.quantize(latents)
        codes = model.quantize.get_codebook_entry(indices, (2, 8, 8, 4))
        torch.testing.assert_close(model.decode(codes, force_not_quantize=True).sample, model(images).sample)
