"""The index of a tar file: offsets of its samples, read from the headers and cached."""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from regvq_fast.console import warn_once
from regvq_fast.data.finding import (
    CAPTION_SUFFIX,
    EXTENSIONS,
    OTHER_FORMATS,
    SEGMENTATION_SUFFIX,
    file_suffix,
    is_image,
    name_hash,
)
from regvq_fast.files import atomic_path, user_cache

logger = logging.getLogger("regvq_fast")

INDEX_NAME = ".regvq-index.npz"
"""File with the index of all shards in a folder."""
EXTENT = np.dtype([("offset", np.int64), ("size", np.int64)])
"""Range of bytes in a tar file; offset -1 means that a sample has no such file."""
ENTRY = np.dtype(
    [("hash", np.uint32), ("image", EXTENT), ("caption", EXTENT), ("segmentation", EXTENT), ("label", np.int32)]
)
"""A sample: the hash of its image's name, extents of files, and its label's position in ``labels`` (-1: none)."""
LABEL_SUFFIX = ".cls"

_VERSION = 3
_THREADS = 8
_MANY = 8
"""Smallest number of shards for which indexing shows a progress bar."""
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = tarfile.BLOCKSIZE
_ABOUT_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of members that contain the name and properties of the next member."""
_LONGEST_NAME = 2**20
_LONGEST_LABEL = _BLOCK
"""Largest label in bytes: one block, which follows the header and costs no further access."""


class ShardIndex(NamedTuple):
    """The samples of a tar file, in the file's order."""

    entries: NDArray[np.void]
    """(count,) of type ENTRY."""
    damage: str
    """Damage of the rest of the file; empty if the file is complete."""
    left_out: Mapping[str, int]
    """Counts of unused members that look like images, by reason."""
    labels: Sequence[str]
    """The different texts of its ``.cls`` files."""


class _Record(NamedTuple):
    stamp: tuple[int, int]  # size and modification time in ns of the indexed file
    content: ShardIndex


def load_indexes(shards: Sequence[Path]) -> list[ShardIndex]:
    """Return the index of each shard: from the cache if size and modification time match, else from the headers.

    New indexes are cached in the shards' folder, or in the user's cache if that is not writable. Several processes that
    index the same shards each write a complete file. A damaged or truncated shard causes one warning; the samples
    before the damage are used.

    Raises:
        ValueError: a shard is compressed. OSError: one can't be read.
    """
    found: dict[Path, ShardIndex] = {}
    for folder in sorted({shard.parent for shard in shards}):
        found |= _load_folder(folder, [shard for shard in shards if shard.parent == folder])
    for shard in shards:
        if found[shard].damage:
            warn_once(f"shard {shard} {found[shard].damage}: its {len(found[shard].entries)} whole samples are used")
    return [found[shard] for shard in shards]


def _load_folder(folder: Path, shards: Sequence[Path]) -> dict[Path, ShardIndex]:
    stamps = {shard.name: _stamp(shard) for shard in shards}
    records: dict[str, _Record] = {}
    for file in _cache_files(folder):
        for name, record in _load_cache(file).items():
            if name not in records or record.stamp == stamps.get(name):
                records[name] = record
    new = [shard for shard in shards if shard.name not in records or records[shard.name].stamp != stamps[shard.name]]
    if new:
        for shard, index in zip(new, _read_many(new, folder), strict=True):
            records[shard.name] = _Record(stamps[shard.name], index)
        there = set(os.listdir(folder))
        _save_cache(folder, {name: record for name, record in records.items() if name in there})
    return {shard: records[shard.name].content for shard in shards}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# ----------------------------------------------------------------------------------------------------- reading headers


def _read_many(shards: Sequence[Path], folder: Path) -> Iterable[ShardIndex]:
    # Threads, since most of the time is spent waiting for a disk or the network.
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        yield from track(
            pool.map(read_index, shards),
            total=len(shards),
            description=f"indexing shards in {folder}",
            console=Console(stderr=True),
            transient=True,
            disable=len(shards) < _MANY,
        )


def read_index(path: Path) -> ShardIndex:
    """Index one tar file from its headers; of the data, only labels are read.

    A sample is a member KEY.EXT, where EXT (from the first dot of the file name on, as in webdataset) is that of an
    image. KEY.txt, KEY.seg.png and KEY.cls anywhere in the same tar file are its caption, segmentation and label. A
    repeated name, as in concatenated tar files, begins another sample with the same key.

    Raises:
        ValueError: the file is compressed. OSError: it can't be read.
    """
    images: list[tuple[str, str, int, int]] = []
    fields: dict[str, dict[str, tuple[int, int]]] = {CAPTION_SUFFIX: {}, SEGMENTATION_SUFFIX: {}}
    labels: dict[str, int] = {}
    label_of: dict[str, int] = {}
    keys = _Keys()
    damage, left_out = "", Counter[str]()
    with path.open("rb") as file:
        _refuse_compression(path, file.read(8))
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # otherwise a list of all members
                    if member.issparse():  # its bytes are not those of the file
                        left_out["sparse file"] += is_image(member.name)
                        continue
                    if member.size < 0 or member.offset_data + member.size > length:
                        damage = f"ends in the middle of {member.name}"
                        break
                    name = member.name.removeprefix("./")
                    head, _, base = name.rpartition("/")
                    key, dot, rest = base.partition(".")
                    if not key:
                        continue
                    if not member.isreg():
                        left_out["tar link"] += is_image(name) and (member.issym() or member.islnk())
                        continue
                    key, suffix = f"{head}/{key}", dot + rest.lower()
                    if suffix in fields:
                        fields[suffix][keys.of(key, suffix)] = (member.offset_data, member.size)
                    elif suffix == LABEL_SUFFIX and member.size <= _LONGEST_LABEL:
                        file.seek(member.offset_data)
                        if text := file.read(member.size).decode(errors="replace").strip():
                            label_of[keys.of(key, suffix)] = labels.setdefault(text, len(labels))
                    elif suffix in EXTENSIONS:
                        images.append((keys.of(key, suffix), name, member.offset_data, member.size))
                    elif (last := file_suffix(base)) in OTHER_FORMATS:
                        left_out[last] += 1
                    elif is_image(base):
                        left_out["dotted name"] += 1
                else:
                    damage = _missing_end(file, archive.offset)
        except (tarfile.TarError, ValueError, RecursionError) as error:  # RecursionError: endless headers
            damage = f"is no whole tar file ({error})"
    absent = (-1, 0)
    rows = [
        (
            name_hash(name),
            (offset, size),
            fields[CAPTION_SUFFIX].get(key, absent),
            fields[SEGMENTATION_SUFFIX].get(key, absent),
            label_of.get(key, -1),
        )
        for key, name, offset, size in images
    ]
    return ShardIndex(np.array(rows, dtype=ENTRY), damage, left_out, list(labels))


