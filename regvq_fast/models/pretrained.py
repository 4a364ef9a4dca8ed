"""Self-describing folders of weights, written completely or not at all.

    config.json         {"architecture": ...}: arguments of the model and its quantizer
    model.safetensors   tensors by name
    manifest.json       size and SHA-256 of every other file

A checkpoint of a run is such a folder with the state of training in it (`regvq_fast.training.checkpoint`). Files are
compared with the manifest before they are parsed, and nothing is unpickled.
"""

import errno
import hashlib
import json
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from regvq_fast.files import temporary_path
from regvq_fast.json_values import parse_json
from regvq_fast.quantizers import QUANTIZERS, Quantizer
from regvq_fast.version import __version__

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
CHECKPOINTS = "checkpoints"  # folder in a run's folder
TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a prior's run, so that sampling needs only the run."""

_LARGEST_JSON = 16 * 2**20
"""Most bytes of a config.json or manifest.json; parsed JSON takes ten times as much memory."""

Part = TypeVar("Part")
Content = TypeVar("Content", bytes, memoryview, bytes | memoryview)

Entry = Mapping[str, Any]
"""Size and checksum of a file in a manifest."""

_STEP_FOLDER = re.compile(r"step-(\d{7,})")


def step_folders(run: Path) -> dict[int, Path]:
    """Return the checkpoints in a run's folder by step, oldest first."""
    folder = run / CHECKPOINTS
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def tokenizer_folder(prior: Path) -> Path:
    """Return the folder of a prior's tokenizer: inside the prior's folder, or beside it if several priors share it."""
    own, shared = prior / TOKENIZER, prior.parent / TOKENIZER
    return shared if shared.is_dir() and not own.exists() else own


def write_folder(
    folder: Path, files: Mapping[str, bytes | memoryview], written: Mapping[Path, Entry] | None = None
) -> None:
    """Write files and their manifest to a folder, durably and atomically.

    Files are written to a temporary folder beside ``folder``, which replaces it at the end: a full disk or a kill
    leaves no partial folder. An existing folder with a manifest is replaced.

    Args:
        folder: see above.
        files: contents by name.
        written: files to be moved into the folder, with the entries that :func:`write_file` returned.

    Raises:
        ValueError: ``folder`` exists and is not a folder with a manifest.
        OSError: it can't be written; ``folder`` is left as it was.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a folder of weights: name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = temporary_path(folder), temporary_path(folder)
    try:
        temporary.mkdir()
        entries = {path.name: entry for path, entry in (written or {}).items()}
        for path in written or ():
            path.rename(temporary / path.name)
        for name, content in with_manifest(files, entries).items():
            _write(temporary / name, content)
        _sync(temporary)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def with_manifest(
    files: Mapping[str, Content], others: Mapping[str, Entry] | None = None
) -> dict[str, Content | bytes]:
    """Return files by name with a manifest of their sizes and checksums, and of ``others``."""
    entries = {name: _entry(content) for name, content in files.items()}
    return {**files, MANIFEST: to_json({"files": entries | dict(others or {})})}


def write_file(path: Path, content: bytes | memoryview) -> Entry:
    """Write a file for :func:`write_folder` to move into its folder; return its entry for the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content)
    return _entry(content)


def _entry(content: bytes | memoryview) -> Entry:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of files in a folder of :func:`write_folder`.

    Raises:
        ValueError: a file is missing, truncated or not the one that was written; one sentence.
    """
    check_files(folder, names)
    return {name: _read(folder / name) for name in names}


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Check files as :func:`read_folder`, without reading one into memory."""
    entries = read_manifest(folder)
    for name in names:
        path = folder / name
        try:
            size, sha256 = operator.index(entries[name]["bytes"]), str(entries[name]["sha256"])
        except (KeyError, TypeError):
            raise _damaged(folder) from None
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        found = path.stat().st_size
        if found < size:
            raise ValueError(f"{path} is truncated: {found:,} of {size:,} bytes are there")
        with path.open("rb") as file:
            if found > size or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(f"{path} was changed: its SHA-256 is not the one in {MANIFEST}")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries of a folder's files; ValueError if its manifest is missing or damaged."""
    try:
        return dict(parse_json(_read(folder / MANIFEST))["files"])
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a checkpoint or is incomplete") from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(folder) from None


