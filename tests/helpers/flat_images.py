"""Images of one grey level, which says in a sample which file it was."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def flat_image(level: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, {"L": level, "RGB": (level,) * 3, "CMYK": (0, 0, 0, 255 - level)}[mode])


def write_flat(path: Path, level: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat_image(level, size, mode).save(path)


def encode_flat(level: int, size: tuple[int, int] = (24, 20), suffix: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    flat_image(level, size, mode).save(buffer, suffix)
    return buffer.getvalue()


def level_of(sample: dict[str, Any]) -> int:
    return int(sample["image"].float().mean())


def levels_of(dataset: Sequence[dict[str, Any]]) -> list[int]:
    return [level_of(dataset[position]) for position in range(len(dataset))]