class _Member(tarfile.TarInfo):
    """A header with a checked size.

    The standard library would seek backwards for a negative size, and allocate any size of a name before reading it.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise tarfile.HeaderError("a negative size")
        if member.type in _ABOUT_THE_NEXT and member.size > _LONGEST_NAME:
            raise tarfile.HeaderError(f"a name of {member.size:,} bytes")
        return member


class _Keys:
    """Keys of samples, made distinct if a file name is repeated."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._again: dict[str, str] = {}

    def of(self, key: str, suffix: str) -> str:
        """Return the distinct key of the sample to which the next file of a key belongs."""
        current = self._again.get(key, key)
        if current + suffix in self._seen:
            current = self._again[key] = f"{current}\0"  # no name contains \0
        self._seen.add(current + suffix)
        return current


def _refuse_compression(path: Path, start: bytes) -> None:
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed with {name}, so that no sample can be read without all before it; "
                "unpack it to a plain .tar (images are compressed already)"
            )


def _missing_end(file: BinaryIO, offset: int) -> str:
    """Return the damage of an archive whose last member ends at ``offset``; empty if a block of zeros follows."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return ""
    return "is cut short" if len(block) < _BLOCK else f"is damaged from byte {offset} on"


def member_name(path: Path, offset: int) -> str:
    """Return the name of the member with data at ``offset``, for messages; the index has no names.

    Of a long name, it is the first 100 bytes.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(offset - _BLOCK, 0))
            return tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape").name
    except (OSError, tarfile.TarError):  # removed since, or changed
        return f"byte {offset}"


# --------------------------------------------------------------------------------------------------------------- cache


def _cache_files(folder: Path) -> list[Path]:
    """Return the possible paths of the index of a folder's shards, by preference."""
    files = [folder / INDEX_NAME]
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    try:
        return [*files, user_cache("shards") / f"{digest}.npz"]
    except OSError:  # no home directory
        return files


def _load_cache(file: Path) -> dict[str, _Record]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if int(arrays["version"]) != _VERSION:
                return {}
            parts = np.split(arrays["entries"], np.cumsum(arrays["counts"])[:-1])
            columns = ("names", "stamps", "damages", "left_out")
            all_labels = json.loads(arrays["labels"].tobytes())
            rows = zip(*(arrays[name].tolist() for name in columns), all_labels, parts, strict=True)
        records = {
            name: _Record((size, time), ShardIndex(entries, damage, json.loads(reasons), labels))
            for name, (size, time), damage, reasons, labels, entries in rows
        }
        return {name: record for name, record in records.items() if _is_plausible(record)}
    except Exception:  # missing, or damaged, which can raise anything: index anew
        return {}


def _is_plausible(record: _Record) -> bool:
    """Return whether all extents of an index lie in its shard; a damaged index might point elsewhere."""
    entries = record.content.entries
    if entries.dtype != ENTRY:
        return False
    within = entries["label"] < len(record.content.labels)
    for part in ("image", "caption", "segmentation"):
        offset, size = entries[part]["offset"], entries[part]["size"]
        within &= (offset >= -1) & (size >= 0) & (size <= record.stamp[0]) & (offset <= record.stamp[0] - size)
    return bool((within & (entries["image"]["offset"] >= 0) & (entries["label"] >= -1)).all())


def _save_cache(folder: Path, records: Mapping[str, _Record]) -> None:
    indexes = [record.content for record in records.values()]
    error: OSError | None = None
    for file in _cache_files(folder):
        try:
            with atomic_path(file) as temporary:
                np.savez_compressed(
                    temporary,
                    version=_VERSION,
                    names=np.array(list(records), dtype=np.str_),
                    stamps=np.array([record.stamp for record in records.values()], dtype=np.int64),
                    damages=np.array([index.damage for index in indexes], dtype=np.str_),
                    left_out=np.array([json.dumps(index.left_out) for index in indexes], dtype=np.str_),
                    # As bytes: an array of strings would give each the length of the longest.
                    labels=np.frombuffer(json.dumps([index.labels for index in indexes]).encode(), dtype=np.uint8),
                    counts=np.array([len(index.entries) for index in indexes], dtype=np.int64),
                    entries=np.concatenate([index.entries for index in indexes]),
                )
            return
        except OSError as failure:
            error = failure
    logger.warning("the index of the shards in %s can't be kept, and is made anew each time (%s)", folder, error)
