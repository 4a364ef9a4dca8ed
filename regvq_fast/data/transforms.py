"""Between Pillow images, uint8 tensors and the [-1, 1] the networks see."""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

AREA_RANGE = (0.5, 1.0)
"""Area of a random-resized crop, as a share of the largest square that fits the image."""
RATIO_RANGE = (0.9, 1.1)
"""Width over height of a random-resized crop before it is resized to a square."""


class Box(NamedTuple):
    """A rectangle in an image, in pixels that may be fractional: Pillow's (left, upper, right, lower)."""

    left: float
    top: float
    right: float
    bottom: float


def to_float(images: Tensor) -> Tensor:
    """uint8 images of any shape, 0..255 -> float32, -1..1; exactly inverted by :func:`to_uint8`."""
    return images.to(torch.float32).div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floating images of any shape, -1..1 (clamped; NaN is black) -> uint8, rounded to the nearest level."""
    return images.detach().to(torch.float32).nan_to_num(-1).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB Pillow image -> (3, H, W) uint8 tensor with memory of its own."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_rgb(path: str, shorter_side: int) -> Image.Image:
    """Decode the image at ``path`` (its first frame) as 8-bit RGB, upright.

    - The EXIF orientation is applied.
    - Greyscale, palette, CMYK and bilevel images are converted; transparency is composited on white.
    - 16-bit samples keep their upper byte; float samples are read as 0..1, or as 0..255 where any exceeds 1.
    - A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but with no side below ``shorter_side``: many times
      faster on large photographs.

    Raises whatever Pillow raises for a file it cannot read.
    """
    with Image.open(path) as image:
        image.draft(image.mode, (shorter_side, shorter_side))
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its byte orders, or "I", which is how some versions open 16-bit files
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        samples = np.nan_to_num(np.asarray(image, dtype=np.float32))
        samples = samples * 255 if samples.max() <= 1 else samples
        image = Image.fromarray(samples.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_box(width: int, height: int) -> Box:
    """The largest square in the middle of a ``width`` x ``height`` image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def random_box(width: int, height: int, rng: random.Random) -> Box:
    """A nearly square box: area uniform in AREA_RANGE, aspect log-uniform in RATIO_RANGE, any place equally likely."""
    side = min(width, height) * math.sqrt(rng.uniform(*AREA_RANGE))
    stretch = math.exp(rng.uniform(*map(math.log, RATIO_RANGE)) / 2)
    box_width, box_height = min(side * stretch, width), min(side / stretch, height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return Box(left, top, min(left + box_width, width), min(top + box_height, height))


def resize_box(image: Image.Image, box: Box, width: int, height: int) -> Image.Image:
    """The part ``box`` of ``image``, resized to ``width`` x ``height`` with an antialiasing Lanczos filter."""
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(box.left, box.top, box.right, box.bottom))
