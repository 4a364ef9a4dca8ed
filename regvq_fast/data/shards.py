"""Tar shards in webdataset's layout: a data set and a writer."""

import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import chain
from math import ceil
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.finding import EXTENSIONS, SHARD_SUFFIXES, SPLIT_NAMES, find_files, holds_shards
from regvq_fast.data.image_files import ImageFileDataset
from regvq_fast.data.labels import cls_ids
from regvq_fast.data.samples import Field, Part, Split
from regvq_fast.data.shard_index import ShardIndex, load_indexes, member_name
from regvq_fast.files import atomic_path

_MOST_SHARDS = 1_000_000


class ImageShards(ImageFileDataset):
    """The images in tar files, as square uint8 RGB images: like :class:`ImageFolder`, for millions of images.

    Layout, as written by webdataset, img2dataset or plain ``tar``: KEY.jpg (png, webp, bmp, tif, tiff, gif), with its
    caption KEY.txt, class ids KEY.seg.png and label KEY.cls, where KEY is the file name up to the first dot. Labels are
    the integers in ``.cls`` files; texts become their ranks among those of all shards. Other members, and those whose
    names begin with a dot, are ignored.

    This is not webdataset's reader, which streams shards and shuffles within a buffer: there the order depends on the
    number of workers and ranks, and a run can't be resumed where it stopped. Here headers are read once
    (:mod:`~regvq_fast.data.shard_index`), and samples are random access: the order is an exact shuffle, a function of
    (seed, index) only. The price is a read at a random offset for each sample: negligible on a local SSD or a parallel
    file system, slow on a spinning disk, impossible on an object store. The tar files must not be compressed.

    Memory is 16 bytes per sample, 4 for a label and 16 for each other field, in arrays that forked workers share. Files
    are opened for each read, which takes microseconds compared with milliseconds of decoding: thousands of shards need
    no file handles, and processes share none.

    Splits: the shards' own, if the last name of a split that appears as a word in their paths is "train" for some and
    "val", "validation" or "test" (the first of these) for others: train/0000.tar, imagenet-val-0000.tar. Otherwise
    about 5 % of the images are for validation, by a hash of their names in the tar file: packing a folder, also again,
    moves none between the splits.

    Unreadable images are skipped as in a folder, as is the rest of a damaged tar file.

    Args:
        source: a folder with tar files, searched recursively; one tar file; or a pattern with braces, in which ranges
            and lists are expanded as in a shell: ``shards-{000000..000099}.tar``, ``{a,b}-{0..9}.tar``.
        split, image_size, crop, flip, seed, limit, fields: see
            :class:`~regvq_fast.data.image_files.ImageFileDataset`.

    Samples are ordered by the shards' paths, and within a shard as in the file: shards of a folder's images in sorted
    order give the folder's samples.

    Raises:
        FileNotFoundError: no such folder, file or shards of a pattern; no images in them, or none with the fields.
        ValueError: a pattern that can't be expanded, a compressed shard, invalid labels
            (:func:`~regvq_fast.data.labels.cls_ids`), and as ``ImageFileDataset``.
        OSError: a shard can't be read.
    """

    def _find(self) -> None:
        root, shards = _find_shards(self.source)
        splits = _own_shards(root, shards)
        self.shards: Sequence[Path] = splits.get(self.split, shards)
        indexes = load_indexes(self.shards)
        if "label" in self.fields:
            used = list(chain.from_iterable(splits.values())) or shards  # of both splits, which have common ids
            indexes = self._with_label_ids(indexes, dict(zip(used, load_indexes(used), strict=True)))
        self.left_out = {str(shard): index.left_out for shard, index in zip(self.shards, indexes, strict=True)}
        entries, ends = self._complete_entries(indexes)
        chosen = self._choose(None if splits else entries["hash"], len(entries))
        self._ends = np.searchsorted(chosen, ends)  # where each shard's samples end in the split's list
        parts: list[Part] = ["image", *(self.fields - {"label"})]
        self._locations: dict[Part, NDArray[np.void]] = {part: entries[part][chosen] for part in parts}
        if "label" in self.fields:
            self._labels = entries["label"][chosen]
        self._counts: dict[Field, int] = {f: int(_has(entries, f)[chosen].sum()) for f in get_args(Field)}
        self._start(len(chosen))

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None and holds_shards(data)

    def _having(self) -> Mapping[Field, int]:
        return self._counts

    def _with_label_ids(self, indexes: Sequence[ShardIndex], used: Mapping[Path, ShardIndex]) -> list[ShardIndex]:
        """Return the indexes with label ids instead of positions in each shard's labels.

        ``used`` are the indexes of both splits, which have common ids.
        """
        texts = {text: shard for shard, index in used.items() for text in index.labels}
        self.label_names, ids = cls_ids(texts, self._stated_labels)
        numbered = []
        for index in indexes:
            table = np.array([*(ids[text] for text in index.labels), -1], dtype=np.int32)  # -1: no label, the last item
            entries = index.entries.copy()
            entries["label"] = table[entries["label"]]
            numbered.append(index._replace(entries=entries))
        return numbered

    def _complete_entries(self, indexes: Sequence[ShardIndex]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """Return the samples with all fields, at least one, and their number up to the end of each shard."""
        entries = np.concatenate([index.entries for index in indexes])
        ends = np.cumsum([len(index.entries) for index in indexes])
        if not len(entries):
            kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
            raise FileNotFoundError(
                f"no images in the {len(self.shards)} tar files of {self.source}; a sample is KEY.EXT, with no dot in "
                f"KEY and EXT one of {kinds}"
            )
        complete = self._complete([_has(entries, field) for field in self.fields], len(entries))
        return entries[complete], np.searchsorted(complete, ends)

    def _read(self, position: int, part: Part) -> bytes:
        offset, size = self._locations[part][position].tolist()
        with self._shard(position).open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise EOFError("the shard ends in the middle of it")
        return data

    def _name(self, position: int) -> str:
        shard = self._shard(position)
        return f"{member_name(shard, int(self._locations['image'][position]['offset']))} of {shard}"

    def _files(self) -> Sequence[Path]:
        return self.shards

    def _shard(self, position: int) -> Path:
        return self.shards[int(np.searchsorted(self._ends, position, side="right"))]


def expand_braces(pattern: str) -> list[str]:
    """Return the sorted expansions of a pattern: ``{08..10}`` is 08, 09, 10 and ``{a,b}`` is a, b, also nested.

    Raises:
        ValueError: braces that don't match, or that contain neither a range of integers nor a list.
    """
    return sorted(set(_expand(pattern, pattern)))


def _expand(text: str, pattern: str) -> list[str]:
    braces = re.search(r"\{([^{}]*)\}", text)  # an innermost pair
    if braces is None:
        if "{" in text or "}" in text:
            raise ValueError(f"cannot expand {pattern}: its braces don't match")
        return [text]
    inside = braces[1]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, limits.groups())
        if not 0 <= last - first < _MOST_SHARDS:
            raise ValueError(f"cannot expand {pattern}: {{{inside}}} is no range of 1 to {_MOST_SHARDS} shards")
        padded = any(len(limit) > 1 and limit.startswith("0") for limit in limits.groups())
        width = max(map(len, limits.groups())) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise ValueError(f"cannot expand {pattern}: {{{inside}}} is neither a range like {{000..099}} nor a list")
    before, after = text[: braces.start()], text[braces.end() :]
    return list(chain.from_iterable(_expand(before + choice + after, pattern) for choice in choices))


