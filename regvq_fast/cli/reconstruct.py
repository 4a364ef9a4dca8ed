"""The command ``regvq reconstruct``: pass images through a tokenizer, and save what comes back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor
from tyro.conf import arg

from regvq_fast.cli.tokenizer_use import (
    ComputeConfig,
    ImagesConfig,
    OpenedImage,
    TokenizerConfig,
    UsedTokenizer,
    find_images,
    output_name,
    read_images,
)
from regvq_fast.config import run_command
from regvq_fast.console import progress_bar, say
from regvq_fast.data.tiles import decode_tokens, tokenize_images
from regvq_fast.data.transforms import image_to_tensor
from regvq_fast.evaluation.reconstruction_metrics import image_psnr
from regvq_fast.files import check_new_file, check_new_folder, kept_folder
from regvq_fast.image_grids import save_image, save_image_grid

_SHEET_IMAGES, _SHEET_SIDE = 16, 256
_LISTED = 16  # up to this many images get a line each

USAGE = """Reconstruct images with a tokenizer.

    regvq reconstruct --run runs/vq a.jpg photos/ --out back --sheet sheet.png
    regvq reconstruct --run runs/vq panorama.jpg --out back --tile 512

- Images of any size are padded to the down-sampling factor and cropped back.
- --out gets NAME.png for NAME.jpg and keeps subfolders.
- --tile bounds memory. Normalization and attention are per tile, so results
  are close, but not equal, to those of the whole image (docs/use.md).
"""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(ComputeConfig, ImagesConfig, TokenizerConfig):
    """A run of ``regvq reconstruct``."""

    out: Path
    """New or empty folder of the reconstructions."""
    sheet: Annotated[Path | None, arg(metavar="PATH")] = None
    """Image file of the first 16 images, each above its reconstruction."""


def reconstruct(config: ReconstructConfig) -> None:
    """Reconstruct images, save them as PNG files, and print their PSNR and the number of codes used.

    Raises:
        ValueError, OSError: settings, images or tokenizer can't be used; one sentence, and nothing is written.
    """
    files = find_images(config.images)
    check_new_folder(config.out)
    if config.sheet is not None and config.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--sheet {config.sheet} must end in .png, .jpg or .webp")
    if config.sheet is not None:
        check_new_file("--sheet", config.sheet)
    used = UsedTokenizer.load(config.run, config)
    console, counts = Console(), torch.zeros(used.model.quantize.num_codes, dtype=torch.int64)
    shown: list[tuple[Tensor, Tensor]] = []
    ratios: list[float] = []
    start = time.perf_counter()
    with kept_folder(config.out) as check, progress_bar(console) as progress:
        task = progress.add_task("images", total=len(files))
        images = read_images(files, used.model.image_size if config.square else None)
        for batch in used.batches(images):
            for image, reconstruction, tokens in zip(batch, *_reconstruct(used, batch), strict=True):
                save_image(config.out / output_name(image.name), reconstruction)
                counts += tokens.flatten().bincount(minlength=len(counts))
                ratios.append(image_psnr(reconstruction, image.pixels))
                if len(files) <= _LISTED:
                    height, width = image.size
                    codes = len(tokens.unique())
                    say(console, f"{ratios[-1]:.2f} dB", f"{image.name}, {width} x {height}, {codes:,} codes")
                if config.sheet is not None and len(shown) < _SHEET_IMAGES:
                    shown.append((_thumbnail(image.pixels), _thumbnail(reconstruction)))
                progress.advance(task)
            check()
    if config.sheet is not None:
        originals, reconstructions = (torch.stack(column) for column in zip(*shown, strict=True))
        save_image_grid(config.sheet, originals, reconstructions)
        say(console, "sheet", str(config.sheet))
    say(console, "psnr", f"{sum(ratios) / len(ratios):.2f} dB, the mean over images")
    num_used = int((counts > 0).sum())
    say(console, "codes", f"{num_used:,} of {len(counts):,} used ({100 * num_used / len(counts):.1f} %)")
    left_out = f", {len(files) - len(ratios)} left out" if len(ratios) < len(files) else ""
    say(console, "images", f"{len(ratios)} in {config.out}{left_out}, {time.perf_counter() - start:.1f} s")


def _reconstruct(used: UsedTokenizer, batch: Sequence[OpenedImage]) -> tuple[Tensor, Tensor]:
    """Return the reconstructions (B, 3, H, W) uint8 of images of one size, and their tokens (B, h, w)."""
    pixels = torch.stack([image.pixels for image in batch])
    tokens = tokenize_images(used.model, pixels, used.tiling, used.autocast)
    return decode_tokens(used.model, tokens, batch[0].size, used.tiling, used.autocast), tokens


def _thumbnail(image: Tensor) -> Tensor:
    """Return an image (3, H, W) uint8 on a white square, scaled down to fit."""
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    room = _SHEET_SIDE - small.width, _SHEET_SIDE - small.height
    return F.pad(image_to_tensor(small), (0, room[0], 0, room[1]), value=255)


def main(args: Sequence[str]) -> None:
    """Run ``regvq reconstruct``."""
    stopped = "stopped; the reconstructions so far are in {out}"
    run_command("reconstruct", ReconstructConfig, reconstruct, USAGE, args, stopped=stopped)
