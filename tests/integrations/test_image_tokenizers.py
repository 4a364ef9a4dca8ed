"""LlamaGen's and TiTok's quantizers, which no package has: their formulas, under their names and with their options."""

import pytest
import torch
import torch.nn.functional as F
from helpers.same_steps import assert_same_steps, largest_tensor
from torch import nn

from regvq_fast.integrations import swap_quantizers
from regvq_fast.ops import tiling

MAPS = (3, 8, 5, 4)  # B, D, H, W
CODES = 64


def nearest(rows, codebook):
    """Scores (M, N) = -|row - code|^2, and the indices (M,) of the best."""
    scores = 2 * rows @ codebook.t() - rows.square().sum(1, keepdim=True) - codebook.square().sum(1)
    return scores, scores.argmax(1)


class LlamaGen(nn.Module):
    """tokenizer/tokenizer_image/vq_model.py's VectorQuantizer."""

    def __init__(self, n_e, e_dim, beta=0.25, entropy_loss_ratio=0.0, l2_norm=True, show_usage=False):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z):
        z, codebook = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.l2_norm:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        scores, indices = nearest(z.flatten(0, 2), codebook)
        codes, losses = codebook[indices].view(z.shape), (None, None, None, 0)
        if self.training:
            log_p = (scores / 0.01).log_softmax(1)
            mean = log_p.exp().mean(0)
            entropy = -(log_p.exp() * log_p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
            losses = F.mse_loss(codes, z.detach()), self.beta * F.mse_loss(z, codes.detach())
            losses += self.entropy_loss_ratio * entropy, self._usage(indices) if self.show_usage else 0
        return (z + (codes - z).detach()).permute(0, 3, 1, 2), losses, (None, None, indices)

    def _usage(self, indices):
        self.codebook_used = torch.cat([self.codebook_used[len(indices) :], indices.float()])
        return len(self.codebook_used.unique()) / self.n_e


class TiTok(nn.Module):
    """1d-tokenizer's modeling/quantizer/quantizer.py's VectorQuantizer."""

    def __init__(self, codebook_size, token_size, commitment_cost=0.25, use_l2_norm=False, clustering_vq=False):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)
        self.commitment_cost, self.use_l2_norm, self.clustering_vq = commitment_cost, use_l2_norm, clustering_vq

    def forward(self, z):
        z, codebook = z.float().permute(0, 2, 3, 1), self.embedding.weight
        if self.use_l2_norm:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        _, indices = nearest(z.flatten(0, 2), codebook)
        codes = codebook[indices].view(z.shape)
        commitment, loss = self.commitment_cost * F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach())
        return (z + (codes - z).detach()).permute(0, 3, 1, 2).contiguous(), {
            "quantizer_loss": commitment + loss,
            "commitment_loss": commitment,
            "codebook_loss": loss,
            "min_encoding_indices": indices.view(z.shape[:3]),
        }


for stand_in, module in ((LlamaGen, "tokenizer.tokenizer_image.vq_model"), (TiTok, "modeling.quantizer.quantizer")):
    stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, "VectorQuantizer", "VectorQuantizer"


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_MIN_TILE_ROWS", 16)
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"l2_norm": False}, {"beta": 0.5, "show_usage": True}])
def test_llamagen(options, training):
    assert_same_steps(LlamaGen(CODES, MAPS[1], **options).train(training), torch.randn(MAPS))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_llamagens_entropy_loss(l2_norm):
    """In fp64: its temperature makes rounding errors of the scores 100 times larger."""
    quantizer = LlamaGen(CODES, MAPS[1], entropy_loss_ratio=0.1, l2_norm=l2_norm).double()
    assert_same_steps(quantizer, torch.randn(MAPS).double())


def test_llamagens_usage_is_a_parameter_among_its_buffers_and_may_be_shorter_than_a_batch():
    """Registered so, it can't be written to in place while gradients are recorded."""
    quantizer = LlamaGen(CODES, MAPS[1], show_usage=True)
    quantizer.codebook_used = nn.Parameter(torch.zeros(40))
    swap_quantizers(quantizer)
    _, losses, (_, _, indices) = quantizer(torch.randn(MAPS))
    assert losses[3] == len(indices[-40:].unique()) / CODES
    assert torch.equal(quantizer.codebook_used.long(), indices[-40:])


@pytest.mark.parametrize("options", [{}, {"use_l2_norm": True}, {"use_l2_norm": True, "commitment_cost": 0.5}])
def test_titok(options):
    assert_same_steps(TiTok(CODES, MAPS[1], **options), torch.randn(MAPS))


def test_titok_under_autocast_stays_in_fp32():
    quantizer, z = TiTok(CODES, MAPS[1]), torch.randn(MAPS).bfloat16()
    expected = quantizer(z)
    swap_quantizers(quantizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(quantizer(z), expected, rtol=0, atol=1e-6)


def test_titoks_clustering_is_not_covered():
    with pytest.raises(ValueError, match="VectorQuantizer: clustering_vq"):
        swap_quantizers(TiTok(CODES, MAPS[1], clustering_vq=True))


@pytest.mark.parametrize("quantizer", [LlamaGen(256, 8, entropy_loss_ratio=0.1), TiTok(256, 8)])
def test_nothing_is_as_large_as_the_distances(quantizer):
    z = torch.randn(4, 8, 8, 8)  # 256 rows
    assert largest_tensor(quantizer, z) >= 256 * 256
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, z) < 256 * 256 / 8
