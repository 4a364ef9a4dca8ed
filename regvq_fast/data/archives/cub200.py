"""CUB-200-2011 (Wah et al. 2011): birds, with ten captions an image by Reed et al. 2016."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.samples import Part

_CAPTION_FOLDERS = ("text", "text_c10", "birds/text", "cvpr2016_cub/text_c10")
"""Folders of unpacked captions, in the top folder or beside it."""


class CUB200(Archive):
    """``CUB_200_2011/images.txt``, ``train_test_split.txt`` and ``images/CLASS/NAME.jpg``; ``text/CLASS/NAME.txt`` has
    captions, one a line.
    """

    name = "cub200"
    tops = ("CUB_200_2011",)
    layout = "images.txt, train_test_split.txt and images/"
    fields = ("caption", "label")
    needed = ("caption",)
    title = "CUB-200-2011"

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.partitions = {"train": 5994, "test": 5794}
        self.served = {"train": "train", "val": "test"}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        lists = [(folder / name).is_file() for name in ("images.txt", "train_test_split.txt")]
        return (folder / "images").is_dir() and any(lists) and (all(lists) or folder.name in cls.tops)

    @classmethod
    def source(cls, part: Part) -> str:
        if part == "caption":
            return (
                "https://github.com/reedscot/cvpr2016 (or birds.zip of https://github.com/taoxugit/AttnGAN), as a "
                "folder text/ in CUB_200_2011/ or beside it"
            )
        return "https://data.caltech.edu/records/65de6-vp158 (CUB_200_2011.tgz), and unpack it there"

    def lists(self) -> list[Path]:
        return [self.top / "images.txt", self.top / "train_test_split.txt"]

    def listed(self, partition: str) -> list[str]:
        images, split = self.lists()
        training = {words[0]: words[-1] == "1" for words in self._lines(split)}
        names = []
        for number, *rest in self._lines(images):
            if number not in training or not rest:
                raise ValueError(
                    f"{split} does not say where image {number} of {images.name} belongs: unpack both anew"
                )
            if training[number] == (partition == "train"):
                names.append(" ".join(rest))
        return sorted(names)

    @cached_property
    def _species(self) -> list[str]:
        """Return the folders of all species in ``images.txt``, sorted; labels are positions in this list."""
        return sorted({words[1].partition("/")[0] for words in self._lines(self.lists()[0]) if len(words) > 1})

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(folder.partition(".")[2].replace("_", " ") or folder for folder in self._species)

    def labels(self, names: Sequence[str]) -> NDArray[np.int32]:
        ids = {folder: number for number, folder in enumerate(self._species)}
        return np.array([ids.get(name.partition("/")[0], -1) for name in names], dtype=np.int32)

    @cached_property
    def _captions(self) -> Path:
        classes = [folder.name for folder in self.images.iterdir() if folder.is_dir()]
        folders = [base / folder for base in (self.top, self.top.parent) for folder in _CAPTION_FOLDERS]
        return next(
            (folder for folder in folders if folder.is_dir() and any((folder / name).is_dir() for name in classes)),
            folders[0],
        )

    def path(self, name: str, part: Part) -> str:
        if part == "caption":
            return f"{self._captions / os.path.splitext(name)[0]}.txt"
        return str(self.images / name)

    def read(self, name: str, part: Part) -> bytes:
        data = super().read(name, part)
        # Some captions have the replacement character instead of an apostrophe.
        return data.replace("\ufffd".encode(), b" ") if part == "caption" else data
