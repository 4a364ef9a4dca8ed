"""The files of a token cache: a data set encoded once by a tokenizer, for the training of priors.

    cache.json                  tokenizer, data, and numbers of samples (:class:`CacheInfo`)
    train-000000.safetensors    shards: samples of the training stream in order,
    val-000000.safetensors      and of the validation split in order

A shard is one safetensors file, written atomically, whose header gives its length. It contains ``tokens`` (count, h, w)
uint16, or uint32 for more than 65,536 codes, and depending on the cache's fields: ``segmentation`` (count, h, w) uint8,
the class ids on the token grid; ``label`` (count,) int32; ``caption`` (bytes,) uint8, concatenated UTF-8, with
``caption_ends`` (count,) int64. Files are memory-mapped: opening one reads its header and ``caption_ends``, a sample
one or two pages. Mapped files keep no file handles, since a cache may have more shards than a process may have handles.
"""

import dataclasses
import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from regvq_fast.data.samples import Field, Split
from regvq_fast.files import atomic_path
from regvq_fast.json_values import check_types, parse_json

INFO = "cache.json"
FORMAT = 1
REMEDY = ": run `regvq tokens` again, it makes damaged files anew"

_TYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_MAX_HEADER = 10**6
_MOST = 2**31


@dataclass(frozen=True)
class CacheInfo:
    """Contents of ``cache.json``."""

    tokenizer: str
    """Path of the tokenizer, as given."""
    tokenizer_sha256: str
    """Hash of its weights (:func:`regvq_fast.models.weights.weights_hash`)."""
    num_codes: int
    token_shape: tuple[int, int]
    """(h, w) of a sample's tokens."""
    image_size: int
    precision: str
    """Precision of the encoder: "fp32", or the type of mixed precision."""
    data: str | None
    """Path of the images; None: the embedded scenes."""
    seed: int
    crop: str
    flip: bool
    views: int
    """Epochs of the training stream in the cache."""
    train_images: int
    """Samples per epoch."""
    val_images: int
    fields: tuple[Field, ...]
    """Fields of the samples besides their tokens."""
    shard_samples: int
    """Samples per shard; a split's last shard may have fewer."""
    num_classes: int | None = None
    """Number of classes of the segmentation: the data set's, else one more than the largest id. None without
    segmentation, or if the cache is not complete."""
    label_names: tuple[str, ...] = ()
    """Names of the labels by id; empty without the field "label"."""
    complete: bool = False
    """True if all shards exist."""
    first_images: str | None = None
    """Fingerprint of the first images of both splits; None in caches of older versions."""
    format: int = FORMAT

    def check(self) -> None:
        """Raise ValueError for a field with another type or out of range."""
        check_types(type(self), vars(self))
        names = ("num_codes", "image_size", "train_images", "val_images", "views", "shard_samples")
        sizes = [(name, getattr(self, name)) for name in names] + [("token_shape", side) for side in self.token_shape]
        for name, value in sizes:
            if not 1 <= value < _MOST:
                raise ValueError(f"{name} is {value}, not from 1 to {_MOST - 1}")
        if self.num_classes is not None and not 1 <= self.num_classes <= 256:
            raise ValueError(f"num_classes is {self.num_classes}, not from 1 to 256")

    def samples(self, split: Split) -> int:
        """Return the number of samples in a split of the cache."""
        return self.val_images if split == "val" else self.views * self.train_images

    def num_shards(self, split: Split) -> int:
        """Return the number of shards of a split."""
        return math.ceil(self.samples(split) / self.shard_samples)

    def shard_range(self, split: Split, number: int) -> range:
        """Return the indices of a shard's samples."""
        return range(self.samples(split))[number * self.shard_samples : (number + 1) * self.shard_samples]

    def settings(self) -> dict[str, Any]:
        """Return the fields that must not change between runs that fill a cache: all but paths and results."""
        free = {"tokenizer", "num_classes", "complete"}
        if self.data is None:
            free |= {"crop", "flip"}  # no effect on scenes
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def write_info(folder: Path, info: CacheInfo) -> None:
    """Write ``cache.json`` atomically."""
    with atomic_path(folder / INFO) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> CacheInfo:
    """Return the contents of a cache's ``cache.json``.

    Raises:
        FileNotFoundError: no such folder, or no cache in it. NotADirectoryError: it is a file. ValueError: its
        ``cache.json`` is damaged or of another version.
    """
    path = folder / INFO
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give the folder of a token cache")
    if not path.is_file():
        what = f"{folder} has no {INFO}" if folder.is_dir() else f"no such folder: {folder}"
        raise FileNotFoundError(f"{what}; make a token cache with `regvq tokens`, whose --out is a new folder")
    try:
        values = parse_json(path.read_bytes())
        version = values["format"]
        if version == FORMAT:
            lists = {name: tuple(values.get(name, ())) for name in ("fields", "label_names")}
            info = CacheInfo(**(values | lists | {"token_shape": tuple(values["token_shape"])}))
            info.check()
            return info
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or not of a token cache ({error}): make the cache again") from None
    raise ValueError(f"{path} is of format {version!r}, this version reads {FORMAT}: make the cache again")


