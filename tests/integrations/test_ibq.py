"""IBQ: the softmax over all codes as straight-through gradient is `vector_quantize` with linear logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers.same_steps import assert_same_steps, largest_tensor
from torch import nn

from regvq_fast.integrations import swap_quantizers
from regvq_fast.ops import tiling

MAPS = (3, 8, 5, 4)  # B, D, H, W
CODES = 64


class IndexPropagationQuantize(nn.Module):
    """What SEED-Voken's class computes (src/IBQ/modules/vqvae/quantize.py), under its names; it isn't on PyPI."""

    def __init__(
        self,
        n_e,
        e_dim,
        beta=0.25,
        use_entropy_loss=False,
        remap=None,
        entropy_temperature=0.01,
        sample_minimization_weight=1.0,
        batch_maximization_weight=1.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)
        self.beta, self.use_entropy_loss, self.remap = beta, use_entropy_loss, remap
        self.entropy_temperature = entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight

    def forward(self, z, temp=None, return_logits=False):
        codebook, rows = self.embedding.weight, z.permute(0, 2, 3, 1)
        logits = rows @ codebook.t()
        soft = logits.softmax(-1)
        indices = soft.argmax(-1)
        hard = F.one_hot(indices, len(codebook)).to(soft)
        quantized, codes = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        loss = F.mse_loss(quantized, rows) + F.mse_loss(codes.detach(), rows)
        loss = loss + self.beta * F.mse_loss(codes, rows.detach())
        if self.use_entropy_loss:
            log_p = (logits / self.entropy_temperature).log_softmax(-1).flatten(0, 2)
            mean_p = log_p.exp().mean(0)
            entropies = -(log_p.exp() * log_p).sum(1).mean(), -(mean_p * (mean_p + 1e-5).log()).sum()
            balance = self.sample_minimization_weight * entropies[0] - self.batch_maximization_weight * entropies[1]
            loss = (loss, *entropies, balance)
        return quantized.permute(0, 3, 1, 2), loss, (None, None, indices.flatten())


IndexPropagationQuantize.__module__ = "src.IBQ.modules.vqvae.quantize"


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    monkeypatch.setattr(tiling, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(tiling, "NOISY_KEPT_ELEMENTS", 0)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.5},
        {"use_entropy_loss": True, "entropy_temperature": 0.7},
        {
            "use_entropy_loss": True,
            "entropy_temperature": 0.3,
            "sample_minimization_weight": 0.5,
            "batch_maximization_weight": 2.0,
        },
    ],
)
def test_index_propagation_quantize(options):
    assert_same_steps(IndexPropagationQuantize(CODES, MAPS[1], **options), torch.randn(MAPS))


def test_sharp_entropies():
    """The library's temperature makes the softmax nearly hard, and rounding errors of the logits 100 times larger."""
    quantizer = IndexPropagationQuantize(CODES, MAPS[1], use_entropy_loss=True).double()
    assert_same_steps(quantizer, torch.randn(MAPS).double())


@pytest.mark.parametrize("num_codes", [16384, 262144])
def test_the_codebooks_of_the_paper(num_codes, monkeypatch):
    """Their N; few rows and channels, so that the plain expression fits."""
    monkeypatch.undo()  # tiles as users have them
    quantizer = IndexPropagationQuantize(num_codes, 4, use_entropy_loss=True, entropy_temperature=1.0)
    assert_same_steps(quantizer.double(), torch.randn(1, 4, 3, 6).double(), steps=1)


def test_remap_is_not_covered():
    with pytest.raises(ValueError, match="IndexPropagationQuantize: remap"):
        swap_quantizers(IndexPropagationQuantize(CODES, MAPS[1], remap="used.npy"))


def test_nothing_is_as_large_as_the_logits():
    quantizer, z = IndexPropagationQuantize(256, 8, use_entropy_loss=True), torch.randn(4, 8, 16, 16)
    assert largest_tensor(quantizer, z) >= 1024 * 256
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, z) < 1024 * 256 / 8
