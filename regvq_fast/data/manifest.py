"""The manifest of a folder of prepared shards, ``regvq-data.json``."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regvq_fast.files import atomic_path
from regvq_fast.json_values import check_types, parse_json

MANIFEST = "regvq-data.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Contents of ``regvq-data.json``, beside the shards of ``regvq data prepare``."""

    dataset: str
    title: str
    source: str
    """Folder of the archive."""
    size: int
    """Shorter side in pixels."""
    quality: int
    """JPEG quality."""
    splits: Mapping[str, Mapping[str, Any]]
    """For "train" and "val": the official split, and numbers of images, captions, maps and shards."""
    classes: Sequence[str] = ()
    """Names of the class ids, from 0 on."""
    label_names: Sequence[str] = ()
    """Names of the labels in the shards, from 0 on."""
    mirror_pairs: Sequence[tuple[int, int]] = ()
    """Pairs of class ids to exchange in mirrored images."""
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``regvq-data.json`` atomically."""
    with atomic_path(folder / MANIFEST) as temporary:
        text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_manifest(source: str | os.PathLike[str]) -> Manifest | None:
    """Return the manifest of a folder of shards, given the folder, a shard or a pattern; None if there is none.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_bytes())
        version = values["format"]
        if version == FORMAT:
            manifest = Manifest(**(values | {"mirror_pairs": tuple(map(tuple, values["mirror_pairs"]))}))
            check_types(Manifest, vars(manifest))
            if not all(0 <= label < 256 for pair in manifest.mirror_pairs for label in pair):
                raise ValueError("mirror_pairs are of class ids from 0 to 255")
            return manifest
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the shards anew") from None
    raise ValueError(f"{path} is of format {version!r}, this version reads {FORMAT}: prepare the shards anew")


def mirrored_ids(pairs: Sequence[tuple[int, int]]) -> NDArray[np.uint8] | None:
    """Return the class ids (256,) in mirrored images by class id; None if none changes."""
    if not pairs:
        return None
    ids = np.arange(256, dtype=np.uint8)
    for left, right in pairs:
        ids[left], ids[right] = right, left
    return ids