def shard_path(folder: Path, split: Split, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"{split}-{number:06d}.safetensors"


class Shard(NamedTuple):
    """Consecutive samples as arrays; memory-mapped by :func:`open_shard`."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """(count, h, w)"""
    segmentation: NDArray[np.uint8] | None
    """(count, h, w)"""
    label: NDArray[np.int32] | None
    """(count,)"""
    caption: NDArray[np.uint8] | None
    """(bytes,), UTF-8."""
    caption_ends: NDArray[np.int64] | None
    """(count,), end of each caption in ``caption``."""

    def caption_of(self, row: int) -> str:
        """Return the caption of a sample; requires captions."""
        assert self.caption is not None
        assert self.caption_ends is not None
        start = self.caption_ends[row - 1] if row else 0
        return self.caption[start : self.caption_ends[row]].tobytes().decode()


def token_type(num_codes: int) -> np.dtype[Any]:
    """Return the type of tokens in shards."""
    return np.dtype(np.uint16 if num_codes <= 2**16 else np.uint32)


def write_shard(
    path: Path,
    tokens: NDArray[np.uint16] | NDArray[np.uint32],
    segmentation: NDArray[np.uint8] | None,
    captions: Sequence[str] | None,
    labels: NDArray[np.int32] | None = None,
) -> None:
    """Write a shard atomically: tokens and segmentation (count, h, w), ``count`` captions, labels (count,)."""
    arrays: dict[str, NDArray[Any]] = {"tokens": tokens}
    if segmentation is not None:
        arrays["segmentation"] = segmentation
    if labels is not None:
        arrays["label"] = labels
    if captions is not None:
        encoded = [caption.encode() for caption in captions]
        arrays["caption"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays["caption_ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    with atomic_path(path) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        temporary.write_bytes(safetensors.numpy.save(contiguous))  # save_file would write it unreadable for other users


def open_shard(folder: Path, info: CacheInfo, split: Split, number: int) -> Shard:
    """Memory-map a shard, after checking its header and length.

    Raises:
        FileNotFoundError: the shard is missing.
        ValueError: it is truncated, damaged, of another cache, or has an empty caption; the message names it.
    """
    path = shard_path(folder, split, number)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _MAX_HEADER))
            content = _mapped(file, size)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: run `regvq tokens` again to add missing files") from None
    try:
        entries = {name: _Entry.parse(entry) for name, entry in parse_json(header).items() if name != "__metadata__"}
        starts, stops = zip(*sorted(entry.extent for entry in entries.values()), strict=True)
        if starts != (0, *stops[:-1]):
            raise ValueError("its arrays overlap")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file, or its header is damaged{REMEDY}") from None
    if size != (expected := 8 + length + stops[-1]):
        raise ValueError(f"{path} is truncated or damaged: it has {size:,} bytes instead of {expected:,}{REMEDY}")
    _check_entries(path, entries, _expected_entries(info, len(info.shard_range(split, number))))
    arrays = {name: entries[name].view(content[8 + length :]) if name in entries else None for name in Shard._fields}
    shard = Shard(**arrays)  # type: ignore[arg-type]
    if shard.caption is not None and shard.caption_ends is not None:
        if (shard.caption_ends <= np.append(0, shard.caption_ends[:-1])).any():  # a difference could overflow
            raise ValueError(f"{path} has an empty caption{REMEDY}")  # no text encoder takes it
        if shard.caption_ends[-1] != len(shard.caption):
            raise ValueError(f"{path} has {len(shard.caption):,} bytes of captions, unlike their offsets{REMEDY}")
    return shard


def _mapped(file: BinaryIO, size: int) -> NDArray[np.uint8]:
    """Return the bytes of an open file, memory-mapped and read-only.

    PyTorch's mapping closes its file handle; Python's keeps one while it lives. The handle's number is used, since
    PyTorch requires paths in UTF-8.
    """
    if not size:  # an empty file can't be mapped
        return np.empty(0, np.uint8)
    content: NDArray[np.uint8] = torch.from_file(f"/dev/fd/{file.fileno()}", False, size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    return content


class _Entry(NamedTuple):
    """The description of an array in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    extent: tuple[int, int]
    """First byte after the header, and the one after the last."""

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> "_Entry":
        """Parse a description; ValueError, KeyError, TypeError or AttributeError if it is invalid."""
        start, stop = map(operator.index, entry["data_offsets"])
        parsed = cls(entry["dtype"], [operator.index(side) for side in entry["shape"]], (start, stop))
        if min(parsed.shape) < 0 or stop - start != math.prod(parsed.shape) * _TYPES[parsed.dtype].itemsize:
            raise ValueError("the shape does not fit the bytes")
        return parsed

    def view(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        start, stop = self.extent
        return data[start:stop].view(_TYPES[self.dtype]).reshape(self.shape)


def _expected_entries(info: CacheInfo, count: int) -> dict[str, tuple[str, list[int] | None]]:
    """Return type and shape of each array of a shard of ``count`` samples; None: any."""
    expected: dict[str, tuple[str, list[int] | None]] = {
        "tokens": ("U16" if token_type(info.num_codes) == np.uint16 else "U32", [count, *info.token_shape])
    }
    if "label" in info.fields:
        expected["label"] = ("I32", [count])
    if "segmentation" in info.fields:
        expected["segmentation"] = ("U8", [count, *info.token_shape])
    if "caption" in info.fields:
        expected |= {"caption": ("U8", None), "caption_ends": ("I64", [count])}
    return expected


def _check_entries(
    path: Path, entries: Mapping[str, _Entry], expected: Mapping[str, tuple[str, list[int] | None]]
) -> None:
    fits = entries.keys() == expected.keys() and all(
        (entries[name].dtype, entries[name].shape) == (dtype, shape or entries[name].shape)
        for name, (dtype, shape) in expected.items()
    )
    if not fits:
        found = _listed({name: (entry.dtype, entry.shape) for name, entry in entries.items()})
        raise ValueError(f"{path} holds {found} where its cache has {_listed(expected)}{REMEDY}")


def _listed(entries: Mapping[str, tuple[str, list[int] | None]]) -> str:
    return ", ".join(
        f"{name} {dtype} {'' if shape is None else shape}".strip() for name, (dtype, shape) in entries.items()
    )
