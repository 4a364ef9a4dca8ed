"""The command ``regvq decode``: turn a file of tokens into images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional

from regvq_fast.cli.tokenizer_use import ComputeConfig, TokenizerConfig, UsedTokenizer, output_name
from regvq_fast.config import run_command
from regvq_fast.console import progress_bar, say
from regvq_fast.data.encoded_images import EncodedImages
from regvq_fast.data.tiles import decode_tokens
from regvq_fast.files import check_new_folder, kept_folder
from regvq_fast.image_grids import save_image
from regvq_fast.models.weights import weights_hash
from regvq_fast.settings import Section

USAGE = """Turn a file of tokens into images, the inverse of regvq encode.

    regvq decode --run runs/vq photos.npz --out photos-back

- --out gets NAME.png for each name in the file, cropped to its size before padding.
- The SHA-256 in the file must be that of this tokenizer's weights.
"""


@dataclass(frozen=True, kw_only=True)
class TokensConfig(Section):
    """Tokens."""

    tokens: Positional[Path]
    """File made by regvq encode."""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ComputeConfig, TokensConfig, TokenizerConfig):
    """A run of ``regvq decode``."""

    out: Path
    """New or empty folder of the images."""


class _Map(NamedTuple):
    """Tokens (h, w) of an image, with its name and size."""

    name: str
    tokens: Tensor
    size: tuple[int, int]


def decode(config: DecodeConfig) -> None:
    """Decode the images of a file of tokens, and save them as PNG files.

    Raises:
        ValueError, OSError: settings, file or tokenizer can't be used; one sentence, and nothing is written.
    """
    encoded = EncodedImages.load(config.tokens)
    _check_names(config.tokens, encoded.names)
    check_new_folder(config.out)
    used = UsedTokenizer.load(config.run, config)
    if (own := weights_hash(used.model)) != encoded.tokenizer:
        raise ValueError(
            f"{config.tokens} was made by another tokenizer (SHA-256 {encoded.tokenizer[:12]}) than --run {config.run} "
            f"({own[:12]}): name the one that encoded it"
        )
    stated = encoded.num_codes, encoded.downsampling_factor
    sizes = used.model.quantize.num_codes, used.model.downsampling_factor
    if stated != sizes:
        raise ValueError(
            f"{config.tokens} states (codes, pixels a token) {stated}, --run {config.run} has {sizes}: encode the "
            "images again"
        )
    console, start = Console(), time.perf_counter()
    maps = map(_Map, encoded.names, encoded.tokens, encoded.sizes)
    with kept_folder(config.out) as check, progress_bar(console) as progress:
        task = progress.add_task("images", total=len(encoded.names))
        for batch in used.batches(maps):
            tokens = torch.stack([one.tokens for one in batch])
            images = decode_tokens(used.model, tokens, batch[0].size, used.tiling, used.autocast)
            for one, image in zip(batch, images, strict=True):
                save_image(config.out / output_name(one.name), image)
            check()
            progress.advance(task, len(batch))
    say(console, "images", f"{len(encoded.names)} in {config.out}, {time.perf_counter() - start:.1f} s")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError for a name that leads out of the folder, or that two images would have."""
    seen: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise ValueError(f"{path} has an image named {name!r}, which is not a relative path: encode again")
        if (found := output_name(name)) in seen:
            raise ValueError(f"{path} has two images that would both become {found}: encode again")
        seen.add(found)


def main(args: Sequence[str]) -> None:
    """Run ``regvq decode``."""
    run_command("decode", DecodeConfig, decode, USAGE, args, stopped="stopped; the images so far are in {out}")
