import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from regvq_fast.evaluation.plots import (
    save_codebook_mosaic,
    save_entropy_map,
    save_labelled_rows,
    save_reconstruction_grid,
    save_usage_histogram,
)
from regvq_fast.image_grids import caption_tiles, color_map, legend_of, save_image_grid


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def flat(levels, size):
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_a_grid_shows_originals_above_reconstructions(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    save_reconstruction_grid(path, flat([10, 20, 30], 128), flat([110, 120, 130], 128), columns=2)
    picture = read(path)
    assert picture.shape == (2 * (128 * 2 + 2 + 8) + 8, 2 * (128 + 8) + 8, 3)
    centres = picture[[8 + 64, 8 + 130 + 64, 8 + 266 + 64, 8 + 266 + 130 + 64]][:, [8 + 64, 8 + 136 + 64], 0]
    assert centres.tolist() == [[10, 20], [110, 120], [30, 255], [130, 255]]
    assert (picture[:8] == 255).all()
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_a_grid_enlarges_small_images_and_takes_floats(tmp_path):
    originals = torch.full((1, 3, 40, 40), -1.0)
    originals[..., 0, 0] = 1.0
    save_reconstruction_grid(tmp_path / "grid.png", originals, torch.zeros_like(originals).bfloat16())
    picture = read(tmp_path / "grid.png")
    assert picture.shape[1] == 160 + 16
    assert (picture[8:12, 8:12] == 255).all()  # one pixel became a block of four by four, with no blur
    assert (picture[12:168, 8:168] == 0).all()
    assert set(np.unique(picture[170:330, 8:168])) <= {127, 128}


def test_a_grid_refuses_other_shapes(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    for other in (images[:1], images[:, :1], images[0]):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            save_reconstruction_grid(tmp_path / "grid.png", images, other)
    assert not list(tmp_path.iterdir())


def decode(codes):
    """Each token is a block of 16 pixels of its code's level, in a frame of noise that the plot must crop."""
    assert not torch.is_grad_enabled()
    assert codes.dtype == torch.int64
    images = codes.to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(16, 2).repeat_interleave(16, 3).clone()
    images[..., :8] = images[..., -8:] = 255
    images[:, :, :8] = images[:, :, -8:] = 255
    return images


@pytest.mark.parametrize(("codes", "side"), [(1, 1), (5, 3), (100, 10), (250, 16)])
def test_a_mosaic_has_a_tile_for_each_code_in_reading_order(tmp_path, codes, side):
    save_codebook_mosaic(tmp_path / "codes.png", decode, codes, (4, 4), batch_size=7)
    picture = read(tmp_path / "codes.png")
    pitch = (picture.shape[1] - 1) // side
    for code in range(codes):
        row, column = divmod(code, side)
        tile = picture[1 + row * pitch : (row + 1) * pitch, 1 + column * pitch : (column + 1) * pitch]
        assert (tile == code).all(), code
    if codes < side**2:
        assert (picture[-pitch // 2, -pitch // 2] == 255).all()


def test_a_mosaic_of_a_large_codebook_is_32_by_32(tmp_path):
    seen = []

    def decode_and_note(codes):
        seen.append(codes[:, 0, 0])
        return torch.zeros(len(codes), 3, 8, 8)

    save_codebook_mosaic(tmp_path / "codes.png", decode_and_note, 5000, (2, 2))
    assert torch.equal(torch.cat(seen), torch.arange(1024))
    assert read(tmp_path / "codes.png").shape == (32 * 33 + 1, 32 * 33 + 1, 3)
    with pytest.raises(ValueError, match=r"num_codes .*\b0$"):
        save_codebook_mosaic(tmp_path / "codes.png", decode, 0, (2, 2))


@pytest.mark.parametrize(
    "counts", [torch.randint(90, 110, (256,)), torch.tensor([1000000, 30, 1, 0, 0]), torch.zeros(16), torch.ones(16384)]
)
def test_a_histogram_of_any_counts(tmp_path, counts):
    save_usage_histogram(tmp_path / "usage.png", counts.long(), "any")
    picture = read(tmp_path / "usage.png")
    assert picture.shape[1] > 700
    assert picture.std() > 5


def test_a_histogram_shades_the_unused_share(tmp_path):
    counts = torch.tensor([0, 5] * 50)
    save_usage_histogram(tmp_path / "half.png", counts, "half")
    save_usage_histogram(tmp_path / "all.png", counts + 5, "all")
    grey = [(read(tmp_path / name) == 0xD9).all(axis=2).mean() for name in ("half.png", "all.png")]
    assert grey[0] > 0.25
    assert grey[1] < 0.01
    with pytest.raises(ValueError, match=r"\(N,\).*\(2, 2\)"):
        save_usage_histogram(tmp_path / "bad.png", torch.ones(2, 2), "bad")


def test_a_histogram_leaves_pyplot_alone(tmp_path):
    figures, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
    save_usage_histogram(tmp_path / "usage.png", torch.ones(4), "four")
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_a_legend_lists_the_classes_that_occur_with_their_colours(tmp_path):
    maps = torch.tensor([[[0, 0], [2, 2]], [[2, 2], [5, 5]]])
    names = ("astronaut", "bricks", "cameraman")
    legend = legend_of(maps, names)
    assert legend == {0: "astronaut", 2: "cameraman", 5: "5"}
    for name, shown in (("plain", None), ("legend", legend)):
        save_image_grid(tmp_path / f"{name}.png", color_map(maps, (128, 128)), legend=shown)
    plain, picture = read(tmp_path / "plain.png"), read(tmp_path / "legend.png")
    assert np.array_equal(picture[: len(plain)], plain)
    below = picture[len(plain) :]
    assert len(below) >= 20
    colours = {tuple(colour) for colour in color_map(maps, (2, 2)).permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert len(colours) == 3
    found = {tuple(colour) for colour in below.reshape(-1, 3).tolist()}
    assert colours <= found
    assert (0, 0, 0) in found, "names are text"


def test_captions_are_shown_whole():
    def ink(tile):
        return int((tile.min(dim=0).values < 128).sum())

    word = "description"
    short, long, unbroken = (caption_tiles([text], 192)[0] for text in (word, " ".join([word] * 60), word * 60))
    assert short.shape[1] < 40, "a line of text needs no more"
    for tile in (long, unbroken):
        assert tile.shape[1] > 192
        assert ink(tile) == pytest.approx(60 * ink(short), rel=0.1)
        assert (tile[:, -2:] == 255).all()
        assert (tile[:, :, -1:] == 255).all()
    assert caption_tiles([word, " ".join([word] * 60)], 192).shape == (2, *long.shape)
    assert caption_tiles([""], 192).shape[3] == 192


def test_rows_have_their_labels_at_their_left(tmp_path):
    save_labelled_rows(tmp_path / "rows.png", {"originals": flat([10, 20], 48), "": flat([110, 120], 48)})
    picture = read(tmp_path / "rows.png")
    label, images = picture[:, :150], picture[:, 150:]
    top, bottom = np.split(label, 2)
    assert top.min() < 100
    assert (bottom == 255).all()
    centres = images[[4 + 48, 104 + 4 + 48]][:, [4 + 48, 100 + 4 + 48], 0]
    assert centres.tolist() == [[10, 20], [110, 120]]
    with pytest.raises(ValueError, match="one shape"):
        save_labelled_rows(tmp_path / "rows.png", {"a": flat([10], 48), "b": flat([10], 32)})
    with pytest.raises(ValueError, match="one shape"):
        save_labelled_rows(tmp_path / "rows.png", {})


def test_an_entropy_map_shows_each_position(tmp_path):
    entropy = torch.zeros(8, 16, dtype=torch.float64)
    save_entropy_map(tmp_path / "flat.png", entropy)
    entropy[:, 8:] = 5  # the right half
    save_entropy_map(tmp_path / "halves.png", entropy)
    flat, halves = read(tmp_path / "flat.png"), read(tmp_path / "halves.png")
    row = halves[halves.shape[0] // 2].astype(int)
    ends = (68, 1, 84), (253, 231, 37)  # of the scale
    at_dark, at_bright = (np.flatnonzero(abs(row - color).max(axis=1) <= 1).tolist() for color in ends)
    assert max(at_dark) < min(at_bright)
    assert len(at_dark) == pytest.approx(len(at_bright), abs=2)
    assert not np.array_equal(flat, halves)
    with pytest.raises(ValueError, match=r"\(h, w\).*\(3,\)"):
        save_entropy_map(tmp_path / "x.png", torch.zeros(3))
