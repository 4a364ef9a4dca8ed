"""What the paper's data sets have in common, read from the folders that their official archives unpack to."""

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
from regvq_fast.data.samples import Field, Part, Split
from regvq_fast.files import atomic_path, user_cache

ArchiveName = Literal["ade20k", "celebahq", "cub200", "coco"]
"""As the presets of the training scripts are called."""

MAP_FOLDER = ".regvq-maps"
"""In an archive's top folder: semantic maps that had to be made of several files, or of colours."""


class Archive(ABC):
    """One data set in its official layout.

    A picture's *name* is the path of its file below the folder of the images. ``read`` gives the parts of a picture as
    a folder of images would have them in files: an image, a map with one class id a pixel, captions one a line.

    Args:
        top: the folder that the archive unpacks to: :meth:`is_top` says so.
    """

    name: ClassVar[ArchiveName]
    tops: ClassVar[tuple[str, ...]]
    """What the official top folder is called: it may lie in the folder that users name."""
    layout: ClassVar[str]
    """What is expected in the top folder, for messages."""
    fields: ClassVar[tuple[Field, ...]]
    """What pictures may have besides their image."""
    needed: ClassVar[tuple[Field, ...]]
    """What of it the paper's prior needs."""
    mirror_pairs: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Class ids that change places in a mirrored picture: what is left in it comes to be right."""
    maps_fit: ClassVar[bool] = True
    """Whether maps have the size of their images, so that another size is an error."""

    title: str
    classes: tuple[str, ...] = ()
    """Names of the class ids in semantic maps, from 0 on."""
    partitions: Mapping[str, int]
    """The official splits and the number of pictures in each."""
    served: Mapping[Split, str]
    """Which of the splits is for training, and which for validation: the one that papers report on."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.images = top / "images"
        """The folder that names of pictures start from."""

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Self | None:
        """The archive whose top folder ``root`` is, or whose folder of images; None where it is neither.

        Images alone would be a folder like any other: without captions, maps and the official splits.
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
        """The archives whose top folders lie in ``root``: several where it holds several releases."""
        tops = [top for top in (Path(root) / name for name in cls.tops) if cls.is_top(top)]
        # Links, and names that a file system takes for the same, lead to one archive.
        return [cls(top) for k, top in enumerate(tops) if not any(top.samefile(other) for other in tops[:k])]

    @classmethod
    @abstractmethod
    def is_top(cls, folder: Path) -> bool:
        """Whether this is the archive's top folder, by a few of its names."""

    @classmethod
    @abstractmethod
    def source(cls, part: Part) -> str:
        """Where to get the files of a part, and where to unpack them: what follows "get it from"."""

    def lists(self) -> Sequence[Path]:
        """Files that say which picture is in which split; all have to be there."""
        return ()

    @abstractmethod
    def listed(self, partition: str) -> list[str]:
        """Names of the pictures of an official split, in a fixed order, whether their files are there or not.

        Raises:
            FileNotFoundError: a list is missing. ValueError: one is damaged.
        """

    @abstractmethod
    def path(self, name: str, part: Part) -> str:
        """The file with a part of a picture, whether it is there or not."""

    def has(self, part: Part, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the pictures have this part."""
        return existing([self.path(name, part) for name in names])

    def read(self, name: str, part: Part) -> bytes:
        """A part of a picture, as the file of a folder of images would have it."""
        return Path(self.path(name, part)).read_bytes()

    @property
    def label(self) -> str:
        """What it is and where, for people."""
        return f"{self.title} in {self.top}"

    def _lines(self, path: Path) -> list[list[str]]:
        """The lines of a list as words; FileNotFoundError says where to get it."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: get it from {self.source('image')}")
        return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _kept(self, name: str, source: str, make: Callable[[], NDArray[np.uint8]]) -> bytes:
        """A semantic map that is made once, and kept as PNG in MAP_FOLDER or, where that can't be written, in the
        user's cache.

        A kept map bears the time of ``source``, the file or folder that it was made of, and is made anew once that has
        another one. A later time would not do: unpacking gives folders the times that they had when they were packed.
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
                reason = failure.strerror or type(failure).__name__  # without the file's name: it says so once
        else:
            warn_once(f"semantic maps made of {self.top} can't be kept, and are made anew each time ({reason})")
        return data


def existing(paths: Iterable[str]) -> NDArray[np.bool_]:
    """Which of the files exist; each folder is listed once, which a network's file system takes better than questions
    about every file.
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
    """(H, W) class ids as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def _modified(path: str | os.PathLike[str]) -> int | None:
    """When a file or folder was last changed, in nanoseconds; None where it isn't there."""
    try:
        return os.stat(path).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def _map_folders(top: Path) -> list[Path]:
    folders = [top / MAP_FOLDER]
    try:
        return [*folders, user_cache("maps") / hashlib.sha256(os.fsencode(top.resolve())).hexdigest()[:32]]
    except OSError:  # nobody's home
        return folders
