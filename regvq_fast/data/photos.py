"""Crops of ten photographs in scikit-image's wheel, as a folder of classes."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from regvq_fast.data.samples import Split
from regvq_fast.files import atomic_folder
from regvq_fast.invocation import install

CLASSES = ("astronaut", "brick", "cat", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "moon", "rocket")
"""Functions of `skimage.data` that don't download anything."""

_SIDES = 96, 128  # smallest and largest side of a crop in pixels
_CROPS: dict[Split, int] = {"train": 200, "val": 20}  # number per photograph


def prepare_photos(out: Path, *, console: Console) -> None:
    """Write 2,200 square crops of 96 to 128 px as ``SPLIT/CLASS/NUMBER.png``; deterministic.

    Training crops are from the left half of a photograph, validation crops from the right half. The folder is created
    atomically.

    Args:
        out: new or empty folder.
        console: for the counts.

    Raises:
        FileExistsError: `out` exists and is not empty. FileNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise FileNotFoundError(f"the photographs are scikit-image's: {install('train')}") from None
    photographs = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in CLASSES}
    with atomic_folder(out) as partial:
        for path, crop in _crops(photographs):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            crop.save(partial / path)
    counts = " and ".join(f"{len(CLASSES) * count:,} for {split}" for split, count in _CROPS.items())
    console.print(Text(f"{out}: images in {len(CLASSES)} classes, {counts}"), soft_wrap=True)


def _crops(photographs: Mapping[str, Image.Image]) -> Iterator[tuple[Path, Image.Image]]:
    rng = random.Random(0)
    for name, photo in photographs.items():
        middle = photo.width // 2
        for (split, count), (left, right) in zip(_CROPS.items(), ((0, middle), (middle, photo.width)), strict=True):
            for number in range(count):
                side = rng.randint(*_SIDES)
                x, y = rng.randint(left, right - side), rng.randint(0, photo.height - side)
                yield Path(split, name, f"{number:03}.png"), photo.crop((x, y, x + side, y + side))
