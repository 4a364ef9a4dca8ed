"""Grids of images, captions and semantic maps as pictures. Each file appears whole or not at all."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from regvq_fast.data.transforms import to_uint8
from regvq_fast.files import atomic_path

_BACKGROUND = 255
_SMALLEST_TILE = 128
"""Pixels; smaller pictures are enlarged by a whole factor so that theirs can be made out."""


def save_image_grid(path: str | os.PathLike[str], *kinds: Tensor, columns: int = 8) -> None:
    """Save a grid of stacks of images that belong together: image k of the first kind above that of the second ...

    Args:
        path: of the picture; its suffix gives the format.
        kinds: one or more of (B, 3, H, W), uint8 or floating in -1..1 (clamped), on any device; enlarged to one width,
            by whole factors.
        columns: stacks side by side.

    Raises:
        ValueError: shapes that don't go together or are not (B, 3, H, W) with B >= 1.
    """
    widest = max(images.shape[-1] for images in kinds)
    width = widest * max(1, math.ceil(_SMALLEST_TILE / widest))
    count = len(kinds[0])
    alike = all(
        images.ndim == 4 and images.shape[:2] == (count, 3) and width % images.shape[3] == 0 for images in kinds
    )
    if not alike or not count:
        shapes = ", ".join(str(tuple(images.shape)) for images in kinds)
        raise ValueError(f"images that belong together must be (B, 3, H, W), B >= 1, alike in size, got {shapes}")
    seam = torch.full((count, 3, 2, width), _BACKGROUND, dtype=torch.uint8)
    parts = [part for images in kinds for part in (seam, enlarge(as_uint8(images), width // images.shape[3]))]
    tiles = torch.cat(parts[1:], dim=2)
    save_picture(path, arrange(tiles, min(columns, len(tiles)), gutter=8))


def save_images(folder: Path, images: Tensor, first: int = 0) -> None:
    """Save each of the images (B, 3, H, W), as in :func:`save_image_grid`, as NUMBER.png from ``first`` on."""
    for number, image in enumerate(as_uint8(images), first):
        save_picture(folder / f"{number:05d}.png", image)


def caption_tiles(captions: Sequence[str], size: int) -> Tensor:
    """Captions as pictures (B, 3, size, size) uint8; long ones are cut off."""
    tiles = []
    for caption in captions:
        tile = Image.new("RGB", (size, size), (_BACKGROUND,) * 3)
        draw = ImageDraw.Draw(tile)
        font = ImageFont.load_default(size=max(9, size // 12))
        letters = max(1, int(size / draw.textlength("n", font=font)))
        draw.multiline_text((2, 2), "\n".join(textwrap.wrap(caption, letters)), fill=(0, 0, 0), font=font, spacing=2)
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    return torch.stack(tiles)


def color_map(segmentation: Tensor, shape: tuple[int, int]) -> Tensor:
    """A semantic map as a picture, each class in a colour of its own that does not depend on the others there are.

    Args:
        segmentation: (B, h, w) class ids below 256, any integer type.
        shape: (H, W) of the pictures; nearest neighbour.

    Returns:
        (B, 3, H, W) uint8, on the CPU.
    """
    hues = np.arange(256) * 0.61803398875 % 1  # the golden ratio keeps neighbouring ids apart
    values = 0.95 - 0.35 * (np.arange(256) % 3) / 2
    palette = torch.from_numpy((hsv_to_rgb(np.stack([hues, np.full(256, 0.65), values], 1)) * 255).astype(np.uint8))
    ids = F.interpolate(segmentation.cpu().float().unsqueeze(1), shape, mode="nearest").squeeze(1).long()
    return palette[ids].permute(0, 3, 1, 2).contiguous()


def as_uint8(images: Tensor) -> Tensor:
    """Images, uint8 or floating in -1..1 (clamped), on any device -> uint8 on the CPU."""
    return (images.detach() if images.dtype == torch.uint8 else to_uint8(images)).cpu()


def enlarge(images: Tensor, scale: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, scale * H, scale * W), each pixel a block."""
    return images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)


def arrange(tiles: Tensor, columns: int, gutter: int) -> Tensor:
    """(T, 3, H, W) uint8 -> one (3, H', W') picture, tiles in reading order with ``gutter`` pixels around each."""
    count, _, height, width = tiles.shape
    rows = math.ceil(count / columns)
    size = (3, rows * (height + gutter) + gutter, columns * (width + gutter) + gutter)
    picture = torch.full(size, _BACKGROUND, dtype=torch.uint8)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, columns)
        top, left = gutter + row * (height + gutter), gutter + column * (width + gutter)
        picture[:, top : top + height, left : left + width] = tile
    return picture


def save_picture(path: str | os.PathLike[str], picture: Tensor) -> None:
    """Save one picture, (3, H, W) uint8 on the CPU; the suffix of the path gives the format."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary)
