"""CelebAMask-HQ (Lee et al. 2020): the faces of CelebA-HQ, with masks of their parts."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.reading import is_of_the_machine
from regvq_fast.data.samples import Part

PARTS = tuple(
    "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth".split()
)
"""In the order of the official g_mask.py: class ids from 1 on; later parts cover earlier ones."""
_VALIDATION, _TEST = 162_771, 182_638
"""First rows of CelebA's validation and test partitions, from the official g_partition.py."""
_FOLDER_IMAGES = 2000
_NUMBER = re.compile(r"[0-9]{1,9}")


class CelebAHQ(Archive):
    """``CelebA-HQ-img/N.jpg``, ``CelebAMask-HQ-mask-anno/0..14/0000N_PART.png``, ``CelebA-HQ-to-CelebA-mapping.txt``.

    The masks of a face's parts are white on black, with 512 px for images of 1024 px; invisible parts have no mask.
    They are merged into one map on first use.
    """

    name = "celebahq"
    tops = ("CelebAMask-HQ",)
    layout = "CelebA-HQ-img/, CelebAMask-HQ-mask-anno/ and CelebA-HQ-to-CelebA-mapping.txt"
    fields = ("segmentation",)
    needed = ("segmentation",)
    mirror_pairs = tuple(
        (PARTS.index(f"l_{part}") + 1, PARTS.index(f"r_{part}") + 1) for part in ("eye", "brow", "ear")
    )
    maps_fit = False
    title = "CelebA-HQ with CelebAMask-HQ"
    classes = ("background", *PARTS)

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.images = top / "CelebA-HQ-img"
        self.partitions = {"train": 24183, "val": 2993, "test": 2824}
        self.served = {"train": "train", "val": "test"}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        others = ("CelebAMask-HQ-mask-anno", "CelebA-HQ-to-CelebA-mapping.txt")
        return (folder / "CelebA-HQ-img").is_dir() and any((folder / name).exists() for name in others)

    @classmethod
    def source(cls, part: Part) -> str:
        return "https://github.com/switchablenorms/CelebAMask-HQ (CelebAMask-HQ.zip), and unpack it there"

    def lists(self) -> list[Path]:
        return [self.top / "CelebA-HQ-to-CelebA-mapping.txt"]

    def listed(self, partition: str) -> list[str]:
        (mapping,) = self.lists()
        names = []
        for words in self._lines(mapping)[1:]:
            if len(words) < 2 or not all(_NUMBER.fullmatch(word) for word in words[:2]):
                raise ValueError(f"{mapping} has a line {' '.join(words)!r} instead of two numbers: unpack it anew")
            row = int(words[1])
            if partition == ("train" if row < _VALIDATION else "val" if row < _TEST else "test"):
                names.append(f"{int(words[0])}.jpg")
        return names

    def path(self, name: str, part: Part) -> str:
        if part == "image":
            return str(self.images / name)
        return f"{self._masks(name)}_{PARTS[0]}.png"

    def _masks(self, name: str) -> str:
        """Return the paths of a face's masks, up to the part's name."""
        number = int(os.path.splitext(name)[0])
        return os.path.join(self.top, "CelebAMask-HQ-mask-anno", str(number // _FOLDER_IMAGES), f"{number:05d}")

    def has(self, part: Part, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return a mask of the faces that have the mask of any part; no list states which parts are visible."""
        if part == "image":
            return super().has(part, names)
        masks = [os.path.split(self._masks(name)) for name in names]
        found = {
            folder: {entry.split("_")[0] for entry in os.listdir(folder)} if os.path.isdir(folder) else set()
            for folder in {folder for folder, _ in masks}
        }
        return np.array([number in found[folder] for folder, number in masks], dtype=bool)

    def read(self, name: str, part: Part) -> bytes:
        if part == "image":
            return super().read(name, part)
        # The folder's modification time changes with every mask, and takes one query.
        return self._cached(name, os.path.dirname(self._masks(name)), lambda: self._merged(name))

    def _merged(self, name: str) -> NDArray[np.uint8]:
        """Return (H, W) class ids, 0 outside all parts."""
        labels: NDArray[np.uint8] | None = None
        for label, part in enumerate(PARTS, start=1):
            path = f"{self._masks(name)}_{part}.png"
            try:
                with Image.open(path) as file:
                    mask = np.asarray(file.convert("L")) > 0
            except FileNotFoundError:
                continue
            except OSError as error:
                if is_of_the_machine(error):
                    raise
                raise ValueError(f"the mask {path} can't be read: {error}") from None
            if labels is None:
                labels = np.zeros(mask.shape, dtype=np.uint8)
            if mask.shape != labels.shape:
                raise ValueError(f"the mask {path} has {mask.shape} pixels, the others of this face {labels.shape}")
            labels[mask] = label
        if labels is None:
            raise FileNotFoundError(f"no masks {self._masks(name)}_*.png")
        return labels
