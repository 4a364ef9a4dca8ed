"""Search for the files of a data set: images, captions, maps and shards."""

import errno
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from regvq_fast.console import warn_once
from regvq_fast.data.samples import Split

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""Suffixes of image files, in lower or upper case."""
OTHER_FORMATS = frozenset(
    ".arw .avif .cr2 .dng .exr .hdr .heic .heif .ico .jfif .jp2 .jpe .jxl .nef .pgm .ppm .psd .svg .tga".split()
)
"""Suffixes of image files that are not read, but counted in a run's first lines."""
CAPTION_SUFFIX = ".txt"
SEGMENTATION_SUFFIX = ".seg.png"
"""Suffix of a map with the class id of each pixel of the image of the same name."""
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Suffixes of shards; compressed ones are included so that errors can name them."""
PARQUET_SUFFIX = ".parquet"
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}
"""Names of a data set's own splits; the first that exists is used."""

_RUN_FILES = {"config.json", "metrics.jsonl"}


def is_image(name: str) -> bool:
    """Return whether a file of this name is an image of a data set."""
    name = name.lower()
    return os.path.splitext(name)[1] in EXTENSIONS and not name.endswith(SEGMENTATION_SUFFIX)


def name_hash(name: str) -> int:
    """Return 32 bits that determine whether the image of this name, a path in a folder or shard, is held out."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


def find_files(
    folder: str | os.PathLike[str], suffixes: Iterable[str], left_out: Counter[str] | None = None
) -> list[str]:
    """Return the sorted paths of the files under ``folder`` whose names end in one of the suffixes, in either case.

    Links to folders are followed, each folder once. Names that begin with a dot, and folders of runs below ``folder``,
    are left out.

    Args:
        folder: to search.
        suffixes: of names, in lower case.
        left_out: counts dangling links, unreadable folders and images of other formats, by reason
            (:func:`left_out_text`). A warning names each unreadable folder.

    Raises:
        OSError: ``folder`` itself can't be read.
    """
    endings = tuple(suffixes)
    found: list[str] = []
    left_out = Counter() if left_out is None else left_out
    for current, names, reasons in _walk(folder):
        found += (os.path.join(current, name) for name in names if name.lower().endswith(endings))
        left_out.update(reasons)
        left_out.update(suffix for name in names if (suffix := file_suffix(name)) in OTHER_FORMATS)
    return sorted(found)


def file_suffix(name: str) -> str:
    """Return the last suffix of a file name, in lower case."""
    return os.path.splitext(name)[1].lower()


def left_out_text(reasons: Mapping[str, int]) -> str:
    """Return counts by reason as text, such as `3 files (2 dangling links, 1 .avif)`; empty if there are none.

    Args:
        reasons: a suffix, "unreadable", or a noun in the singular.
    """
    counts = sorted(
        ((count, reason) for reason, count in reasons.items() if count), key=lambda found: (-found[0], found[1])
    )
    if not counts:
        return ""
    listed = ", ".join(f"{count:,} {reason}{'s' if count > 1 and ' ' in reason else ''}" for count, reason in counts)
    total = sum(count for count, _ in counts)
    return f"{total:,} file{'s' if total > 1 else ''} ({listed})"


def holds_shards(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` names tar shards: a tar file, a pattern, or a folder with tar files before any image.

    A folder is searched from the top. In one folder images take precedence, so that photographs with an archive among
    them are a folder of images.
    """
    path = Path(path)
    if not path.is_dir():
        return str(path).lower().endswith(SHARD_SUFFIXES)
    for _, names, _ in _walk(path):
        if any(map(is_image, names)):
            return False
        if any(name.lower().endswith(SHARD_SUFFIXES) for name in names):
            return True
    return False


def holds_parquet(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a parquet file, or a folder with parquet files but without images and tar files.

    img2dataset's parquet files beside images and shards contain only addresses and captions.
    """
    if not os.path.isdir(path):
        return os.fspath(path).lower().endswith(PARQUET_SUFFIX)
    found = False
    for _, names, _ in _walk(path):
        if any(is_image(name) or name.lower().endswith(SHARD_SUFFIXES) for name in names):
            return False
        found = found or any(name.lower().endswith(PARQUET_SUFFIX) for name in names)
    return found


def _walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], Counter[str]]]:
    """Yield each folder under ``folder`` with the names of its files, and counts of dangling links and unreadable
    folders.
    """
    entered: set[tuple[int, int]] = set()
    pending = [os.fspath(folder)]
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:  # a circular link, or a second link to the folder
            continue
        entered.add((status.st_dev, status.st_ino))
        files: list[str] = []
        folders: list[str] = []
        reasons = Counter[str]()
        try:
            with os.scandir(current) as content:
                entries = [entry for entry in content if not entry.name.startswith(".")]
        except PermissionError as error:
            if len(entered) == 1:
                raise
            warn_once(f"left out the folder {current}, which can't be read: {error.strerror}")
            reasons["unreadable folder"] += 1
            entries = []
        if len(entered) > 1 and {entry.name for entry in entries} >= _RUN_FILES:
            continue
        for entry in entries:
            if _is(entry.is_dir):
                folders.append(entry.path)
            elif _is(entry.is_file):
                files.append(entry.name)
            else:
                reasons["dangling link"] += entry.is_symlink()
        yield current, files, reasons
        # Sorted, so that the choice between two links to one folder does not depend on the file system.
        pending += sorted(folders, reverse=True)


def _is(kind: Callable[[], bool]) -> bool:
    """Return whether an entry is of a kind; False for a link to itself or into an inaccessible folder."""
    try:
        return kind()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            return False
        raise
