"""The paper's data sets in their official archives' own layouts: a module each, one for what they share."""

import os

from regvq_fast.data.archives.ade20k import ADE20K
from regvq_fast.data.archives.base import Archive, ArchiveName
from regvq_fast.data.archives.celebahq import CelebAHQ
from regvq_fast.data.archives.coco import COCO
from regvq_fast.data.archives.cub200 import CUB200
from regvq_fast.data.archives.dataset import ArchiveDataset

ARCHIVES: dict[ArchiveName, type[Archive]] = {archive.name: archive for archive in (ADE20K, CelebAHQ, CUB200, COCO)}
"""By the names that presets have."""


def find_archive(root: str | os.PathLike[str], name: ArchiveName | None = None) -> Archive | None:
    """The official archive in a folder: its top folder, or the one that holds that. None: there is none.

    Args:
        root: the folder; what isn't one holds no archive.
        name: look for this one only.
    """
    kinds = ARCHIVES.values() if name is None else [ARCHIVES[name]]
    return next(filter(None, (kind.find(root) for kind in kinds)), None)


__all__ = ["ARCHIVES", "Archive", "ArchiveDataset", "ArchiveName", "find_archive"]
