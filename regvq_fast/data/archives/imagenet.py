"""ImageNet (ILSVRC2012; Russakovsky et al. 2015): a thousand classes, with a label for each image."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.finding import EXTENSIONS, find_files
from regvq_fast.data.samples import Part

_SYNSET = re.compile(r"n\d{8}")
_LOOKED_AT = 1000
"""Number of entries of train/ to check for a synset, so that a folder with a million images is not listed."""
_CLASSES = 1000
_DEVKITS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class ImageNet(Archive):
    """``train/SYNSET/NAME.JPEG`` and ``val/``, of the same form or flat, or both in Kaggle's ``ILSVRC/Data/CLS-LOC/``.

    A label is the rank of the image's synset among the sorted synsets of ``train/``, as usual. The labels of flat
    validation images come from Kaggle's ``LOC_val_solution.csv`` or from the development kit's ground truth, which has
    its own order of classes (``map_clsloc.txt``, ``meta.mat``). These files, and those with the names of the classes,
    may be beside ``train/`` or up to three folders above. Subsets of the classes have the same layout.
    """

    name = "imagenet"
    tops = ("ILSVRC", "imagenet", "ImageNet", "ILSVRC2012")
    layout = "train/ with a folder for each synset, n01440764 to n15075141, and val/ (or both in Data/CLS-LOC/)"
    fields = ("label",)
    needed = ("label",)

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.images = _images(top) or top
        train = self.images / "train"
        self.synsets = sorted(filter(_SYNSET.fullmatch, os.listdir(train) if train.is_dir() else []))
        whole = len(self.synsets) == _CLASSES
        self.title = "ImageNet (ILSVRC2012)" if whole else f"ImageNet's {len(self.synsets)} classes"
        self.partitions = {"train": 1_281_167 * whole, "val": 50_000 * whole}
        self.served = {"train": "train", "val": "val"}

    @classmethod
    def is_top(cls, folder: Path) -> bool:
        return _images(folder) is not None

    @classmethod
    def source(cls, part: Part) -> str:
        if part == "label":
            return (
                "LOC_val_solution.csv of https://www.kaggle.com/c/imagenet-object-localization-challenge/data (or the "
                f"{_GROUND_TRUTH} and meta.mat of ILSVRC2012_devkit_t12), beside train/ and val/"
            )
        return "https://www.image-net.org/download.php (ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar)"

    def listed(self, partition: str) -> list[str]:
        folder = self.images / partition
        within = os.path.join(self.images, "")
        return [file.removeprefix(within) for file in find_files(folder, EXTENSIONS)] if folder.is_dir() else []

    def path(self, name: str, part: Part) -> str:
        return os.path.join(self.images, name)

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        file = self._list("LOC_synset_mapping.txt") or self._list("synset_words.txt")
        names = {words[0]: " ".join(words[1:]) for words in self._lines(file)} if file else {}
        return tuple(names.get(synset) or synset for synset in self.synsets)

    def labels(self, names: Sequence[str]) -> NDArray[np.int32]:
        ids = {synset: number for number, synset in enumerate(self.synsets)}
        found = []
        for name in names:
            partition, _, rest = name.partition("/")
            synset = rest.partition("/")[0]
            if synset not in ids and partition == "val":
                synset = self._flat_synsets.get(os.path.splitext(os.path.basename(name))[0], "")
            found.append(ids.get(synset, -1))
        return np.array(found, dtype=np.int32)

    @cached_property
    def _flat_synsets(self) -> Mapping[str, str]:
        """Return the synsets of flat validation images by image name; empty if no file has them."""
        if solution := self._list("LOC_val_solution.csv"):
            lines = [" ".join(words).partition(",") for words in self._lines(solution)]
            return {name: boxes.partition(" ")[0] for name, _, boxes in lines}
        if (truth := self._list(_GROUND_TRUTH)) is None:
            return {}
        order = self._devkit_order()
        numbers = [words[0] for words in self._lines(truth)]
        for number in set(numbers).difference(order):
            raise ValueError(f"{truth} has the class {number!r}, which its development kit does not: unpack both anew")
        return {f"ILSVRC2012_val_{k:08d}": order[number] for k, number in enumerate(numbers, start=1)}

    def _devkit_order(self) -> dict[str, str]:
        """Return the synset of each number that the development kit uses."""
        if table := self._list("map_clsloc.txt"):
            return {words[1]: words[0] for words in self._lines(table) if len(words) > 1}
        if (meta := self._list("meta.mat")) is None:
            raise FileNotFoundError(
                f"{_GROUND_TRUTH} has numbers that meta.mat or map_clsloc.txt explain: put one of these beside it"
            )
        from scipy.io import loadmat

        try:
            synsets = loadmat(meta, squeeze_me=True)["synsets"]
            return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
        except Exception as error:  # many types, for a damaged file
            raise ValueError(f"{meta} is damaged, or of no development kit ({error!r}): unpack it anew") from None

    def _list(self, name: str) -> Path | None:
        """Return the path of a list beside the splits, or up to three folders above; None if there is none."""
        images = Path(os.path.abspath(self.images))
        paths = (base / kit / name for base in (images, *images.parents[:3]) for kit in _DEVKITS)
        return next(filter(Path.is_file, paths), None)


def _images(top: Path) -> Path | None:
    """Return the folder of the splits; None if there is none with synsets."""
    for images in (top, top / "Data" / "CLS-LOC"):
        if (images / "train").is_dir() and (images / "val").is_dir():
            with os.scandir(images / "train") as entries:
                if any(_SYNSET.fullmatch(entry.name) for entry in islice(entries, _LOOKED_AT)):
                    return images
    return None