def _damaged(folder: Path) -> ValueError:
    return ValueError(f"{folder / MANIFEST} is damaged, or not the manifest of a checkpoint")


def read_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return architecture and weights from a folder of weights or a run: its final model, else its newest checkpoint.

    Raises:
        FileNotFoundError: no such folder, or neither weights nor checkpoints in it. NotADirectoryError: it is a file.
        ValueError: a file is damaged or of another format.
    """
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file: give its folder, {folder.parent}, or VQGAN.from_taming a file of taming-transformers"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; give a run or a folder of save_pretrained")
    if not (folder / WEIGHTS).exists():
        checkpoints = list(step_folders(folder).values())
        if not checkpoints:
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {CHECKPOINTS}/: it is not a run or checkpoint")
        folder = checkpoints[-1]
    if (folder / MANIFEST).exists():
        contents = read_folder(folder, (CONFIG, WEIGHTS))
    else:  # final weights of a run have no manifest, but were renamed when complete
        contents = {name: _read(folder / name) for name in (CONFIG, WEIGHTS)}
    try:
        architecture = dict(parse_json(contents[CONFIG])["architecture"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / CONFIG} does not describe a model: it has no valid 'architecture'") from None
    return architecture, weights_from_bytes(contents[WEIGHTS], folder / WEIGHTS)


def pretrained_files(architecture: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a folder for :func:`read_pretrained`."""
    config = {"architecture": architecture, "versions": {"regvq_fast": __version__}}
    return {CONFIG: to_json(config), WEIGHTS: weights_to_bytes(weights)}


def weights_to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Return tensors by name as the bytes of a safetensors file."""
    return safetensors.torch.save({name: value.detach().contiguous() for name, value in weights.items()})


def weights_from_bytes(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; ValueError with ``path`` if it is none or damaged."""
    with _readable(path):
        return safetensors.torch.load(content)


def weights_from_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU, memory-mapped; ValueError if it is none or damaged."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # safetensors opens no such path
        return weights_from_bytes(path.read_bytes(), path)
    with _readable(path):
        return safetensors.torch.load_file(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ValueError(f"{path} is not a safetensors file, or damaged ({error})") from None


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return indented JSON with a final newline; other values, such as paths, become strings."""
    return (json.dumps(value, indent=2, default=str, allow_nan=False) + "\n").encode()


def restore(what: str, kinds: Mapping[str, type[Part]], description: Mapping[str, Any]) -> Part:
    """Build a part of a model, with new weights, from the name of its class ("type") and its constructor's arguments.

    Args:
        what: name of the part, for errors.
        kinds: allowed classes by name.
        description: plain values.

    Raises:
        ValueError: none of these classes, or arguments unknown to this version. Otherwise as the class.
    """
    arguments = dict(description)
    kind = arguments.pop("type", None)
    if kind not in kinds:
        raise ValueError(f"{what} {kind!r} must be one of {', '.join(kinds)}")
    try:
        return kinds[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"the description of {kind} doesn't fit this version: {error}") from None


def describe_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """Return the description of a quantizer, plain values without weights, for :func:`restore_quantizer`.

    Raises:
        ValueError: its class is not in `QUANTIZERS`.
    """
    if type(quantizer) not in QUANTIZERS.values():
        raise ValueError(f"only quantizers in QUANTIZERS can be described in {CONFIG}, not {type(quantizer)}")
    return {"type": type(quantizer).__name__, **quantizer.arguments()}


def restore_quantizer(description: Mapping[str, Any]) -> Quantizer:
    """Build the quantizer of a description by :func:`describe_quantizer`, with new weights.

    Raises:
        ValueError: an invalid description.
    """
    return restore("quantizer", {cls.__name__: cls for cls in QUANTIZERS.values()}, description)


def _read(path: Path) -> bytes:
    """Return a file's content; FileNotFoundError for a pipe or device, ValueError for a JSON file that is too large."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no file")
    size = path.stat().st_size
    if path.suffix == ".json" and size > _LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {_LARGEST_JSON:,} for JSON")
    try:
        return path.read_bytes()
    except MemoryError:
        raise ValueError(f"{path} has {size:,} bytes, more than the memory holds") from None


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # unsupported by some network file systems
            raise
    finally:
        os.close(descriptor)
