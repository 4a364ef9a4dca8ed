"""The base class of data sets in the layouts of their official archives."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.console import warn_once
from regvq_fast.data.reading import text_lines
from regvq_fast.data.samples import Field, Part, Split
from regvq_fast.files import atomic_path, user_cache

ArchiveName = Literal["ade20k", "celebahq", "cub200", "coco", "imagenet"]
"""Names of the training scripts' presets."""

MAP_FOLDER = ".regvq-maps"
"""Folder in an archive's top folder for semantic maps made of several files, or of colours."""


class Archive(ABC):
    """One data set in its official layout.

    The *name* of an image is the path of its file below the folder of the images. ``read`` returns files in the form of
    a folder of images: an image, a map with one class id per pixel, captions one per line.

    Args:
        top: the unpacked archive's folder, for which :meth:`is_top` is true.
    """

    name: ClassVar[ArchiveName]
    tops: ClassVar[tuple[str, ...]]
    """Names of the official top folder, which may be in the folder that the user names."""
    layout: ClassVar[str]
    """Expected contents of the top folder, for messages."""
    fields: ClassVar[tuple[Field, ...]]
    """Fields of the samples besides their image."""
    needed: ClassVar[tuple[Field, ...]]
    """Fields that the preset's prior needs."""
    mirror_pairs: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Pairs of class ids, such as left and right eye, to exchange in mirrored images."""
    maps_fit: ClassVar[bool] = True
    """True if maps must be as large as their images."""

    title: str
    classes: tuple[str, ...] = ()
    """Names of the class ids in semantic maps, from 0 on."""
    partitions: Mapping[str, int]
    """The official splits and the number of images in each; 0: unknown."""
    served: Mapping[Split, str]
    """The official splits for training and for validation, where papers report results."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.images = top / "images"
        """Folder to which names of images are relative."""

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Self | None:
        """Return the archive with ``root`` as its top folder or folder of images; None if there is none.

        A folder of images is resolved to its top folder, which has captions, maps and official splits.
        """
        folder = Path(root)
        if cls.is_top(folder):
            return cls(folder)
        folder = Path(os.path.abspath(folder))
        for above in folder.parents[:2]:
            if folder.is_dir() and cls.is_top(above) and (archive := cls(above)).images.is_relative_to(folder):
                return archive
        return None

    @classmethod
    def within(cls, root: str | os.PathLike[str]) -> list[Self]:
        """Return the archives with top folders in ``root``, which may hold several releases."""
        tops = [top for top in (Path(root) / name for name in cls.tops) if cls.is_top(top)]
        # Links, and names that differ only in case on some file systems, refer to one archive.
        return [cls(top) for k, top in enumerate(tops) if not any(top.samefile(other) for other in tops[:k])]

    @classmethod
    @abstractmethod
    def is_top(cls, folder: Path) -> bool:
        """Return whether this is the archive's top folder, from a few names in it."""

    @classmethod
    @abstractmethod
    def source(cls, part: Part) -> str:
        """Return the address of a part's files and where to unpack them, to follow "get it from"."""

    def lists(self) -> Sequence[Path]:
        """Return the files that list the images of the splits; all must exist."""
        return ()

    @abstractmethod
    def listed(self, partition: str) -> list[str]:
        """Return the names of the images of an official split in a fixed order, including missing files.

        Raises:
            FileNotFoundError: a list is missing. ValueError: one is damaged.
        """

    @abstractmethod
    def path(self, name: str, part: Part) -> str:
        """Return the path of the file with a part of an image, which may be missing; for labels, the image's path."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, from 0 on; without an override, there are none."""
        return ()

    def labels(self, names: Sequence[str]) -> NDArray[np.int32]:
        """Return the label of each image, -1 where it has none.

        Raises:
            FileNotFoundError: a list is missing. ValueError: one is damaged.
        """
        return np.full(len(names), -1, dtype=np.int32)

    def has(self, part: Part, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return a mask of the images that have this part."""
        if part == "label":
            return np.asarray(self.labels(names) >= 0)
        return existing([self.path(name, part) for name in names])

    def read(self, name: str, part: Part) -> bytes:
        """Return a part of an image in the form of a folder of images."""
        return Path(self.path(name, part)).read_bytes()

    @property
    def heading(self) -> str:
        """Title and folder, for messages."""
        return f"{self.title} in {self.top}"

    def _lines(self, path: Path) -> list[list[str]]:
        """Return the lines of a list, split into words; FileNotFoundError says where to get it."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: get it from {self.source('image')}")
        return [line.split() for line in text_lines(path)]

    def _cached(self, name: str, source: str, make: Callable[[], NDArray[np.uint8]]) -> bytes:
        """Return a semantic map from the cache; or make it, and store it as PNG in MAP_FOLDER or the user's cache.

        A cached map has the modification time of ``source``, the file or folder that it is made of, and is valid only
        if the times are equal: unpacked files can be older than the map.
        """
        made_of = _modified(source)
        folders = _map_folders(self.top)
        files = [folder / f"{os.path.splitext(name)[0]}.png" for folder in folders]
        for file in files:
            if (kept := _modified(file)) is not None and made_of in (kept, None):
                return file.read_bytes()
        data = encoded_map(make())
        for file in files:
            try:
                with atomic_path(file) as temporary:
                    temporary.write_bytes(data)
                    if made_of is not None:
                        os.utime(temporary, ns=(made_of, made_of))
                break
            except OSError as failure:
                reason = failure.strerror or type(failure).__name__  # without the file name: one warning
        else:
            warn_once(f"semantic maps made of {self.top} can't be kept, and are made anew each time ({reason})")
        return data


def existing(paths: Iterable[str]) -> NDArray[np.bool_]:
    """Return a mask of the files that exist.

    Each folder is listed once, which is faster on network file systems than a query per file.
    """
    listings: dict[str, set[str]] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        found.append(name in listings[folder])
    return np.array(found, dtype=bool)


def encoded_map(labels: NDArray[np.uint8]) -> bytes:
    """Encode (H, W) class ids as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def _modified(path: str | os.PathLike[str]) -> int | None:
    """Return the modification time of a file or folder in nanoseconds; None if it doesn't exist."""
    try:
        return os.stat(path).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def _map_folders(top: Path) -> list[Path]:
    folders = [top / MAP_FOLDER]
    try:
        return [*folders, user_cache("maps") / hashlib.sha256(os.fsencode(top.resolve())).hexdigest()[:32]]
    except OSError:  # no home directory
        return folders
