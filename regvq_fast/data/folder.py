"""A folder of images as a data set."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.finding import EXTENSIONS, SPLIT_NAMES, find_files, is_image, name_hash
from regvq_fast.data.image_files import FIELD_SUFFIXES, ImageFileDataset
from regvq_fast.data.labels import folder_class, folder_classes
from regvq_fast.data.samples import Field, Part, Split


class ImageFolder(ImageFileDataset):
    """All images under a folder, as square uint8 RGB images (decoded by :func:`crop_rgb`).

    Splits: the folder's own if it has ``train`` and one of ``val``, ``validation`` or ``test`` (the first of these).
    Otherwise about 5 % of the images are for validation, chosen by a hash of their paths in the folder, so that adding
    images moves none between the splits. A single image serves as both, with a warning. Links to folders are followed,
    each folder once; names that begin with a dot are left out.

    Undecodable files are skipped: each causes one warning in the logger "regvq_fast", and the next readable file of the
    sorted list replaces it. They are found on first use, so that opening a large folder is fast.

    Every worker gets a copy of the paths, which are Python strings: keep millions of images in tar shards instead
    (:class:`~regvq_fast.data.shards.ImageShards`).

    Args:
        source: the folder, searched recursively for jpg, jpeg, png, webp, bmp, tif, tiff and gif files.
        split, image_size, crop, flip, seed, limit: see :class:`~regvq_fast.data.image_files.ImageFileDataset`.
        fields: read from files beside the image. "caption": a line of PHOTO.txt, in training a random one, by
            (seed, index), in validation the first; repeated ones count once. "segmentation": the class ids of
            PHOTO.seg.png, an image of the same shape with one channel, cropped alike with the nearest neighbour.
            "label": the first folder below the split's that the image is in, as in torchvision's ``ImageFolder``; ids
            are ranks among the sorted names of both splits (``label_names``), at least two.

    Raises:
        FileNotFoundError: no such folder, or no image in it, or none with the fields. NotADirectoryError: it is a file.
        ValueError: as :class:`~regvq_fast.data.image_files.ImageFileDataset`.
    """

    def _find(self) -> None:
        self.root = Path(self.source)
        folders = _split_folders(self.root)
        self.folder = folders.get(self.split, self.root)
        """Folder of the split's images."""
        files = self._list(list(folders.values()))
        within = os.path.join(self.root, "")
        hashes = None if folders else np.array([name_hash(f.removeprefix(within)) for f in files], dtype=np.uint32)
        self.files: Sequence[str] = [files[k] for k in self._choose(hashes, len(files))]
        if "label" in self.fields:
            ids = {name: number for number, name in enumerate(self.label_names)}
            self._labels = np.array([ids[folder_class(file, self.folder)] for file in self.files], dtype=np.int32)
        self._start(len(self.files))

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None

    def _list(self, splits: Sequence[Path]) -> list[str]:
        """Return the paths of the images with all fields, sorted; at least one."""
        suffixes = [FIELD_SUFFIXES[field] for field in self.fields if field != "label"]
        left_out = self.left_out[os.fspath(self.folder)] = Counter[str]()
        found = find_files(self.folder, [*EXTENSIONS, *suffixes], left_out)
        images = [file for file in found if is_image(file)]
        if not images:
            kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
            raise FileNotFoundError(
                f"no images in {self.folder} or its subfolders; put some there ({kinds}), or tar shards"
            )
        self._spelled = {_lowered(file): file for file in found if _lowered(file) != file}
        for both in self._spelled.keys() & set(found):
            del self._spelled[both]  # lower case takes precedence
        has = [_have_beside(images, suffix, found) for suffix in suffixes]
        if "label" in self.fields:
            self.label_names = self._classes(images, splits)
            has.append(np.array([bool(self.label_names and folder_class(file, self.folder)) for file in images]))
        return [images[k] for k in self._complete(has, len(images))]

    def _classes(self, images: Sequence[str], splits: Sequence[Path]) -> tuple[str, ...]:
        """Return the sorted names of the classes of both splits; empty if there are fewer than two."""
        names = folder_classes(images, self.folder)
        for other in splits:
            if other != self.folder:
                names |= folder_classes(filter(is_image, find_files(other, EXTENSIONS)), other)
        return tuple(sorted(names)) if len(names) > 1 else ()

    def _having(self) -> dict[Field, int]:
        found = find_files(self.folder, [*EXTENSIONS, *FIELD_SUFFIXES.values()])
        has = {field: _have_beside(self.files, suffix, found) for field, suffix in FIELD_SUFFIXES.items()}
        names = self._classes(list(filter(is_image, found)), list(_split_folders(self.root).values()))
        labelled = sum(bool(folder_class(file, self.folder)) for file in self.files) if names else 0
        return {field: int(there.sum()) for field, there in has.items()} | {"label": labelled}

    def _read(self, position: int, part: Part) -> bytes:
        file = self.files[position]
        if part != "image":
            file = _beside(file, FIELD_SUFFIXES[part])
            file = self._spelled.get(file, file)
        return Path(file).read_bytes()

    def _name(self, position: int) -> str:
        return self.files[position]

    def _files(self) -> Sequence[str]:
        return self.files


def _split_folders(root: Path) -> dict[Split, Path]:
    """Return the folders of the splits in ``root``; empty if it has none."""
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}; give the path of a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; give the path of the folder that holds the images")
    folders = {
        name: folder
        for name, choices in SPLIT_NAMES.items()
        if (folder := next((root / choice for choice in choices if (root / choice).is_dir()), None))
    }
    return folders if len(folders) == len(SPLIT_NAMES) else {}


def _have_beside(images: Sequence[str], suffix: str, found: Iterable[str]) -> NDArray[np.bool_]:
    """Return a mask of the images with a file of this suffix, in either case, among the files found."""
    others = set(map(_lowered, found))
    return np.array([_beside(file, suffix) in others for file in images])


def _beside(file: str, suffix: str) -> str:
    return os.path.splitext(file)[0] + suffix


def _lowered(file: str) -> str:
    """Return a path, with its suffix in lower case if it is that of a field's file."""
    suffix = next((suffix for suffix in FIELD_SUFFIXES.values() if file.lower().endswith(suffix)), "")
    return file[: len(file) - len(suffix)] + suffix
