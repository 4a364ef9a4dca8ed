"""Tokenization of images of any size: padded to a multiple of the down-sampling factor, and optionally tiled.

Padding reflects the image's pixels below and to the right; it is cut off again after decoding.

Tiles bound the memory of the networks. They overlap: each token comes from the tile in which it is farthest from an
edge, and decoded tiles are blended with weights that fall to zero at the edges. The networks are not local: GroupNorm
takes its statistics, and attention its keys, from the whole input. A tile's tokens are therefore close to those of the
whole image, but not equal.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.models.vqgan import VQGAN


class Tiling(NamedTuple):
    """Sizes of square tiles, in pixels; multiples of the down-sampling factor."""

    tile: int
    """Side of a tile; smaller images are one tile."""
    overlap: int
    """Smallest overlap of neighbours, at most half a tile."""


class _Window(NamedTuple):
    """A tile along one axis, in tokens."""

    start: int
    stop: int
    owned: slice
    """Tokens of the image that come from this tile."""
    weights: Tensor
    """(pixels,) float32; the weights of a pixel sum to 1 over all windows."""


def checked_tiling(factor: int, tile: int, overlap: int | None = None) -> Tiling:
    """Return a checked tiling for a down-sampling factor; the default overlap is a quarter of a tile.

    Raises:
        ValueError: a side that is not a positive multiple of the factor, or an overlap of more than half a tile.
    """
    if overlap is None:
        overlap = tile // 4 // factor * factor
    for flag, pixels in (("--tile", tile), ("--overlap", overlap)):
        if pixels % factor or pixels < (factor if flag == "--tile" else 0):
            below = max(pixels // factor * factor, factor)
            raise ValueError(
                f"{flag} {pixels} is not a multiple of this tokenizer's down-sampling factor {factor}: use {below} or "
                f"{below + factor}"
            )
    if 2 * overlap > tile:
        raise ValueError(f"--overlap {overlap} is more than half of --tile {tile}: use at most {tile // 2}")
    return Tiling(tile, overlap)


def pad(images: Tensor, factor: int) -> Tensor:
    """Return images (..., H, W) with H and W rounded up to multiples of ``factor``, filled by reflection.

    If an image is too small to fill the padding, its first row or column is repeated.
    """
    for axis in (-2, -1):
        size = images.shape[axis]
        if size % factor == 0:
            continue
        index = torch.arange(-(-size // factor) * factor, device=images.device)
        index = torch.where(index < size, index, 2 * (size - 1) - index).clamp(min=0)
        images = images.index_select(axis, index)
    return images


@torch.no_grad()
def tokenize_images(
    model: VQGAN, images: Tensor, tiling: Tiling | None = None, autocast: torch.autocast | None = None
) -> Tensor:
    """Return the tokens of images of any size.

    Args:
        model: on any device.
        images: (B, 3, H, W) uint8, H and W at least 1, on any device; tiles are moved to the model's device.
        tiling: None: no tiles.
        autocast: entered around the model.

    Returns:
        (B, h, w) int64 on the CPU, for the padded images.

    Memory on the model's device: that of B images of one tile, or of B whole images.

    Raises:
        TypeError: not uint8. ValueError: another shape.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != model.in_channels or not images.numel():
        raise ValueError(f"images must be (B, {model.in_channels}, H, W), with a pixel each, got {tuple(images.shape)}")
    factor = model.downsampling_factor
    images = pad(images, factor)
    height, width = images.shape[2] // factor, images.shape[3] // factor
    tokens = torch.empty(len(images), height, width, dtype=torch.int64)
    for row in _windows(height, factor, tiling):
        for column in _windows(width, factor, tiling):
            seen = images[:, :, row.start * factor : row.stop * factor, column.start * factor : column.stop * factor]
            with autocast or torch.no_grad():
                found = model.tokenize(to_float(seen.to(model.last_layer.device))).cpu()
            tokens[:, row.owned, column.owned] = found[
                :,
                row.owned.start - row.start : row.owned.stop - row.start,
                column.owned.start - column.start : column.owned.stop - column.start,
            ]
    return tokens


@torch.no_grad()
def decode_tokens(
    model: VQGAN,
    tokens: Tensor,
    size: tuple[int, int] | None = None,
    tiling: Tiling | None = None,
    autocast: torch.autocast | None = None,
) -> Tensor:
    """Return the images of tokens, the inverse of :func:`tokenize_images`.

    Args:
        model: on any device.
        tokens: (B, h, w) int64.
        size: (H, W) to crop to; None: all of the images.
        tiling: None: no tiles.
        autocast: entered around the model.

    Returns:
        (B, 3, H, W) uint8 on the CPU.

    Memory: on the model's device as in :func:`tokenize_images`; on the CPU the result and, with tiles, float32 images
    with the height of a tile.

    Raises:
        TypeError, ValueError: invalid tokens.
    """
    if tokens.ndim != 3 or not tokens.numel():
        raise ValueError(f"tokens must be (B, h, w), one at least, got {tuple(tokens.shape)}")
    factor, (batch, height, width) = model.downsampling_factor, tokens.shape
    rows, columns = _windows(height, factor, tiling), _windows(width, factor, tiling)
    images = torch.empty(batch, model.in_channels, height * factor, width * factor, dtype=torch.uint8)
    tile_height = (rows[0].stop - rows[0].start) * factor
    band = torch.zeros(batch, model.in_channels, tile_height, width * factor)  # sum of the weighted tiles so far
    for k, row in enumerate(rows):
        for column in columns:
            seen = tokens[:, row.start : row.stop, column.start : column.stop].to(model.last_layer.device)
            with autocast or torch.no_grad():
                tile = model.decode_indices(seen).float().cpu()
            band[..., column.start * factor : column.stop * factor] += tile * row.weights[:, None] * column.weights
        finished = ((rows[k + 1].start if k + 1 < len(rows) else height) - row.start) * factor
        images[:, :, row.start * factor : row.start * factor + finished] = to_uint8(band[:, :, :finished])
        band = torch.cat([band[:, :, finished:], torch.zeros_like(band[:, :, :finished])], dim=2)
    return images if size is None else images[:, :, : size[0], : size[1]]


def _windows(length: int, factor: int, tiling: Tiling | None) -> Sequence[_Window]:
    """Return the tiles along an axis of ``length`` tokens, of one size and evenly spaced."""
    tile = length if tiling is None else min(tiling.tile // factor, length)
    overlap = 0 if tiling is None else tiling.overlap // factor
    count = 1 if tile == length else -(-(length - overlap) // (tile - overlap))
    starts = [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]
    weights = torch.zeros(count, length * factor)
    pixels = torch.arange(tile * factor) + 0.5
    ramp = torch.minimum(pixels, tile * factor - pixels).clamp(max=max(overlap * factor, 0.5))
    for row, start in zip(weights, starts, strict=True):
        row[start * factor : (start + tile) * factor] = ramp
    weights /= weights.sum(0)
    # Halfway between the centres of neighbours, where both edges are equally far.
    borders = [0, *((a + b + tile) // 2 for a, b in itertools.pairwise(starts)), length]
    return [
        _Window(start, start + tile, slice(*borders[k : k + 2]), weights[k, start * factor : (start + tile) * factor])
        for k, start in enumerate(starts)
    ]
