"""Which files of a folder are data."""

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from regvq_fast.data.samples import Split

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""What counts as an image file, in either case."""
CAPTION_SUFFIX = ".txt"
SEGMENTATION_SUFFIX = ".seg.png"
"""A class id at each pixel of the picture of the same name: never a picture itself."""
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Compressed shards are found so that they can be refused by name."""
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}
"""What data that comes with splits of its own calls them; the first that exists counts."""


def is_image(name: str) -> bool:
    """Whether a file of this name is a picture of a data set."""
    name = name.lower()
    return os.path.splitext(name)[1] in EXTENSIONS and not name.endswith(SEGMENTATION_SUFFIX)


def name_hash(name: str) -> int:
    """32 bits that decide whether the picture of this name, a path in its folder or shard, is held out."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


def find_files(folder: str | os.PathLike[str], suffixes: Iterable[str]) -> list[str]:
    """Paths of the files under ``folder`` whose names end in one of the suffixes, in either case; sorted.

    Links to folders are followed, each folder once; names that begin with a dot are left out.
    """
    endings = tuple(suffixes)
    return sorted(
        os.path.join(current, name)
        for current, names in _walk(folder)
        for name in names
        if name.lower().endswith(endings)
    )


def holds_shards(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` stands for tar shards: a tar file, a brace pattern, or a folder with tar files before any image.

    A folder is searched from the top; on one level images come before tar files, so that an archive among photographs
    does not turn them into something else.
    """
    path = Path(path)
    if not path.is_dir():
        return str(path).lower().endswith(SHARD_SUFFIXES)
    for _, names in _walk(path):
        if any(map(is_image, names)):
            return False
        if any(name.lower().endswith(SHARD_SUFFIXES) for name in names):
            return True
    return False


def _walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder from ``folder`` down, with the names of its files."""
    entered: set[tuple[int, int]] = set()
    pending = [os.fspath(folder)]
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:  # a link back up, or a second way to the same folder
            continue
        entered.add((status.st_dev, status.st_ino))
        files, folders = [], []
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():
                    files.append(entry.name)
        yield current, files
        # Sorted: which of two links to one folder is followed must not depend on the file system's order.
        pending += sorted(folders, reverse=True)
