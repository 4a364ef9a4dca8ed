import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from regvq_fast.data.transforms import (
    Box,
    center_box,
    crop_labels,
    crop_rgb,
    image_to_tensor,
    random_box,
    resize_box,
    to_float,
    to_uint8,
    upright_size,
)


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


def whole(path) -> torch.Tensor:
    with Image.open(path) as image:
        width, height = upright_size(image)
        return image_to_tensor(crop_rgb(image, Box(0, 0, width, height), width, height, 1))


def saved(image: Image.Image, path, **options) -> torch.Tensor:
    image.save(path, **options)
    return whole(path)


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillow_s(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = saved(Image.fromarray(pixels), tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as image:
        assert torch.equal(upright, image_to_tensor(ImageOps.exif_transpose(image)))


def test_exif_tags_of_wrong_types_do_not_make_an_image_unreadable(tmp_path):
    """Pillow 13's exif_transpose raises here, since it encodes all tags anew."""
    entries = (274, 3, 1, 6), (282, 2, 4, 0x302E3237)  # orientation, and a resolution that is a text: "72.0"
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + struct.pack("<I", 0)
    image = halves((255, 0, 0), (0, 0, 255), "RGB")
    pixels = saved(image, tmp_path / "image.jpg", exif=exif, quality=100, subsampling=0)
    assert pixels.shape == (3, 8, 16)
    assert pixels[:, 0, 15].tolist() == [254, 0, 0]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert whole(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_large_jpegs_are_decoded_small_but_with_enough_pixels_for_the_crop(tmp_path):
    Image.new("RGB", (1600, 800)).save(tmp_path / "large.jpg")
    for side, oversampling, expected in (
        (400, 2, 800),
        (400, 2.01, 1600),
        (800, 2, 400),
        (100, 1, 1600),
        (50, 1, 1600),
    ):
        with Image.open(tmp_path / "large.jpg") as image:
            assert crop_rgb(image, Box(30, 0, 30 + side, side), 100, 100, oversampling).size == (100, 100)
            assert image.width == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoding_small_does_not_move_the_crop(tmp_path, orientation):
    """Sides that the reduction of 8 doesn't divide: the decoded image shows up to 7 pixels more than there are."""
    pixels = np.zeros((157, 203, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(203)
    pixels[..., 1] = np.arange(157)[:, None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "odd.jpg"
    Image.fromarray(pixels).save(path, quality=100, subsampling=0, exif=exif)
    for corner in (0.0, 0.5, 1.0):
        crops = []
        for oversampling in (1, 1000):
            with Image.open(path) as image:
                width, height = upright_size(image)
                assert (width, height) == ((203, 157) if orientation < 5 else (157, 203))
                left, top = corner * (width - 140), corner * (height - 130)
                crops.append(
                    image_to_tensor(crop_rgb(image, Box(left, top, left + 140, top + 130), 10, 10, oversampling))
                )
                assert max(image.size) == (26 if oversampling == 1 else 203)
        # A step from one pixel of the crop to the next is 13 levels; the outermost ones are blurred.
        assert (crops[0].int() - crops[1].int())[:2, 1:-1, 1:-1].abs().max() <= 1


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_means_nothing_is_ignored(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert saved(halves((255, 0, 0), (0, 0, 255), "RGB"), tmp_path / "odd.png", exif=exif).shape == (3, 16, 8)


def test_labels_are_cropped_like_their_image_whatever_their_size():
    labels = np.arange(64, dtype=np.uint8).reshape(4, 16).repeat(2, 0).repeat(2, 1)  # 8 x 32
    expected = np.arange(64).reshape(4, 16)[:, 4:8]
    for mode in ("L", "P", "I;16"):
        image = Image.fromarray(labels.astype(np.uint16) if mode == "I;16" else labels)
        if mode == "P":
            image.putpalette(range(255, -1, -1))
        assert image.mode == mode
        for size in ((32, 8), (64, 16), (320, 80)):
            box = Box(size[0] / 4, 0, size[0] / 2, size[1])
            assert np.array_equal(np.asarray(crop_labels(image, box, size, 4, 4)), expected)
    two = Image.new("1", (4, 4), 1)
    assert np.asarray(crop_labels(two, Box(0, 0, 4, 4), (4, 4), 2, 2)).tolist() == [[1, 1], [1, 1]]


def test_labels_fit_an_image_whose_sides_are_rounded():
    """An image of 3000 x 2003 pixels, resized to a height of 256, has a width of 383; its map may have the old size."""
    labels = Image.new("L", (3000, 2003), 3)
    assert np.asarray(crop_labels(labels, Box(0, 0, 383, 256), (383, 256), 2, 2)).tolist() == [[3, 3], [3, 3]]
    for other in ((380, 256), (386, 256)):
        with pytest.raises(ValueError, match="does not fit"):
            crop_labels(labels, Box(0, 0, *other), other, 2, 2)


def test_labels_that_are_none_are_refused():
    box = Box(0, 0, 8, 8)
    with pytest.raises(ValueError, match="RGB"):
        crop_labels(Image.new("RGB", (8, 8)), box, (8, 8), 4, 4)
    with pytest.raises(ValueError, match=r"255.*\b300\.\.300"):
        crop_labels(Image.fromarray(np.full((8, 8), 300, dtype=np.uint16)), box, (8, 8), 4, 4)
    labels = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    crop_labels(labels, Box(0, 0, 1, 1), (8, 8), 1, 1, 64)
    with pytest.raises(ValueError, match=r"62.*\b0\.\.63"):  # wherever it is cut
        crop_labels(labels, Box(0, 0, 1, 1), (8, 8), 1, 1, 63)
    with pytest.raises(ValueError, match=r"\(8, 16\).*\(16, 8\)"):
        crop_labels(Image.new("L", (8, 16)), box, (16, 8), 4, 4)
    crop_labels(Image.new("L", (33, 50)), box, (100, 150), 4, 4)  # a third, rounded


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
