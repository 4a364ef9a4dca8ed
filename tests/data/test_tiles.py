"""Images of any size through a tokenizer, whole and in tiles."""

import itertools

import pytest
import torch
from helpers.tiny_models import tiny_tokenizer
from torch import Tensor, nn

from regvq_fast.data.tiles import Tiling, _windows, checked_tiling, decode_tokens, pad, tokenize_images
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.models import VQGAN
from regvq_fast.models.layers import AttnBlock

FACTOR = 2
REACH = 24  # pixels beyond which the networks of `local` see nothing, with some to spare


def photograph(height: int, width: int, batch: int = 1) -> Tensor:
    """Smooth random images (B, 3, H, W) uint8."""
    coarse = torch.randn(batch, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(0))
    return to_uint8(nn.functional.interpolate(coarse, (height, width), mode="bilinear") / 2)


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def local() -> VQGAN:
    """A tokenizer without normalization and attention: of convolutions alone, in float64."""
    model = tiny_tokenizer()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.GroupNorm, AttnBlock)):
                setattr(parent, name, nn.Identity())
    latents = model.double().encode(to_float(photograph(64, 64)))
    chosen = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)[:: 32 * 32 // 32]
    model.quantize.embedding.weight.data.copy_(chosen)
    model.decoder.conv_out.weight.data.mul_(20)  # contrast
    return model


def test_padding_mirrors_and_repeats_where_an_image_is_too_small() -> None:
    row = torch.arange(5)[None, None].expand(1, 2, 5)
    assert pad(row, 4)[0].tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]] * 4
    assert pad(torch.tensor([[[1, 2]]]), 8)[0].tolist() == [[1, 2, 1, 1, 1, 1, 1, 1]] * 8
    assert pad(torch.tensor([[[7]]]), 2).tolist() == [[[7, 7], [7, 7]]]
    whole = torch.rand(1, 3, 8, 4)
    assert torch.equal(pad(whole, 4), whole)


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(10, 4, 1), (9, 4, 2), (8, 4, 0), (7, 4, 0), (5, 8, 2), (100, 16, 4)]
)
def test_tiles_cover_an_axis_once(length: int, tile: int, overlap: int) -> None:
    windows = _windows(length, 4, Tiling(4 * tile, 4 * overlap))
    weight, owners = torch.zeros(4 * length), torch.zeros(length)
    for window in windows:
        assert window.stop - window.start == min(tile, length)
        assert window.start <= window.owned.start < window.owned.stop <= window.stop
        weight[4 * window.start : 4 * window.stop] += window.weights
        owners[window.owned] += 1
    assert (owners == 1).all()
    torch.testing.assert_close(weight, torch.ones(4 * length))
    assert all(a.stop - b.start >= overlap for a, b in itertools.pairwise(windows))


@pytest.mark.parametrize("size", [(16, 16), (15, 31), (1, 1), (3, 40)])
def test_images_of_any_size_come_back_in_it(tokenizer: VQGAN, size: tuple[int, int]) -> None:
    images = photograph(*size, batch=2)
    tokens = tokenize_images(tokenizer, images)
    padded = pad(images, FACTOR)
    assert torch.equal(tokens, tokenizer.tokenize(to_float(padded)))
    expected = to_uint8(tokenizer.decode_indices(tokens))[:, :, : size[0], : size[1]]
    assert torch.equal(decode_tokens(tokenizer, tokens, size), expected)
    assert decode_tokens(tokenizer, tokens).shape == padded.shape


def test_an_image_within_one_tile_is_not_changed_by_tiling(tokenizer: VQGAN) -> None:
    images, tiling = photograph(20, 30), Tiling(32, 8)
    tokens = tokenize_images(tokenizer, images, tiling)
    assert torch.equal(tokens, tokenize_images(tokenizer, images))
    assert torch.equal(decode_tokens(tokenizer, tokens, None, tiling), decode_tokens(tokenizer, tokens))


def test_tiles_of_local_networks_agree_with_the_whole_image(local: VQGAN) -> None:
    images, tiling = photograph(150, 200, batch=2), Tiling(100, 50)
    whole = tokenize_images(local, images)
    assert len(whole.unique()) > 4
    assert torch.equal(tokenize_images(local, images, tiling), whole)

    interior = torch.ones(150, 200, dtype=torch.bool)  # out of reach of the tiles' inner edges
    for axis, length in enumerate((150, 200)):
        for window in _windows(length // FACTOR, FACTOR, tiling):
            for edge in {window.start * FACTOR, window.stop * FACTOR} - {0, length}:
                interior.movedim(axis, 0)[edge - REACH : edge + REACH] = False
    assert 0.05 < interior.float().mean() < 0.5
    in_tiles, at_once = (decode_tokens(local, whole, None, t).int() for t in (tiling, None))
    assert (in_tiles - at_once)[:, :, interior].abs().max() <= 1  # float32 sums of tiles are rounded
    assert (in_tiles - at_once).abs().max() > 1  # near the edges the tiles differ, so the comparison is of something


def test_blending_leaves_no_step_where_tiles_meet(local: VQGAN) -> None:
    """The error that tiles make changes no faster from pixel to pixel than weights and images do."""
    images = photograph(64, 200)
    tokens = tokenize_images(local, images)
    whole = decode_tokens(local, tokens).float()

    def largest_step(tiling: Tiling) -> float:
        error = decode_tokens(local, tokens, None, tiling).float() - whole
        return float(error.diff(dim=3).abs().mean(dim=(0, 1, 2)).max())

    assert largest_step(Tiling(100, 50)) < 0.25 * largest_step(Tiling(100, 0))


def test_bad_tilings_are_refused() -> None:
    assert checked_tiling(16, 256) == Tiling(256, 64)
    assert checked_tiling(16, 48, 0) == Tiling(48, 0)
    assert checked_tiling(16, 32) == Tiling(32, 0)
    for tile, overlap, message in (
        (500, None, "496 or 512"),
        (0, None, "--tile 0"),
        (-16, None, "16 or 32"),
        (64, 8, "--overlap 8"),
        (64, 48, "at most 32"),
        (64, -16, "--overlap -16"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_tiling(16, tile, overlap)


def test_what_is_no_image_and_no_tokens_is_refused(tokenizer: VQGAN) -> None:
    with pytest.raises(TypeError, match="float32"):
        tokenize_images(tokenizer, torch.zeros(1, 3, 16, 16))
    for shape in ((3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match=str(shape[-2])):
            tokenize_images(tokenizer, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        decode_tokens(tokenizer, torch.zeros(8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="32"):
        decode_tokens(tokenizer, torch.full((1, 8, 8), 32))
