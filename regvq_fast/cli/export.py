"""The command ``regvq export``: export a tokenizer as programs for PyTorch or ONNX Runtime."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from regvq_fast.cli.tokenizer_use import TokenizerConfig, load_tokenizer
from regvq_fast.config import run_command
from regvq_fast.console import say
from regvq_fast.files import atomic_folder, check_new_folder
from regvq_fast.models.exporting import IMAGE_TOLERANCE, Agreement, Format, export_tokenizer
from regvq_fast.models.pretrained import to_json
from regvq_fast.models.weights import weights_hash

DESCRIPTION = "export.json"

USAGE = """Export a tokenizer as two programs that run without this library.

    regvq export --run runs/vq --out exported --format pt2    # torch.export
    regvq export --run runs/vq --out exported --format onnx   # ONNX Runtime

- encoder: images (B, 3, H, W) float32 in [-1, 1] to tokens (B, h, w) int64.
- decoder: tokens (B, h, w) int64 to images (B, 3, H, W) float32, not clamped.
- B, h, w >= 2 are dynamic. Both programs are run and compared with the tokenizer.
"""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class ExportConfig(TokenizerConfig):
    """A run of ``regvq export``."""

    out: Path
    """New or empty folder of encoder, decoder and export.json."""
    format: Annotated[Format, arg(metavar="pt2|onnx")] = "pt2"
    """pt2: for torch.export.load. onnx: for ONNX Runtime; needs the extra `export`."""


def export(config: ExportConfig) -> Agreement:
    """Export a tokenizer, compare the exported programs with it, and print their paths.

    Raises:
        ValueError, OSError: settings, tokenizer or programs can't be used; one sentence, and no files are left.
    """
    config.check()
    check_new_folder(config.out)
    model = load_tokenizer(config.run)
    start = time.perf_counter()
    with atomic_folder(config.out) as folder:
        agreement = export_tokenizer(model, folder, config.format)
        description = {
            "format": config.format,
            "encoder": f"images (B, {model.in_channels}, H, W) float32 in [-1, 1] -> tokens (B, h, w) int64",
            "decoder": f"tokens (B, h, w) int64 -> images (B, {model.in_channels}, H, W) float32, not clamped",
            "num_codes": model.quantize.num_codes,
            "downsampling_factor": model.downsampling_factor,
            "image_size": model.image_size,
            "tokenizer": weights_hash(model),
            "compared": agreement._asdict(),
        }
        (folder / DESCRIPTION).write_bytes(to_json(description))
    console = Console()
    for name in ("encoder", "decoder"):
        path = config.out / f"{name}.{config.format}"
        say(console, name, f"{path}, {path.stat().st_size / 2**20:.1f} MiB")
    ties = f"all but {agreement.different:,} ties" if agreement.different else "all"
    say(console, "tokens", f"{ties} of {agreement.tokens:,} are the tokenizer's")
    say(console, "images", f"differ by {agreement.image_error:.1e} at most (tolerance {IMAGE_TOLERANCE:g})")
    say(console, "time", f"{time.perf_counter() - start:.1f} s")
    return agreement


def main(args: Sequence[str]) -> None:
    """Run ``regvq export``."""
    run_command("export", ExportConfig, export, USAGE, args, stopped="stopped; nothing was written")
