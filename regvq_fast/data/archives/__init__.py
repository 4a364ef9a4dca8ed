"""The paper's data sets in their official archives' own layouts: a module each, one for what they share."""

import os
from collections.abc import Sequence

from regvq_fast.console import warn_once
from regvq_fast.data.archives.ade20k import ADE20K
from regvq_fast.data.archives.base import Archive, ArchiveName
from regvq_fast.data.archives.celebahq import CelebAHQ
from regvq_fast.data.archives.coco import COCO
from regvq_fast.data.archives.cub200 import CUB200
from regvq_fast.data.archives.dataset import ArchiveDataset

ARCHIVES: dict[ArchiveName, type[Archive]] = {archive.name: archive for archive in (ADE20K, CelebAHQ, CUB200, COCO)}
"""By the names that presets have."""


def find_archive(root: str | os.PathLike[str], name: ArchiveName | None = None) -> Archive | None:
    """The official archive in a folder: its top folder, its folder of images, or the one that holds its top folder.
    None: there is none.

    A folder that is a top folder itself stands for that archive, whatever lies in it; a warning names the others.

    Args:
        root: the folder; what isn't one holds no archive.
        name: look for this one only.

    Raises:
        ValueError: there are several.
    """
    kinds = list(ARCHIVES.values()) if name is None else [ARCHIVES[name]]
    here: list[Archive] = [archive for kind in kinds if (archive := kind.at(root)) is not None]
    below: list[Archive] = [archive for kind in kinds for archive in kind.within(root)]
    found = here or below
    if len(found) > 1:
        hint = " (train/data.py: or give --dataset)" if len({archive.name for archive in found}) > 1 else ""
        raise ValueError(f"{root} holds {_told(found)}: name the top folder of one{hint}")
    if here and below:
        warn_once(f"{here[0].label} is taken, not {_told(below)} in it: name the top folder of the one you mean")
    return found[0] if found else None


def _told(archives: Sequence[Archive]) -> str:
    return " and ".join(f"{archive.name} ({archive.top})" for archive in archives)


__all__ = ["ARCHIVES", "Archive", "ArchiveDataset", "ArchiveName", "find_archive"]
