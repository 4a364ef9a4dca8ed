"""Names of Hugging Face data sets in ``--data``, and their opening.

    hf:ORGANIZATION/NAME[@REVISION][?KEY=VALUE&KEY=VALUE...]      a data set on the hub
    hf:PATH[?...]                                                 a local folder or parquet file

A folder written by ``save_to_disk``, a folder of parquet files and a parquet file are also recognized without "hf:".
"""

import os
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qsl

from regvq_fast.data.finding import holds_parquet
from regvq_fast.data.reading import is_of_the_machine
from regvq_fast.data.samples import Field, Split
from regvq_fast.invocation import install
from regvq_fast.models.hub import HUB, LOG_IN, hub_name

PREFIX = "hf:"
KEYS = ("config", "image", *get_args(Field), *get_args(Split), "stream", "length")
"""Keys after the "?": a configuration, the column of each part, the name of each split, and keys of streams."""

_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "test")}
"""Usual names of the splits; the first that exists is used."""


class Source(NamedTuple):
    """A data set that ``--data`` names."""

    text: str
    """The name as it was given."""
    path: str
    """ORGANIZATION/NAME on the hub, or an absolute local path."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None: the main branch."""
    options: Mapping[str, str] = {}
    """Values by key."""

    @property
    def is_local(self) -> bool:
        """True for a path on this machine."""
        return os.path.isabs(self.path)


def is_source(data: str | os.PathLike[str]) -> bool:
    """Return whether ``--data`` names a Hugging Face data set."""
    return os.fspath(data).startswith(PREFIX) or _is_saved(data) or holds_parquet(data)


def is_stream(data: str | os.PathLike[str]) -> bool:
    """Return whether ``--data`` names a Hugging Face data set to stream."""
    name, _, query = os.fspath(data).partition("?")
    return name.startswith(PREFIX) and "stream" in dict(parse_qsl(query, keep_blank_values=True))


def parse_source(data: str | os.PathLike[str]) -> Source:
    """Return the data set that ``--data`` names.

    Raises:
        ValueError: an unknown key, a key without a value, or a length that is not a positive integer.
        FileNotFoundError: neither a local path nor a name on the hub.
    """
    text = os.fspath(data)
    if not text.startswith(PREFIX):
        return Source(text, os.path.abspath(text))
    name, _, query = text.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in KEYS:
            raise ValueError(f"{text} has the unknown key {key!r}; keys are {', '.join(KEYS)}")
        if not value and key != "stream":
            raise ValueError(f"{text} has no value for {key}: write {key}=...")
    length = options.get("length", "1")
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"length must be an integer of at least 1, got {length!r} in {text}")
    if os.path.exists(name):
        return Source(text, os.path.abspath(name), None, options)
    found = hub_name(name)
    if found is None:
        raise FileNotFoundError(
            f"no such folder: {name}; nor is it a name on {HUB}, which would be hf:ORGANIZATION/NAME or "
            "hf:ORGANIZATION/NAME@REVISION"
        )
    return Source(text, found.repo, found.revision, options)


def open_splits(source: Source) -> Mapping[str, Any]:
    """Open all splits of a data set by name; unless streamed, they are downloaded and prepared on first use.

    Raises:
        FileNotFoundError: no such data set, revision or data file. PermissionError: the hub refuses access.
        OSError: the hub can't be reached, and the data set is not cached.
        ValueError: ``datasets`` is not installed, a configuration must be chosen, or the files can't be read.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"to read {source.text}, install datasets: {install('hf')}") from None
    streaming = "stream" in source.options
    saved = source.is_local and _is_saved(source.path)
    if saved and streaming:
        raise ValueError(f"{source.text} is already on this disk: leave out stream")
    try:
        if saved:
            opened = datasets.load_from_disk(source.path)
        elif os.path.isfile(source.path):
            opened = datasets.load_dataset("parquet", data_files=source.path, streaming=streaming)
        else:
            config = source.options.get("config")
            opened = datasets.load_dataset(source.path, config, revision=source.revision, streaming=streaming)
    except Exception as error:  # of datasets, the hub or Arrow
        if is_of_the_machine(error):
            raise
        raise explained(error, source) from None
    return opened if isinstance(opened, dict) else {"train": opened}


def find_split(source: Source, names: Collection[str], split: Split) -> tuple[str, bool]:
    """Return the name of the split that serves ``split``, and whether it serves only that.

    Otherwise training and validation divide it.

    Raises:
        ValueError: a split named in the source is missing, or there is none for training.
    """
    listed = ", ".join(map(repr, names))
    found: dict[str, str | None] = {}
    for part, usual in _SPLITS.items():
        stated = source.options.get(part)
        if stated is not None and stated not in names:
            raise ValueError(f"{source.text} has no split {stated!r}; its splits are {listed}")
        found[part] = stated or next((name for name in usual if name in names), None)
    if all(found.values()) and found["train"] != found["val"]:
        return str(found[split]), True
    only = next(iter(names)) if len(names) == 1 else None
    shared = found["train"] or only
    if shared is None:
        raise ValueError(f"{source.text} has no split 'train'; its splits are {listed}: name one as ?train=SPLIT")
    return shared, False


def explained(error: Exception, source: Source) -> Exception:
    """Return an error with one sentence for an error in opening or reading a data set."""
    reason = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "DatasetNotFoundError":
        if "gated" in reason:
            return PermissionError(f"{source.path} on {HUB} is gated: ask for access on its page there, then {LOG_IN}")
        if reason.startswith("Revision"):
            return FileNotFoundError(
                f"{source.path} on {HUB} has no revision {source.revision!r}: give one of its branches, tags or commits"
            )
        return FileNotFoundError(
            f"{source.path} is neither a folder here nor a data set on {HUB} that you may read: check the spelling; if "
            f"it is private, {LOG_IN}"
        )
    if not source.is_local and (isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason):
        return OSError(
            f"{source.path} is neither a folder here nor in the cache of {HUB}, which can't be reached or is switched "
            "off by HF_HUB_OFFLINE: check the path, or load it once with a network"
        )
    if isinstance(error, ValueError) and "onfig" in reason:  # none of several is chosen, or a missing one
        names = reason[reason.find("[") + 1 : reason.find("]")].replace("'", "")
        return ValueError(f"{source.text} has the configurations {names}: choose one as ?config=NAME")
    kept: type[Exception] = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kept(f"{source.text} can't be read as a data set of images: {textwrap.shorten(reason, 200)} ({kind})")


def _is_saved(path: str | os.PathLike[str]) -> bool:
    """Return whether ``save_to_disk`` of a Dataset or a DatasetDict wrote this folder."""
    folder = Path(path)
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )
