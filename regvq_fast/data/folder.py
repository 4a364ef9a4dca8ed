"""Any folder of images as a data set."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from regvq_fast.data.finding import EXTENSIONS, SPLIT_NAMES, find_files, is_image, name_hash
from regvq_fast.data.pictures import FIELD_SUFFIXES, Crop, Field, Part, PictureDataset
from regvq_fast.data.samples import Split


class ImageFolder(PictureDataset):
    """Every image under a folder, as square uint8 RGB pictures (decoded as :func:`crop_rgb` says).

    Splits: the folder's own where it has ``train`` and one of ``val``, ``validation`` or ``test`` (the first of these);
    otherwise validation is about 5 % of the images, chosen by a hash of their paths in the folder, so that adding
    images moves none from one split to the other. A single image serves as both, with a warning. Links to folders are
    followed, each folder once; names that begin with a dot are left out.

    Files that cannot be decoded are skipped: one warning each in the logger "regvq_fast", and the next readable file
    of the sorted list takes the place. They are found on first use, so that opening a large folder stays cheap.

    The paths are Python strings, which every worker comes to have a copy of: millions of images are better kept in tar
    shards (:class:`~regvq_fast.data.shards.ImageShards`), which file systems prefer, too.

    Args:
        root: the folder, searched recursively for jpg, jpeg, png, webp, bmp, tif, tiff and gif files.
        split: "train": endless, every image once an epoch in shuffled order. "val": each image once, central crop.
        image_size: height and width in pixels of the samples.
        crop: of training images. "random-resized": 50 to 100 % of the area of the largest square that fits, aspect
            0.9 to 1.1, anywhere in the image. "center": that square itself, in the middle. Resized with Lanczos.
        flip: mirror training images with probability 1/2.
        seed: order, crops and flips are functions of (seed, index) and of nothing else.
        limit: use at most so many validation images, spread evenly over the sorted list. None: all.
        fields: what samples hold besides their image, from files beside it. "caption": a line of PHOTO.txt, in
            training any of them, drawn from (seed, index), in validation the first; repeated ones count once.
            "segmentation": the class ids of PHOTO.seg.png, a picture of the same shape with one channel, cut like the
            image with the nearest neighbour. Images that lack one are left out, with a warning.

    A sample has ``image`` (3, image_size, image_size) uint8 and, if asked for, ``segmentation`` (image_size,
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

    def _find(self, folder: Path) -> list[str]:
        """Paths of the images with all fields, sorted; at least one."""
        suffixes = [FIELD_SUFFIXES[field] for field in self.fields]
        left_out = self.left_out[os.fspath(folder)] = Counter[str]()
        found = find_files(folder, [*EXTENSIONS, *suffixes], left_out)
        images = [file for file in found if is_image(file)]
        if not images:
            kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
            raise FileNotFoundError(f"no images in {folder} or its subfolders; put some there ({kinds}), or tar shards")
        companions = set(found).difference(images)
        has = [np.array([_beside(file, suffix) in companions for file in images]) for suffix in suffixes]
        return [images[k] for k in self._complete(has, len(images))]

    def _read(self, position: int, part: Part) -> bytes:
        file = self.files[position]
        return Path(file if part == "image" else _beside(file, FIELD_SUFFIXES[part])).read_bytes()

    def _name(self, position: int) -> str:
        return self.files[position]


def _split_folder(root: Path, split: Split) -> Path | None:
    """The split's own folder in ``root``, if that comes with splits."""
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
