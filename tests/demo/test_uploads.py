"""Uploaded images: what is read and how, what is refused, and with which words."""

from pathlib import Path

import pytest
from helpers.hostile_images import encoded, gradient, png_of_size, refused, valid_oddities
from PIL import Image, PngImagePlugin

from regvq_fast.demo import uploads
from regvq_fast.demo.uploads import MAX_BYTES, read_square


@pytest.mark.parametrize("name", valid_oddities())
def test_odd_images_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(valid_oddities()[name])
    square = read_square(path, 16)
    assert square.pixels.shape == (3, 16, 16)
    expected = {"one-pixel.png": (1, 1), "long.png": (3000, 2), "rotated.jpg": (24, 40)}
    assert (square.width, square.height) == expected.get(name, (40, 24))


def test_the_central_square_counts() -> None:
    image = Image.new("RGB", (48, 16), "red")
    image.paste(Image.new("RGB", (16, 16), "blue"), (16, 0))
    pixels = read_square(encoded(image), 16).pixels
    assert pixels[2].float().mean() > 250
    assert pixels[0].max() == 0


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read_square(encoded(clear), 8).pixels.min() == 255


@pytest.mark.parametrize("name", refused())
def test_others_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, word = refused()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=word) as raised:
        read_square(path, 16)
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", [8_000, 10_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="50 million pixels"):
        read_square(png_of_size(side, side), 16)


def test_a_large_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10\.0 MiB, the limit is 10"):
        read_square(bytes(MAX_BYTES + 1), 16)


def test_errors_of_the_storage_are_not_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(uploads, "crop_rgb", failing)
    with pytest.raises(OSError, match="Input/output"):
        read_square(encoded(gradient()), 16)
