import random

import numpy as np
import pytest
import torch
from PIL import Image

from regvq_fast.data.transforms import center_box, image_to_tensor, open_rgb, random_box, resize_box, to_float, to_uint8


def test_levels_survive_the_round_trip_and_span_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats[0] == -1
    assert floats[255] == 1
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats.bfloat16())[[0, 255]], levels[[0, 255]])


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-5.0, -1.0, 0.51 / 127.5 - 1, 0.49 / 127.5 - 1, 1.0, 3.0, torch.inf, torch.nan])
    assert to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255, 255, 0]


def halves(top: tuple[int, ...] | int, bottom: tuple[int, ...] | int, mode: str) -> Image.Image:
    image = Image.new(mode, (8, 16), top)
    image.paste(bottom, (0, 8, 8, 16))
    return image


def saved(image: Image.Image, path, **options) -> torch.Tensor:
    image.save(path, **options)
    return image_to_tensor(open_rgb(str(path), 8))


def test_greyscale_bilevel_and_palette(tmp_path):
    for mode, top, bottom in (("L", 40, 200), ("1", 0, 1)):
        pixels = saved(halves(top, bottom, mode), tmp_path / f"{mode}.png")
        scale = 255 if mode == "1" else 1
        assert (pixels[:, :8] == top * scale).all()
        assert (pixels[:, 8:] == bottom * scale).all()
    palette = halves((255, 0, 0), (0, 0, 255), "RGB").quantize(4)
    pixels = saved(palette, tmp_path / "palette.gif")
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 15, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode, tmp_path):
    image = halves((0, 0, 0, 0), (0, 0, 0, 255), "RGBA").convert("RGBA")
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        image = Image.new("P", (8, 16), 0)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.paste(1, (0, 8, 8, 16))
    pixels = saved(image, tmp_path / "image.png", **({"transparency": 0} if mode == "P" else {}))
    assert (pixels[:, :8] == 255).all()
    assert (pixels[:, 8:] == 0).all()


def test_sixteen_bit_and_float_images_keep_their_levels(tmp_path):
    wide = np.repeat(np.array([0, 256 * 77, 65535], dtype=np.uint16), 24).reshape(9, 8)
    assert saved(Image.fromarray(wide), tmp_path / "wide.png")[0, ::3, 0].tolist() == [0, 77, 255]
    assert saved(Image.fromarray(wide), tmp_path / "wide.tif")[0, ::3, 0].tolist() == [0, 77, 255]
    unit = np.array([[0.0, 0.2, 1.0]], dtype=np.float32).repeat(8, 0)
    assert saved(Image.fromarray(unit), tmp_path / "unit.tif")[0, 0].tolist() == [0, 51, 255]
    assert saved(Image.fromarray(unit * 100), tmp_path / "large.tif")[0, 0].tolist() == [0, 20, 100]


def test_cmyk(tmp_path):
    pixels = saved(halves((0, 255, 255, 0), (255, 0, 255, 0), "CMYK"), tmp_path / "print.jpg", quality=100)
    assert (pixels[:, 2, 2].int() - torch.tensor([255, 0, 0])).abs().max() < 12
    assert (pixels[:, 13, 2].int() - torch.tensor([0, 255, 0])).abs().max() < 12


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: rotate by 90 degrees clockwise to view
    pixels = saved(halves((255, 0, 0), (0, 0, 255), "RGB"), tmp_path / "upright.png", exif=exif)
    assert pixels.shape == (3, 8, 16)
    assert pixels[:, 0, 15].tolist() == [255, 0, 0]  # what was on top is on the right
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert image_to_tensor(open_rgb(str(tmp_path / "moving.gif"), 8))[:, 0, 0].tolist() == [255, 0, 0]


def test_large_jpegs_are_decoded_small_but_never_below_the_asked_size(tmp_path):
    Image.new("RGB", (1600, 800)).save(tmp_path / "large.jpg")
    assert open_rgb(str(tmp_path / "large.jpg"), 100).size == (200, 100)
    assert open_rgb(str(tmp_path / "large.jpg"), 101).size == (400, 200)
    assert open_rgb(str(tmp_path / "large.jpg"), 900).size == (1600, 800)


@pytest.mark.parametrize("size", [(40, 100), (100, 40), (64, 64), (1, 300)])
def test_boxes_lie_in_the_image_and_have_the_documented_shape(size):
    width, height = size
    shorter = min(size)
    left, top, right, bottom = center_box(width, height)
    assert right - left == bottom - top == shorter
    assert (left + right, top + bottom) == size
    rng = random.Random(0)
    boxes = [random_box(width, height, rng) for _ in range(500)]
    for box in boxes:
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
        area = (box.right - box.left) * (box.bottom - box.top) / shorter**2
        assert 0.5 * 0.95 <= area <= 1 + 1e-9
        assert 0.9 - 1e-9 <= (box.right - box.left) / (box.bottom - box.top) <= 1.1 + 1e-9 or area > 0.9
    assert min(box.left for box in boxes) < 0.15 * width
    assert max(box.right for box in boxes) > 0.85 * width


def test_resizing_antialiases():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_box(Image.fromarray(stripes), center_box(64, 64), 8, 8))
    assert abs(small.astype(int) - 127).max() <= 12  # without a filter it would be 0 or 255
