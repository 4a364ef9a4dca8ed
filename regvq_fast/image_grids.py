"""Grids of images, captions and semantic maps, saved atomically."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
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
"""Width in pixels below which images are enlarged by an integer factor, to make their pixels visible."""


def save_image_grid(
    path: str | os.PathLike[str], *kinds: Tensor, columns: int = 8, legend: Mapping[int, str] | None = None
) -> None:
    """Save a grid of stacks of corresponding images: image k of the first kind above image k of the second ...

    Args:
        path: of the grid; its suffix gives the format.
        kinds: one or more of (B, 3, H, W), uint8 or floating in -1..1 (clamped), on any device; enlarged to one width
            by integer factors.
        columns: stacks per row.
        legend: names of class ids, shown below the grid with their colours in :func:`color_map`.

    Raises:
        ValueError: shapes that differ or are not (B, 3, H, W) with B >= 1.
    """
    widest = max(images.shape[-1] for images in kinds)
    width = widest * max(1, math.ceil(_SMALLEST_TILE / widest))
    count = len(kinds[0])
    alike = all(
        images.ndim == 4 and images.shape[:2] == (count, 3) and width % images.shape[3] == 0 for images in kinds
    )
    if not alike or not count:
        shapes = ", ".join(str(tuple(images.shape)) for images in kinds)
        raise ValueError(
            f"stacked images must be (B, 3, H, W), B >= 1, with widths that divide the largest, got {shapes}"
        )
    seam = torch.full((count, 3, 2, width), _BACKGROUND, dtype=torch.uint8)
    parts = [part for images in kinds for part in (seam, enlarge(as_uint8(images), width // images.shape[3]))]
    tiles = torch.cat(parts[1:], dim=2)
    grid = arrange(tiles, min(columns, len(tiles)), gutter=8)
    if legend:
        grid = torch.cat([grid, _legend(legend, grid.shape[2])], dim=1)
    save_image(path, grid)


def save_images(folder: Path, images: Tensor, first: int = 0) -> None:
    """Save images (B, 3, H, W), as in :func:`save_image_grid`, as NUMBER.png, numbered from ``first`` on."""
    for number, image in enumerate(as_uint8(images), first):
        save_image(folder / f"{number:05d}.png", image)


def caption_tiles(captions: Sequence[str], size: int) -> Tensor:
    """Render captions, wrapped, as images (B, 3, H, size) uint8; the longest caption determines H."""
    font_size = max(9, size // 12)
    texts = ["\n".join(_wrap(caption, size - 4, font_size)) for caption in captions]
    height = max(_text_size(text or " ", font_size)[1] + 4 for text in texts)
    return torch.stack([text_tile(text, size, height, font_size) for text in texts])


def text_tile(text: str, width: int, height: int, font_size: int) -> Tensor:
    """Render text at the upper left of a white image (3, height, width) uint8; text that does not fit is cut off."""
    tile = Image.new("RGB", (width, height), (_BACKGROUND,) * 3)
    ImageDraw.Draw(tile).multiline_text((2, 2), text, fill=(0, 0, 0), font=_font(font_size), spacing=2)
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text_size(text: str, font_size: int) -> tuple[int, int]:
    """Return width and height in pixels."""
    draw = ImageDraw.Draw(Image.new("1", (1, 1)))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font=_font(font_size), spacing=2)
    return math.ceil(right), math.ceil(bottom)


def _wrap(text: str, width: int, font_size: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels, between words, or within words longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if _text_size(joined, font_size)[0] <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and _text_size(lines[-1] + letter, font_size)[0] > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def color_map(segmentation: Tensor, shape: tuple[int, int]) -> Tensor:
    """Render semantic maps as images; the colour of a class depends only on its id.

    Args:
        segmentation: (B, h, w) class ids below 256, any integer type.
        shape: (H, W) of the images; nearest neighbour.

    Returns:
        (B, 3, H, W) uint8, on the CPU.
    """
    ids = F.interpolate(segmentation.cpu().float().unsqueeze(1), shape, mode="nearest").squeeze(1).long()
    return _palette()[ids].permute(0, 3, 1, 2).contiguous()


def legend_of(segmentation: Tensor, names: Sequence[str] = ()) -> dict[int, str]:
    """Return the class ids in semantic maps with their names, or with their numbers if they have none."""
    ids: list[int] = segmentation.unique().tolist()
    return {k: names[k] if k < len(names) else str(k) for k in ids}


@cache
def _palette() -> Tensor:
    """Return the colours (256, 3) uint8 by class id."""
    hues = np.arange(256) * 0.61803398875 % 1  # the golden ratio keeps neighbouring ids apart
    values = 0.95 - 0.35 * (np.arange(256) % 3) / 2
    return torch.from_numpy((hsv_to_rgb(np.stack([hues, np.full(256, 0.65), values], 1)) * 255).astype(np.uint8))


def _legend(names: Mapping[int, str], width: int) -> Tensor:
    """Render colours and names in columns, (3, H, width) uint8; names wider than the grid are cut off."""
    font_size, swatch, margin = 14, 14, 8
    row = 20
    cell = min(width - 2 * margin, max(_text_size(name, font_size)[0] for name in names.values()) + swatch + 20)
    columns = max(1, (width - 2 * margin) // cell)
    height = math.ceil(len(names) / columns) * row + margin
    canvas = torch.full((3, height, width), _BACKGROUND, dtype=torch.uint8)
    for k, (label, name) in enumerate(names.items()):
        top, left = k // columns * row, margin + k % columns * cell
        canvas[:, top : top + swatch, left : left + swatch] = _palette()[label][:, None, None]
        text = text_tile(name, cell - swatch - 4, row, font_size)
        canvas[:, top : top + row - 2, left + swatch + 4 : left + cell] = text[:, 2:]
    return canvas


def as_uint8(images: Tensor) -> Tensor:
    """Convert images, uint8 or floating in -1..1 (clamped), on any device, to uint8 on the CPU."""
    return (images.detach() if images.dtype == torch.uint8 else to_uint8(images)).cpu()


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Enlarge (B, 3, H, W) to (B, 3, scale * H, scale * W) by repeating pixels."""
    return images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)


def arrange(tiles: Tensor, columns: int, gutter: int) -> Tensor:
    """Arrange tiles (T, 3, H, W) uint8 as one image (3, H', W'), in reading order, ``gutter`` pixels apart."""
    count, _, height, width = tiles.shape
    rows = math.ceil(count / columns)
    size = (3, rows * (height + gutter) + gutter, columns * (width + gutter) + gutter)
    canvas = torch.full(size, _BACKGROUND, dtype=torch.uint8)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, columns)
        top, left = gutter + row * (height + gutter), gutter + column * (width + gutter)
        canvas[:, top : top + height, left : left + width] = tile
    return canvas


def save_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Save an image (3, H, W) uint8 on the CPU; the suffix of the path gives the format."""
    with atomic_path(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary)
