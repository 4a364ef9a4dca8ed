"""The command ``regvq encode``: turn images into a file of tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from regvq_fast.cli.tokenizer_use import (
    ComputeConfig,
    ImagesConfig,
    TokenizerConfig,
    UsedTokenizer,
    find_images,
    read_images,
)
from regvq_fast.config import run_command
from regvq_fast.console import progress_bar, say
from regvq_fast.data.encoded_images import EncodedImages
from regvq_fast.data.tiles import tokenize_images
from regvq_fast.files import check_new_file
from regvq_fast.models.weights import weights_hash

USAGE = """Turn images into a file of tokens, with their names.

    regvq encode --run runs/vq photos/ --out photos.npz
    regvq encode --run runs/vq photos/ --out photos.npz --square
    regvq decode --run runs/vq photos.npz --out photos-back

- The NumPy file has names, tokens, shapes, sizes and the tokenizer's hash.
- To train a prior, cache the tokens of a data set with regvq tokens instead.
"""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class EncodeConfig(ComputeConfig, ImagesConfig, TokenizerConfig):
    """A run of ``regvq encode``."""

    out: Path
    """New file NAME.npz to write."""


def encode(config: EncodeConfig) -> EncodedImages:
    """Encode images, save their tokens, and print how many there are.

    Raises:
        ValueError, OSError: settings, images or tokenizer can't be used; one sentence, and nothing is written.
    """
    files = find_images(config.images)
    if config.out.suffix != ".npz":
        raise ValueError(f"--out {config.out} must end in .npz")
    check_new_file("--out", config.out)
    used = UsedTokenizer.load(config.run, config)
    model, console = used.model, Console()
    start, names, tokens, sizes = time.perf_counter(), [], [], []
    with progress_bar(console) as progress:
        task = progress.add_task("images", total=len(files))
        for batch in used.batches(read_images(files, model.image_size if config.square else None)):
            found = tokenize_images(model, torch.stack([image.pixels for image in batch]), used.tiling, used.autocast)
            names += [image.name for image in batch]
            tokens += list(found)
            sizes += [image.size for image in batch]
            progress.advance(task, len(batch))
    encoded = EncodedImages(
        names, tokens, sizes, weights_hash(model), model.quantize.num_codes, model.downsampling_factor
    )
    check_new_file("--out", config.out)
    encoded.save(config.out)
    left_out = f", {len(files) - len(names)} left out" if len(names) < len(files) else ""
    say(console, "tokens", f"{sum(map(torch.numel, tokens)):,}, of a codebook of {model.quantize.num_codes:,}")
    say(console, "images", f"{len(names)} in {config.out}{left_out}, {time.perf_counter() - start:.1f} s")
    return encoded


def main(args: Sequence[str]) -> None:
    """Run ``regvq encode``."""
    run_command("encode", EncodeConfig, encode, USAGE, args, stopped="stopped; nothing was written")
