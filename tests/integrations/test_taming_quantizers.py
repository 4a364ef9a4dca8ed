"""taming-transformers' quantizers, before and after."""

import importlib
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.same_steps import assert_same_steps, largest_tensor
from torch import nn

from regvq_fast.integrations import swap_quantizers
from regvq_fast.integrations import taming as adapters
from regvq_fast.ops import tiling
from regvq_fast.ops.noise import gumbel_noise

pytest.importorskip("einops")
quantize = pytest.importorskip("taming.modules.vqvae.quantize")

MAPS = (3, 8, 5, 4)  # B, D, H, W
CODES = 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps():
    return torch.randn(MAPS) / CODES  # of the size of fresh codes


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"sane_index_shape": True}])
def test_vector_quantizer_2(options):
    assert_same_steps(quantize.VectorQuantizer2(CODES, MAPS[1], beta=0.25, **options), maps())


@pytest.mark.parametrize("unknown_index", ["random", "extra", 3])
def test_remapped_indices(unknown_index, tmp_path):
    np.save(tmp_path / "used.npy", np.arange(0, CODES, 2))
    remap = str(tmp_path / "used.npy")
    assert_same_steps(quantize.VectorQuantizer2(CODES, MAPS[1], 0.25, remap=remap, unknown_index=unknown_index), maps())


def test_the_older_one():
    assert_same_steps(quantize.VectorQuantizer(CODES, MAPS[1], beta=0.25), maps())


def test_arguments_of_the_gumbel_quantizer_are_refused():
    quantizer = quantize.VectorQuantizer2(CODES, MAPS[1], beta=0.25)
    swap_quantizers(quantizer)
    with pytest.raises(ValueError, match=r"temp=0.5.*GumbelQuantize"):
        quantizer(maps(), temp=0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"kl_weight": 0.1, "temp_init": 0.6}, {"use_vqinterface": False}])
def test_gumbel_quantize_with_the_same_noise(options, training, monkeypatch):
    seed = torch.tensor(5)

    def known_noise(logits, tau, dim, hard):
        assert (dim, hard) == (1, True)
        batch, codes, height, width = logits.shape
        noise = gumbel_noise(seed, torch.arange(batch * height * width), codes)
        soft = ((logits + noise.view(batch, height, width, codes).permute(0, 3, 1, 2)) / tau).softmax(1)
        return F.one_hot(soft.argmax(1), codes).permute(0, 3, 1, 2) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", known_noise)
    monkeypatch.setattr(adapters, "sample_seed", lambda device: seed)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)  # several tiles of rows
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    quantizer = quantize.GumbelQuantize(MAPS[1], MAPS[1], CODES, **options).train(training)
    assert_same_steps(quantizer, torch.randn(MAPS))
    assert_same_steps(quantizer, torch.randn(MAPS), temp=0.8)


def test_gumbel_quantize_draws_from_pytorchs_generator():
    quantizer = quantize.GumbelQuantize(MAPS[1], MAPS[1], CODES)
    swap_quantizers(quantizer)
    z = torch.randn(MAPS)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(quantizer(z)[2][2])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_logits_are_the_librarys():
    quantizer = quantize.GumbelQuantize(MAPS[1], MAPS[1], CODES)
    z = torch.randn(MAPS)
    logits = quantizer.proj(z)
    swap_quantizers(quantizer)
    assert torch.equal(quantizer(z, return_logits=True)[3], logits)


@pytest.mark.parametrize(
    ("options", "reason"), [({"straight_through": False}, "straight_through"), ({"num_hiddens": 6}, "num_hiddens=6")]
)
def test_options_that_are_not_covered(options, reason):
    arguments = {"num_hiddens": MAPS[1], "embedding_dim": MAPS[1], "n_embed": CODES} | options
    with pytest.raises(ValueError, match=rf"GumbelQuantize: .*{reason}"):
        swap_quantizers(quantize.GumbelQuantize(**arguments))


@pytest.mark.parametrize("name", ["VectorQuantizer2", "GumbelQuantize"])
def test_nothing_is_as_large_as_the_distances(name, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(tiling, "NOISY_KEPT_ELEMENTS", 0)
    width, codes = 8, 256
    z = torch.randn(4, width, 8, 8)  # 256 rows
    arguments = (width, width, codes) if name == "GumbelQuantize" else (codes, width, 0.25)
    quantizer = getattr(quantize, name)(*arguments)
    assert largest_tensor(quantizer, z) >= 256 * codes
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, z) < 256 * codes / 8


def test_the_whole_model():
    """taming's own VQModel and its code around the quantizer; what else its files import isn't needed here."""
    pytest.importorskip("taming.modules.diffusionmodules.model")
    stand_ins = {
        "pytorch_lightning": SimpleNamespace(LightningModule=nn.Module),
        "taming.main": SimpleNamespace(instantiate_from_config=lambda config: nn.Identity()),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        vqgan = importlib.import_module("taming.models.vqgan")
    sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3}
    sizes |= {"resolution": 8, "z_channels": 8, "double_z": False}
    assert_same_steps(vqgan.VQModel(sizes, {}, n_embed=CODES, embed_dim=8), torch.randn(2, 3, 8, 8))


def test_where_the_code_is_another_it_is_the_nearer_one():
    """With rows far larger than new codes, the library's distances round away the differences between codes."""
    quantizer = quantize.VectorQuantizer2(1024, 64, beta=0.25)
    z = 8 * torch.randn(8, 64, 16, 16)
    theirs = quantizer(z)[2][2]
    swap_quantizers(quantizer)
    ours = quantizer(z)[2][2]
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.embedding.weight.double()
    distances = [(rows - codes[indices]).square().sum(1) for indices in (ours, theirs)]
    assert 0 < (ours != theirs).sum() < 0.02 * len(ours)
    assert (distances[0] <= distances[1]).all()
