"""Images and plots of a tokenizer, saved atomically: reconstructions, the codebook, code usage."""

import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from regvq_fast.evaluation.codebook import perplexity, utilization
from regvq_fast.files import atomic_path
from regvq_fast.image_grids import arrange, as_uint8, enlarge, save_image, save_image_grid, text_tile


def save_reconstruction_grid(
    path: str | os.PathLike[str], originals: Tensor, reconstructions: Tensor, columns: int = 8
) -> None:
    """Save a grid of pairs: each original directly above its reconstruction.

    Args:
        path: of the image; its suffix gives the format.
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


def save_labelled_rows(path: str | os.PathLike[str], rows: Mapping[str, Tensor]) -> None:
    """Save rows of images, each with a label on its left.

    Args:
        path: of the image; its suffix gives the format.
        rows: (B, 3, H, W) by label, uint8 or floating in -1..1 (clamped), on any device, all of one shape; small ones
            are enlarged by a whole factor. A label may have several lines of about 18 letters.

    Raises:
        ValueError: no rows, or rows whose shapes differ or are not (B, 3, H, W) with B >= 1.
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[1] != 3 or not shape[0]:
        raise ValueError(f"rows must have one shape (B, 3, H, W), B >= 1, got {sorted(shapes)}")
    scale = max(1, math.ceil(96 / shape[3]))
    gutter, strips = 4, []
    for label, images in rows.items():
        strip = arrange(enlarge(as_uint8(images), scale), shape[0], gutter)
        strips.append(torch.cat([text_tile(label, 150, strip.shape[1], font_size=16), strip], dim=2))
    save_image(path, torch.cat(strips, dim=1))


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
    """Save the image of each embedding (the paper's appendix A): the first 1024 of them as a 32 x 32 mosaic.

    A code's tile is the central token's area of the image decoded from a token map filled with that code, since the
    centre is farthest from the borders. Codes run row by row in a near-square grid.

    Args:
        path: of the image; its suffix gives the format.
        decode: (B, h, w) int64 code indices on ``device`` -> (B, 3, H, W) images, uint8 or floating in -1..1.
            Called without gradients.
        num_codes: N, at least 1; ValueError otherwise.
        token_shape: (h, w) of the token maps.
        device: of the indices for ``decode``.
        max_codes: largest number of codes to show.
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
                as_uint8(_center_crop(images, images.shape[2] // token_shape[0], images.shape[3] // token_shape[1]))
            )
    mosaic = torch.cat(tiles)
    columns = math.ceil(math.sqrt(shown))
    scale = max(1, round(1024 / (columns * mosaic.shape[3])))
    save_image(path, arrange(enlarge(mosaic, scale), columns, gutter=1))


def save_usage_histogram(path: str | os.PathLike[str], counts: Tensor, title: str) -> None:
    """Save a histogram of code usage, from the most to the least frequent code.

    The count axis is logarithmic if used codes differ by more than a factor of 30. The shaded area on the right is
    unused codes, the dashed line uniform usage. Matplotlib's global state does not change.

    Args:
        path: of the plot; its suffix gives the format (png, svg, pdf).
        counts: (N,) integers >= 0, N >= 1, on any device.
        title: of the plot; utilization and perplexity appear below it.

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
    fraction, effective = float(utilization(counts)), float(perplexity(counts))
    axes.set_title(f"{title}\nutilization {fraction:.1%}, perplexity {effective:,.1f} of {num_codes:,}", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def save_entropy_map(path: str | os.PathLike[str], entropy: Tensor) -> None:
    """Save the entropy of the code at each position of the token grid as a plot with a scale in bits.

    Args:
        path: of the plot; its suffix gives the format.
        entropy: (h, w) in bits, on any device.

    Raises:
        ValueError: another number of dimensions.
    """
    if entropy.ndim != 2:
        raise ValueError(f"the entropy of positions must have shape (h, w), got {tuple(entropy.shape)}")
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(entropy.detach().cpu().numpy(), cmap="viridis")
    figure.colorbar(shown, ax=axes, label="entropy (bits)")
    axes.set_xlabel("column of the token grid")
    axes.set_ylabel("row")
    low, mean, high = (float(value) for value in (entropy.min(), entropy.mean(), entropy.max()))
    axes.set_title(f"codes at each position: {low:.2f} to {high:.2f} bits, mean {mean:.2f}", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]
