"""Any folder of images as a data set."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from regvq_fast.data.finding import EXTENSIONS, SPLIT_NAMES, find_files, is_image, name_hash
from regvq_fast.data.image_files import FIELD_SUFFIXES, ImageFileDataset
from regvq_fast.data.samples import Crop, Field, Part, Split


class ImageFolder(ImageFileDataset):
    """Every image under a folder, as square uint8 RGB images (decoded by :func:`crop_rgb`).

    Splits: the folder's own where it has ``train`` and one of ``val``, ``validation`` or ``test`` (the first of these);
    otherwise validation is about 5 % of the images, chosen by a hash of their paths in the folder, so that adding
    images moves none from one split to the other. A single image serves as both, with a warning. Links to folders are
    followed, each folder once; names that begin with a dot are left out.

    Files that cannot be decoded are skipped: one warning each in the logger "regvq_fast", and the next readable file
    of the sorted list replaces it. They are found on first use, so that opening a large folder stays cheap.

    The paths are Python strings, of which every worker gets a copy: keep millions of images in tar shards
    (:class:`~regvq_fast.data.shards.ImageShards`) instead, which file systems prefer, too.

    Args:
        root: the folder, searched recursively for jpg, jpeg, png, webp, bmp, tif, tiff and gif files.
        split: "train": endless, every image once an epoch in shuffled order. "val": each image once, central crop.
        image_size: height and width in pixels of the samples.
        crop: of training images. "random-resized": 50 to 100 % of the area of the largest square that fits, aspect
            0.9 to 1.1, anywhere in the image. "center": that square itself, in the middle. Resized with Lanczos.
        flip: mirror training images with probability 1/2.
        seed: order, crops and flips are functions of (seed, index) only.
        limit: use at most so many validation images, spread evenly over the sorted list. None: all.
        fields: what samples have besides their image, from files beside it. "caption": a line of PHOTO.txt, in
            training a random one, by (seed, index), in validation the first; repeated ones count once.
            "segmentation": the class ids of PHOTO.seg.png, an image of the same shape with one channel, cropped alike
            with the nearest neighbour. Images that lack one are left out, with a warning.

    A sample has ``image`` (3, image_size, image_size) uint8 and, if requested, ``segmentation`` (image_size,
    image_size) uint8 and ``caption`` str.

    Raises:
        FileNotFoundError: no such folder, or no image in it, or none with the fields. NotADirectoryError: it is a file.
        ValueError: none of its images can be read (also on a later access, when the last one fails);
            an unknown split, crop or field; an image size or a limit below 1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split = "train",
        image_size: int = 256,
        crop: Crop = "random-resized",
        flip: bool = True,
        seed: int = 0,
        limit: int | None = None,
        fields: Collection[Field] = (),
    ) -> None:
        super().__init__(root, split, image_size, crop, flip, seed, limit, fields)
        self.root = Path(root)
        folder = _split_folder(self.root, split)
        files = self._find(folder or self.root)
        within = os.path.join(self.root, "")
        hashes = None if folder else np.array([name_hash(file.removeprefix(within)) for file in files], dtype=np.uint32)
        self.files: Sequence[str] = [files[k] for k in self._choose(hashes, len(files))]
        self._start(len(self.files))

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None

    def _find(self, folder: Path) -> list[str]:
        """Return the paths of the images with all fields, sorted; at least one."""
        suffixes = [FIELD_SUFFIXES[field] for field in self.fields]
        left_out = self.left_out[os.fspath(folder)] = Counter[str]()
        found = find_files(folder, [*EXTENSIONS, *suffixes], left_out)
        images = [file for file in found if is_image(file)]
        if not images:
            kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
            raise FileNotFoundError(f"no images in {folder} or its subfolders; put some there ({kinds}), or tar shards")
        others = set(found).difference(images)
        has = [np.array([_beside(file, suffix) in others for file in images]) for suffix in suffixes]
        return [images[k] for k in self._complete(has, len(images))]

    def _read(self, position: int, part: Part) -> bytes:
        file = self.files[position]
        return Path(file if part == "image" else _beside(file, FIELD_SUFFIXES[part])).read_bytes()

    def _name(self, position: int) -> str:
        return self.files[position]

    def _files(self) -> Sequence[str]:
        return self.files


def _split_folder(root: Path, split: Split) -> Path | None:
    """Return the split's own folder in ``root``; None if that has no splits."""
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}; give the path of a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; give the path of the folder that holds the images")
    folders = {
        name: next((root / folder for folder in choices if (root / folder).is_dir()), None)
        for name, choices in SPLIT_NAMES.items()
    }
    return folders[split] if all(folders.values()) else None


def _beside(file: str, suffix: str) -> str:
    return os.path.splitext(file)[0] + suffix
