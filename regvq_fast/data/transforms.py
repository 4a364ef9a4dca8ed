"""Conversions between Pillow images, uint8 tensors and the networks' range [-1, 1]; crops of image files."""

import random
from math import ceil, exp, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin
from torch import Tensor

AREA_RANGE = (0.5, 1.0)
"""Area of a random-resized crop, as a fraction of the largest square that fits the image."""
RATIO_RANGE = (0.9, 1.1)
"""Aspect ratio of a random-resized crop, before it is resized to a square."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition of each EXIF orientation, as in Pillow's ``ImageOps.exif_transpose``.

That function also encodes all other EXIF tags again, and raises an error if one of them has a wrong type.
"""
_SIDEWAYS = (5, 6, 7, 8)
_RIGHT_TO_LEFT = (2, 3, 6, 7)
"""Orientations whose transposition moves the stored image's right or lower edge to the left."""
_BOTTOM_TO_TOP = (3, 4, 7, 8)
"""Orientations whose transposition moves the stored image's right or lower edge to the top."""


class Box(NamedTuple):
    """A rectangle in an image in fractional pixels: Pillow's (left, upper, right, lower)."""

    left: float
    top: float
    right: float
    bottom: float


def to_float(images: Tensor) -> Tensor:
    """Convert images of any shape from uint8, 0..255, to float32, -1..1; the exact inverse of :func:`to_uint8`."""
    return images.to(torch.float32).div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert floating images of any shape, -1..1 (clamped; NaN becomes black), to uint8, rounded to nearest."""
    return images.detach().to(torch.float32).nan_to_num(-1).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB Pillow image to a (3, H, W) uint8 tensor, a copy."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image after its EXIF orientation, without decoding a JPEG."""
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def crop_rgb(image: Image.Image, box: Box, width: int, height: int, oversampling: float) -> Image.Image:
    """Decode an opened image (its first frame) and resize ``box``, in pixels as viewed, to 8-bit RGB.

    - The EXIF orientation is applied.
    - Greyscale, palette, CMYK and bilevel images are converted; transparency is composited on white.
    - 16-bit samples keep their upper byte; float samples are read as 0..1, or as 0..255 if any exceeds 1.
    - A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, several times faster, if the box then still has at least
      ``oversampling`` times the requested width and height. The crop's extent is the same up to rounding.

    Errors of Pillow are raised.
    """
    size = upright_size(image)
    reduction = max(min((box.right - box.left) / width, (box.bottom - box.top) / height) / oversampling, 1)
    drafted = image.draft(None, (ceil(image.width / reduction), ceil(image.height / reduction)))
    image.load()
    orientation = _orientation(image)
    # Extent of the image in decoded pixels: at half size, 5 pixels decode to 3, of which the image covers 2.5.
    right, bottom = drafted[1][2:] if drafted else image.size
    if orientation in _SIDEWAYS:
        right, bottom = bottom, right
    image = _as_rgb(image.transpose(_TURNS[orientation]) if orientation in _TURNS else image)
    left = image.width - right if orientation in _RIGHT_TO_LEFT else 0.0
    top = image.height - bottom if orientation in _BOTTOM_TO_TOP else 0.0
    return resize_box(image, _scaled(box, size, Box(left, top, left + right, top + bottom)), width, height)


def crop_labels(
    image: Image.Image, box: Box, image_size: tuple[int, int], width: int, height: int, num_classes: int | None = None
) -> Image.Image:
    """Resize the same ``box`` of a map of class ids, of an image of ``image_size``, by nearest neighbour.

    The map may have another size than the image, with the same aspect ratio. A palette is ignored.

    Raises:
        ValueError: the map has colours instead of class ids, an id of at least ``num_classes`` (None: 256), or another
            aspect ratio than the image.
    """
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(f"a segmentation map has one class id a pixel, this one is {image.mode}")
    labels = np.asarray(image)
    largest = min(num_classes or 256, 256) - 1  # a map has 8 bits
    if labels.max() > largest or labels.min() < 0:
        raise ValueError(f"class ids of a segmentation map must be in 0..{largest}, got {labels.min()}..{labels.max()}")
    # Equal aspect ratios, up to the rounding of sides to whole pixels.
    if abs(image.width * image_size[1] - image.height * image_size[0]) > max(*image_size, *image.size):
        raise ValueError(f"a segmentation map of {image.size} does not fit its image of {image_size}")
    box = _scaled(box, image_size, Box(0, 0, *image.size))
    return Image.fromarray(labels.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST, box=box)


def _orientation(image: Image.Image) -> int:
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        image.load()  # a PNG may have it after its pixels; decoding applies a TIFF's
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TURNS else 1  # cameras write other values, too


def _scaled(box: Box, size: tuple[int, int], target: Box) -> Box:
    """Map ``box`` in an image of this size to the coordinates in which ``target`` is the whole image."""
    x, y = (target.right - target.left) / size[0], (target.bottom - target.top) / size[1]
    left, top = target.left + box.left * x, target.top + box.top * y
    right, bottom = target.left + box.right * x, target.top + box.bottom * y
    return Box(left, top, min(right, target.right), min(bottom, target.bottom))  # no rounding beyond the edge


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" in any byte order; some versions open 16-bit files as "I"
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        samples = np.nan_to_num(np.asarray(image, dtype=np.float32))
        samples = samples * 255 if samples.max() <= 1 else samples
        image = Image.fromarray(samples.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_box(width: int, height: int) -> Box:
    """Return the largest central square of a ``width`` x ``height`` image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def random_box(width: int, height: int, rng: random.Random) -> Box:
    """Return a nearly square box: area uniform in AREA_RANGE, aspect log-uniform in RATIO_RANGE, position uniform."""
    side = min(width, height) * sqrt(rng.uniform(*AREA_RANGE))
    stretch = exp(rng.uniform(*map(log, RATIO_RANGE)) / 2)
    box_width, box_height = min(side * stretch, width), min(side / stretch, height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return Box(left, top, min(left + box_width, width), min(top + box_height, height))


def resize_box(image: Image.Image, box: Box, width: int, height: int) -> Image.Image:
    """Resize ``box`` of ``image`` to ``width`` x ``height`` with an antialiasing Lanczos filter."""
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
