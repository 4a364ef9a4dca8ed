"""ADE20K (Zhou et al. 2017): the scene parsing benchmark, and both full releases."""

import os
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.archives.caption_table import CaptionTable
from regvq_fast.data.archives.classes import ADE20K_CLASSES, ADE20K_CODE_TO_CLASS
from regvq_fast.data.finding import find_files
from regvq_fast.data.reading import raw_lines, text_lines
from regvq_fast.data.samples import Part
from regvq_fast.json_values import parse_json

_FULL_2016, _FULL_2021 = "ADE20K_2016_07_26", "ADE20K_2021_17_01"


class ADE20K(Archive):
    """Images with maps of 150 classes, 0 for everything else, in one of three layouts.

    - the benchmark: ``ADEChallengeData2016/images/training/NAME.jpg``, ``annotations/training/NAME.png``;
    - the full release of 2016: ``ADE20K_2016_07_26/images/training/a/abbey/NAME.jpg`` with ``NAME_seg.png`` beside it;
    - the full release of 2021: the same in ``ADE20K_2021_17_01/images/ADE/training/...``.

    Colours of a ``_seg.png`` are codes of about 3000 classes. They are converted to the benchmark's classes as by the
    official conversion (convertFromADE), once for each image.

    Labels are the scene categories in the benchmark's ``sceneCategories.txt``. The archive has no captions; they may be
    added in ``NAME.txt`` beside ``NAME.jpg``, one per line, or in ``captions.jsonl`` in the top folder, with a line for
    each image: ``{"file_name": "training/NAME.jpg", "text": "a caption"}`` (or a list of captions).

    Other data may have the benchmark's layout, with other classes in ``objectInfo150.txt``, or without this file and
    with other image names; maps may then have any ids.
    """

    name = "ade20k"
    tops = ("ADEChallengeData2016", _FULL_2021, _FULL_2016)
    layout = "images/training/ and annotations/training/ (benchmark), or images/ and index_ade20k.* (full release)"
    fields = ("segmentation", "caption", "label")
    needed = ("segmentation",)

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
        self.classes = ADE20K_CLASSES if self.full else _benchmark_classes(top)
        if self.classes != ADE20K_CLASSES:
            self.title = "data in the layout of ADE20K"
            self.partitions = {"training": 0, "validation": 0}
        self.served = {"train": "training", "val": "validation"}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        if _is_benchmark(folder) or (folder / "images" / "ADE" / "training").is_dir():
            return True
        full = folder.name == _FULL_2016 or any((folder / f"index_ade20k.{kind}").exists() for kind in ("mat", "pkl"))
        return full and (folder / "images" / "training").is_dir()

    @classmethod
    def source(cls, part: Part) -> str:
        if part == "caption":
            return "your own captions, NAME.txt beside NAME.jpg or captions.jsonl in the top folder: it has none itself"
        return (
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (the full release: "
            "http://groups.csail.mit.edu/vision/datasets/ADE20K/request_data/), and unpack it there"
        )

    def listed(self, partition: str) -> list[str]:
        folder = self.images / partition
        within = os.path.join(self.images, "")
        return [file.removeprefix(within) for file in find_files(folder, [".jpg"])] if folder.is_dir() else []

    def path(self, name: str, part: Part) -> str:
        stem = os.path.splitext(name)[0]
        if part != "segmentation":
            return os.path.join(self.images, f"{stem}.txt" if part == "caption" else name)
        return os.path.join(self.images, f"{stem}_seg.png") if self.full else f"{self.top}/annotations/{stem}.png"

    @cached_property
    def _captions(self) -> CaptionTable:
        return _read_captions(self.top / "captions.jsonl")

    @cached_property
    def _scenes(self) -> dict[str, str]:
        """Return the scene category of each image that ``sceneCategories.txt`` lists."""
        path = self.top / "sceneCategories.txt"
        lines = self._lines(path) if path.is_file() else []
        return {words[0]: " ".join(words[1:]).replace("_", " ") for words in lines if len(words) > 1}

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._scenes.values())))

    def labels(self, names: Sequence[str]) -> NDArray[np.int32]:
        ids = {scene: number for number, scene in enumerate(self.label_names)}
        scenes = (self._scenes.get(os.path.splitext(os.path.basename(name))[0], "") for name in names)
        return np.array([ids.get(scene, -1) for scene in scenes], dtype=np.int32)

    def has(self, part: Part, names: Sequence[str]) -> NDArray[np.bool_]:
        if part == "caption":
            return np.asarray(super().has(part, names) | np.isin(np.array(names, dtype=np.str_), self._captions.names))
        return super().has(part, names)

    def read(self, name: str, part: Part) -> bytes:
        if part == "caption":
            return self._captions.of(name) or super().read(name, part)
        if part == "image" or not self.full:
            return super().read(name, part)
        return self._cached(name, self.path(name, part), lambda: self._converted(name))

    def _converted(self, name: str) -> NDArray[np.uint8]:
        """Return the ids (H, W) of the 150 classes from the colours of the full release."""
        path = self.path(name, "segmentation")
        with Image.open(BytesIO(Path(path).read_bytes())) as file:
            if file.mode not in ("RGB", "RGBA"):
                raise ValueError(f"{path} should have colours that stand for classes, but is {file.mode}")
            colours = np.asarray(file.convert("RGB")).astype(np.uint16)
        return ADE20K_CODE_TO_CLASS[colours[..., 0] // 10 * 256 + colours[..., 1]]


def _is_benchmark(folder: Path) -> bool:
    marks = ("annotations", "objectInfo150.txt", "sceneCategories.txt")
    return (folder / "images" / "training").is_dir() and any((folder / mark).exists() for mark in marks)


def _benchmark_classes(top: Path) -> tuple[str, ...]:
    """Return the names of the class ids in a folder with the benchmark's layout; empty if they are unknown."""
    table = top / "objectInfo150.txt"
    if table.is_file():
        lines = [line.split("\t") for line in text_lines(table)[1:]]
        names = [line[-1].partition(",")[0].strip() for line in lines]
        return ADE20K_CLASSES if set(names) <= set(ADE20K_CLASSES) else (ADE20K_CLASSES[0], *names)
    if (top / "sceneCategories.txt").is_file():
        return ADE20K_CLASSES
    with os.scandir(top / "images" / "training") as entries:
        return ADE20K_CLASSES if any(entry.name.startswith("ADE_") for entry in entries) else ()


def _read_captions(path: Path) -> CaptionTable:
    """Return the captions in ``captions.jsonl``; none if it is missing."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(raw_lines(path.read_bytes()) if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            texts = [row["text"]] if isinstance(row["text"], str) else list(row["text"])
            captions.setdefault(row["file_name"].removeprefix("images/"), []).extend(map(str, texts))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'line {number} of {path} should be like {{"file_name": "training/NAME.jpg", "text": "a caption"}}, '
                f"got {line[:60].decode(errors='replace')}"
            ) from None
    return CaptionTable(captions)
