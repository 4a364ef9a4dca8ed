"""Finding the official archive in a folder."""

import os
from collections.abc import Sequence

from regvq_fast.console import warn_once
from regvq_fast.data.archives.ade20k import ADE20K
from regvq_fast.data.archives.archive import Archive, ArchiveName
from regvq_fast.data.archives.celebahq import CelebAHQ
from regvq_fast.data.archives.coco import COCO
from regvq_fast.data.archives.cub200 import CUB200
from regvq_fast.data.archives.imagenet import ImageNet

ARCHIVES: dict[ArchiveName, type[Archive]] = {
    archive.name: archive for archive in (ADE20K, CelebAHQ, CUB200, COCO, ImageNet)
}
"""Archives by the name of their preset."""


def holds_archive(root: str | os.PathLike[str]) -> bool:
    """Return whether :func:`find_archive` finds an archive in a folder, or raises because it finds several."""
    return any(kind.at(root) is not None or kind.within(root) for kind in ARCHIVES.values())


def find_archive(root: str | os.PathLike[str], name: ArchiveName | None = None) -> Archive | None:
    """Return the official archive whose top folder or folder of images is ``root``, or whose top folder is in it.

    If ``root`` is a top folder, other archives in it are ignored with a warning. None if there is no archive.

    Args:
        root: the folder; a file or a missing path has no archive.
        name: find only this archive.

    Raises:
        ValueError: there are several.
    """
    kinds = list(ARCHIVES.values()) if name is None else [ARCHIVES[name]]
    here: list[Archive] = [archive for kind in kinds if (archive := kind.at(root)) is not None]
    below: list[Archive] = [archive for kind in kinds for archive in kind.within(root)]
    found = here or below
    if len(found) > 1:
        hint = " (`regvq data`: or give --dataset)" if len({archive.name for archive in found}) > 1 else ""
        raise ValueError(f"{root} holds {_listed(found)}: name the top folder of one{hint}")
    if here and below:
        warn_once(f"{here[0].heading} is taken, not {_listed(below)} in it: name the top folder of the one you mean")
    return found[0] if found else None


def _listed(archives: Sequence[Archive]) -> str:
    return " and ".join(f"{archive.name} ({archive.top})" for archive in archives)
