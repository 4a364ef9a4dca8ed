"""ADE20K (Zhou et al. 2017): the scene parsing benchmark, and both full releases."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.archives.classes import ADE20K_CLASSES, ADE20K_CODE_TO_CLASS
from regvq_fast.data.finding import find_files
from regvq_fast.data.samples import Part

_FULL_2016, _FULL_2021 = "ADE20K_2016_07_26", "ADE20K_2021_17_01"


class ADE20K(Archive):
    """Images with maps of 150 classes, 0 for everything else, in one of three layouts.

    - the benchmark: ``ADEChallengeData2016/images/training/NAME.jpg``, ``annotations/training/NAME.png``;
    - the full release of 2016: ``ADE20K_2016_07_26/images/training/a/abbey/NAME.jpg`` with ``NAME_seg.png`` beside it;
    - the full release of 2021: the same in ``ADE20K_2021_17_01/images/ADE/training/...``.

    Colours of a ``_seg.png`` are codes of some 3000 classes: they become the benchmark's as in the official conversion
    (convertFromADE), once for each image.
    """

    name = "ade20k"
    tops = ("ADEChallengeData2016", _FULL_2021, _FULL_2016)
    layout = "images/training/ and annotations/training/ (benchmark), or images/ and index_ade20k.* (full release)"
    fields = ("segmentation",)
    needed = ("segmentation",)
    classes = ADE20K_CLASSES

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.full = not _is_benchmark(top)
        training, release = 20210, ""
        if self.full and (top / "images" / "ADE").is_dir():
            self.images, training, release = top / "images" / "ADE", 25574, ", full release of 2021"
        elif self.full:
            release = ", full release of 2016"
        self.title = f"ADE20K{release or ' scene parsing benchmark'}"
        self.partitions = {"training": training, "validation": 2000}
        self.served = {"train": "training", "val": "validation"}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        if _is_benchmark(folder) or (folder / "images" / "ADE" / "training").is_dir():
            return True
        full = folder.name == _FULL_2016 or any((folder / f"index_ade20k.{kind}").exists() for kind in ("mat", "pkl"))
        return full and (folder / "images" / "training").is_dir()

    @classmethod
    def source(cls, part: Part) -> str:
        return (
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (the full release: "
            "http://groups.csail.mit.edu/vision/datasets/ADE20K/request_data/), and unpack it there"
        )

    def listed(self, partition: str) -> list[str]:
        folder = self.images / partition
        within = os.path.join(self.images, "")
        return [file.removeprefix(within) for file in find_files(folder, [".jpg"])] if folder.is_dir() else []

    def path(self, name: str, part: Part) -> str:
        if part == "image":
            return os.path.join(self.images, name)
        stem = os.path.splitext(name)[0]
        return os.path.join(self.images, f"{stem}_seg.png") if self.full else f"{self.top}/annotations/{stem}.png"

    def read(self, name: str, part: Part) -> bytes:
        if part == "image" or not self.full:
            return super().read(name, part)
        return self._cached(name, self.path(name, part), lambda: self._converted(name))

    def _converted(self, name: str) -> NDArray[np.uint8]:
        """(H, W) ids of the 150 classes, out of the colours of the full release."""
        path = self.path(name, "segmentation")
        with Image.open(BytesIO(Path(path).read_bytes())) as file:
            if file.mode not in ("RGB", "RGBA"):
                raise ValueError(f"{path} should have colours that stand for classes, but is {file.mode}")
            colours = np.asarray(file.convert("RGB")).astype(np.uint16)
        return ADE20K_CODE_TO_CLASS[colours[..., 0] // 10 * 256 + colours[..., 1]]


def _is_benchmark(folder: Path) -> bool:
    marks = ("annotations", "objectInfo150.txt", "sceneCategories.txt")
    return (folder / "images" / "training").is_dir() and any((folder / mark).exists() for mark in marks)
