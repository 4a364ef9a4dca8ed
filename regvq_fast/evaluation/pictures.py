"""The pictures a run leaves: reconstructions, code usage, the codebook. Each file appears whole or not at all."""

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from regvq_fast.data.transforms import to_uint8
from regvq_fast.evaluation.codebook import perplexity, utilization
from regvq_fast.files import atomic_path

_BACKGROUND = 255
_SMALLEST_TILE = 128
"""Pixels; smaller pictures are enlarged by a whole factor so that theirs can be made out."""


def save_reconstruction_grid(
    path: str | os.PathLike[str], originals: Tensor, reconstructions: Tensor, columns: int = 8
) -> None:
    """Save a grid of pairs: each original directly above its reconstruction.

    Args:
        path: of the picture; its suffix gives the format.
        originals, reconstructions: (B, 3, H, W), uint8 or floating in -1..1 (clamped), on any device.
        columns: pairs in a row.

    Raises:
        ValueError: shapes that differ or are not (B, 3, H, W) with B >= 1.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals and reconstructions must have one shape (B, 3, H, W), got {tuple(originals.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    save_image_grid(path, originals, reconstructions, columns=columns)


def save_image_grid(path: str | os.PathLike[str], *stacks: Tensor, columns: int = 8) -> None:
    """Save a grid of stacks of images that belong together: the first of each above the second, and so on.

    Args:
        path: of the picture; its suffix gives the format.
        stacks: (B, 3, H, W) each, uint8 or floating in -1..1 (clamped), on any device; enlarged to one width, by whole
            factors.
        columns: stacks in a row.

    Raises:
        ValueError: shapes that don't go together or are not (B, 3, H, W) with B >= 1.
    """
    widest = max(images.shape[-1] for images in stacks)
    width = widest * max(1, math.ceil(_SMALLEST_TILE / widest))
    count = len(stacks[0])
    alike = all(
        images.ndim == 4 and images.shape[:2] == (count, 3) and width % images.shape[3] == 0 for images in stacks
    )
    if not alike or not count:
        shapes = ", ".join(str(tuple(images.shape)) for images in stacks)
        raise ValueError(f"images that belong together must be (B, 3, H, W), B >= 1, alike in size, got {shapes}")
    seam = torch.full((count, 3, 2, width), _BACKGROUND, dtype=torch.uint8)
    parts = [part for images in stacks for part in (seam, _enlarge(_as_uint8(images), width // images.shape[3]))]
    tiles = torch.cat(parts[1:], dim=2)
    _save_image(path, _tile(tiles, min(columns, len(tiles)), gutter=8))


def save_images(folder: Path, images: Tensor, first: int = 0) -> None:
    """Save each of the images (B, 3, H, W), as in :func:`save_image_grid`, as NUMBER.png from ``first`` on."""
    for number, image in enumerate(_as_uint8(images), first):
        _save_image(folder / f"{number:05d}.png", image)


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


def save_codebook_mosaic(
    path: str | os.PathLike[str],
    decode: Callable[[Tensor], Tensor],
    num_codes: int,
    token_shape: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    max_codes: int = 1024,
    batch_size: int = 64,
) -> None:
    """Save what each embedding looks like (the paper's appendix A): the first 1024 of them as a 32 x 32 mosaic.

    A code's tile is the centre of the image decoded from a token map filled with that code: the area of one token,
    farthest from the borders. Row by row in the order of the codes, in a near-square grid.

    Args:
        path: of the picture; its suffix gives the format.
        decode: (B, h, w) int64 code indices on ``device`` -> (B, 3, H, W) images, uint8 or floating in -1..1.
            Called without gradients.
        num_codes: N, at least 1; ValueError otherwise.
        token_shape: (h, w) of the token maps.
        device: where ``decode`` wants its indices.
        max_codes: the most codes to show.
        batch_size: codes decoded at a time.
    """
    if num_codes < 1:
        raise ValueError(f"num_codes must be at least 1, got {num_codes}")
    shown = min(num_codes, max_codes)
    tiles = []
    with torch.no_grad():
        for codes in torch.arange(shown, device=device).split(batch_size):
            images = decode(codes[:, None, None].expand(-1, *token_shape).contiguous())
            tiles.append(
                _as_uint8(_center_crop(images, images.shape[2] // token_shape[0], images.shape[3] // token_shape[1]))
            )
    mosaic = torch.cat(tiles)
    columns = math.ceil(math.sqrt(shown))
    scale = max(1, round(1024 / (columns * mosaic.shape[3])))
    _save_image(path, _tile(_enlarge(mosaic, scale), columns, gutter=1))


def save_usage_histogram(path: str | os.PathLike[str], counts: Tensor, title: str) -> None:
    """Save how often each code is used, from the most to the least frequent.

    The count axis is logarithmic where used codes differ by more than a factor of 30. Unused codes are the shaded
    part on the right. The dashed line is what uniform use would give. Does not touch matplotlib's global state.

    Args:
        path: of the picture; its suffix gives the format (png, svg, pdf).
        counts: (N,) integers >= 0, N >= 1, on any device.
        title: what was counted; utilization and perplexity are put below it.

    Raises:
        ValueError: counts that are not a vector with at least one entry.
    """
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"counts must have shape (N,), N >= 1, got {tuple(counts.shape)}")
    counts = counts.detach().cpu()
    sorted_counts = counts.sort(descending=True).values.numpy()
    num_codes, used = len(sorted_counts), int((sorted_counts > 0).sum())
    uniform = sorted_counts.sum() / num_codes

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.arange(num_codes + 1)
    logarithmic = used > 0 and sorted_counts[0] > 30 * sorted_counts[used - 1]
    axes.stairs(sorted_counts, edges, fill=True, color="#3b6ea8", baseline=0.5 if logarithmic else 0)
    if used < num_codes:
        label = f"never used: {num_codes - used:,} of {num_codes:,} codes"
        axes.axvspan(used, num_codes, color="#d9d9d9", linewidth=0, label=label)
    axes.axhline(uniform, color="#c0504d", linestyle="--", linewidth=1.2, label=f"uniform use: {uniform:,.1f} each")
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, num_codes)
    axes.set_xlabel("codes, from the most to the least frequent")
    axes.set_ylabel("times selected")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    share, effective = float(utilization(counts)), float(perplexity(counts))
    axes.set_title(f"{title}\nutilization {share:.1%}, perplexity {effective:,.1f} of {num_codes:,}", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _as_uint8(images: Tensor) -> Tensor:
    """To uint8 on the CPU."""
    return (images.detach() if images.dtype == torch.uint8 else to_uint8(images)).cpu()


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def _enlarge(images: Tensor, scale: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, scale * H, scale * W), each pixel a block."""
    return images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)


def _tile(tiles: Tensor, columns: int, gutter: int) -> Tensor:
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


def _save_image(path: str | os.PathLike[str], picture: Tensor) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary)
