"""IBQ: the softmax over all codes as straight-through gradient is `vector_quantize` with linear logits."""

import pytest
import torch
from helpers.plain_ibq import IndexPropagationQuantize
from helpers.same_steps import assert_same_steps, largest_tensor

from regvq_fast.integrations import swap_quantizers
from regvq_fast.ops import tiling

MAPS = (3, 8, 5, 4)  # B, D, H, W
CODES = 64


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
