"""MS-COCO (Lin et al. 2014) of 2014 and 2017: captions, and the maps of COCO-Stuff."""

import os
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.archives.archive import Archive, encoded_map, existing
from regvq_fast.data.archives.caption_table import CaptionTable
from regvq_fast.data.archives.classes import COCO_CLASSES
from regvq_fast.data.finding import find_files
from regvq_fast.data.samples import Part
from regvq_fast.json_values import parse_json

_YEARS = {"2017": (118287, 5000), "2014": (82783, 40504)}
"""Images for training and validation; the first year that exists is used."""


class COCO(Archive):
    """``train2017/NUMBER.jpg`` or ``images/train2017/NUMBER.jpg``, ``annotations/captions_train2017.json`` and, if
    requested, ``stuffthingmaps/train2017/NUMBER.png``; the same with 2014, and with val.

    Maps have COCO's ids: 0 unlabelled, 1 to 91 things, 92 to 182 stuff. The files of stuffthingmaps have ids lower by
    one, with 255 for unlabelled; the pixelmaps of the stuff challenge have these ids, with 183 for all things. Maps of
    2017 also serve the images of 2014, which are the same.
    """

    name = "coco"
    tops = ("coco", "COCO")
    layout = "train2017/ and val2017/ (or 2014; or both below images/)"
    fields = ("caption", "segmentation")
    needed = ("caption",)
    classes = COCO_CLASSES

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.images, year = _images_and_year(top) or (top, "2017")
        train, val = f"train{year}", f"val{year}"
        self.title = f"MS-COCO {year}"
        self.partitions = dict(zip((train, val), _YEARS[year], strict=True))
        self.served = {"train": train, "val": val}
        self._captions: dict[str, CaptionTable] = {}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        folder = Path(os.path.abspath(folder))
        own, above = ((base / "annotations").is_dir() for base in (folder, folder.parent))
        if folder.name == "images" and above and not own:  # the parent is the top folder, with the captions
            return False
        return _images_and_year(folder) is not None

    @classmethod
    def source(cls, part: Part) -> str:
        if part == "caption":
            return (
                "http://images.cocodataset.org/annotations/annotations_trainval2017.zip (2014: _trainval2014.zip)"
                ", and unpack it beside the folders of images"
            )
        if part == "segmentation":
            return (
                "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip, "
                "and unpack it as stuffthingmaps/ beside the folders of images"
            )
        return (
            "http://images.cocodataset.org/zips/train2017.zip and http://images.cocodataset.org/zips/val2017.zip (or "
            "train2014.zip and val2014.zip), and unpack both there"
        )

    def listed(self, partition: str) -> list[str]:
        folder = self.images / partition
        return [f"{partition}/{os.path.basename(f)}" for f in find_files(folder, [".jpg"])] if folder.is_dir() else []

    def path(self, name: str, part: Part) -> str:
        if part == "caption":
            return str(self.top / "annotations" / f"captions_{name.partition('/')[0]}.json")
        if part == "segmentation":
            choices = self._map_paths(name)
            return next(filter(os.path.exists, choices), choices[0])
        return os.path.join(self.images, name)

    def has(self, part: Part, names: Sequence[str]) -> NDArray[np.bool_]:
        if part == "caption":
            files = np.array([os.path.split(name) for name in names], dtype=np.str_).reshape(-1, 2)
            has = np.zeros(len(files), dtype=bool)
            for partition in np.unique(files[:, 0]).tolist():
                own = files[:, 0] == partition
                has[own] = np.isin(files[own, 1], self._of(partition).names)
            return has
        if part == "segmentation" and names:
            choices = zip(*(self._map_paths(name) for name in names), strict=True)
            return np.logical_or.reduce([existing(paths) for paths in choices])
        return super().has(part, names)

    def read(self, name: str, part: Part) -> bytes:
        if part == "caption":
            partition, file = os.path.split(name)
            return self._of(partition).of(file)
        if part == "image":
            return super().read(name, part)
        path = self.path(name, part)
        with Image.open(BytesIO(Path(path).read_bytes())) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"{path} should have one class id a pixel, but is {image.mode}")
            labels = np.asarray(image)
        return encoded_map(labels if "pixelmaps" in Path(path).parent.name else labels + np.uint8(1))  # 255 becomes 0

    @cached_property
    def _map_folders(self) -> list[str]:
        """Return the folders that may hold maps; at least one."""
        folders = [
            str(self.top / pattern.format(split + year))
            for split in ("train", "val")
            for year in _YEARS
            for pattern in (
                "stuffthingmaps/{}",
                "stuffthingmaps_trainval2017/{}",
                "annotations/{}",
                "stuff_{}_pixelmaps",
                "annotations/stuff_{}_pixelmaps",
            )
        ]
        return [folder for folder in folders if os.path.isdir(folder)] or folders[:1]

    def _map_paths(self, name: str) -> list[str]:
        number = os.path.splitext(name)[0][-12:]  # 2014's COCO_train2014_000000000009 is 2017's 000000000009
        return [os.path.join(folder, f"{number}.png") for folder in self._map_folders]

    def _of(self, partition: str) -> CaptionTable:
        if partition not in self._captions:
            self._captions[partition] = _read_captions(self.top / "annotations" / f"captions_{partition}.json")
        return self._captions[partition]


def _read_captions(path: Path) -> CaptionTable:
    """Return the captions of a split; none if their file is missing."""
    lines: dict[str, list[str]] = {}
    if path.is_file():
        try:
            content: Any = parse_json(path.read_bytes())
            files = {image["id"]: image["file_name"] for image in content["images"]}
            for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
                lines.setdefault(files[annotation["image_id"]], []).append(annotation["caption"])
            return CaptionTable(lines)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or holds no captions ({error!r}): unpack it anew") from None
    return CaptionTable(lines)


def _images_and_year(top: Path) -> tuple[Path, str] | None:
    """Return the folder of the images and the newest year in it; with annotations, one split suffices."""
    for year in _YEARS:
        for images in (top, top / "images"):
            found = sum((images / f"{split}{year}").is_dir() for split in ("train", "val"))
            if found == 2 or (found and (top / "annotations").is_dir()):
                return images, year
    return None