def _find_shards(source: str) -> tuple[Path, list[Path]]:
    """Return the common folder of the shards and the shards, sorted; at least one."""
    path = Path(source)
    if path.is_dir():
        shards = [Path(file) for file in find_files(path, SHARD_SUFFIXES)]
        if not shards:
            raise FileNotFoundError(f"no tar files in {source} or its subfolders")
        return path, shards
    if path.is_file():
        return path.parent, [path]
    if "{" not in source and "}" not in source:
        raise FileNotFoundError(f"no such file or folder: {source}; give a folder of tar files, or a pattern")
    shards = [Path(name) for name in expand_braces(source)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{len(missing)} of the {len(shards)} shards of {source} are missing: {names}")
    return Path(os.path.commonpath([shard.parent for shard in shards])), shards


def _has(entries: NDArray[np.void], field: Field) -> NDArray[np.bool_]:
    """Return a mask of the samples with a field."""
    return np.asarray(entries[field] >= 0 if field == "label" else entries[field]["offset"] >= 0)


def _own_shards(root: Path, shards: Sequence[Path]) -> dict[Split, list[Path]]:
    """Return the shards of each split; empty if they have no splits."""
    names = {name for choices in SPLIT_NAMES.values() for name in choices}
    by_name: dict[str, list[Path]] = {}
    for shard in shards:
        words = re.findall("[a-z]+", shard.relative_to(root).as_posix().lower())
        own = [word for word in words if word in names]
        if own:
            by_name.setdefault(own[-1], []).append(shard)
    found: dict[Split, list[Path]] = {
        name: next((by_name[choice] for choice in choices if choice in by_name), [])
        for name, choices in SPLIT_NAMES.items()
    }
    return found if all(found.values()) else {}


def write_shards(samples: Iterable[Mapping[str, str | bytes]], pattern: str, max_bytes: int = 10**9) -> list[Path]:
    """Pack samples into tar files for this module and webdataset; return their paths.

    Equal samples give equal bytes. Files are written atomically.

    Args:
        samples: each with a unique ``__key__``, a path without extension, and its files by extension:
            ``{"__key__": "cats/0", "jpg": b"...", "txt": "a cat", "seg.png": b"...", "cls": "7"}``. Strings are
            written as UTF-8.
        pattern: path of the shards with a format for their number, such as "packed/train-%06d.tar".
        max_bytes: largest size of a shard, unless a single sample is larger.

    Raises:
        ValueError: a pattern without a format for a number; a key that is missing, repeated in its shard, or has a dot
            in its file name.
        FileExistsError: a shard exists already.
    """
    try:
        if pattern % 0 == pattern % 1:
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(f"pattern must have one format for a number, like shards-%06d.tar; got {pattern!r}") from None
    shards: list[Path] = []
    remaining = iter(samples)
    sample = next(remaining, None)
    while sample is not None:
        shard = Path(pattern % len(shards))
        if shard.exists():
            raise FileExistsError(f"{shard} exists; name other shards, or remove it")
        keys: set[str] = set()
        with atomic_path(shard) as temporary, tarfile.open(temporary, "w") as archive:
            while sample is not None:
                key, files = _encoded(sample)
                size = sum(tarfile.BLOCKSIZE * (1 + ceil(len(data) / tarfile.BLOCKSIZE)) for data in files.values())
                if keys and archive.offset + size > max_bytes:
                    break
                if key in keys:
                    raise ValueError(f"key {key!r} is in {shard} already")
                keys.add(key)
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
                sample = next(remaining, None)
        shards.append(shard)
    return shards


def _encoded(sample: Mapping[str, str | bytes]) -> tuple[str, dict[str, bytes]]:
    key = sample.get("__key__", "")
    name = key.rpartition("/")[2] if isinstance(key, str) else ""
    if not isinstance(key, str) or not name or "." in name:
        raise ValueError(f"a sample's __key__ must be a path without a dot in its file name, got {key!r}")
    files = {name: data.encode() if isinstance(data, str) else data for name, data in sample.items()}
    del files["__key__"]
    return key, files
