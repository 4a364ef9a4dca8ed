"""The images of an official archive as a data set."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from regvq_fast.console import warn_once
from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.archives.lookup import find_archive, holds_archive
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.image_files import ImageFileDataset
from regvq_fast.data.manifest import mirrored_ids
from regvq_fast.data.samples import Field, Part


class ArchiveDataset(ImageFileDataset):
    """An official split of one of the paper's data sets, as square uint8 RGB images.

    Like :class:`~regvq_fast.data.folder.ImageFolder`, but the archive defines the splits, the files of captions and
    maps, and the class ids to exchange in mirrored images.

    Args:
        archive: result of ``find_archive``.
        settings: split, image_size, crop, flip, seed, limit, fields, as of
            :class:`~regvq_fast.data.image_files.ImageFileDataset`. The split "val" is the official one that papers
            report on (``archive.served``).

    Raises:
        FileNotFoundError: a list or all files of the split are missing, or none has the fields.
        ValueError: the archive has no such field, a damaged list, and what ``ImageFileDataset`` raises.
    """

    def __init__(self, archive: Archive, *settings: Any, **named: Any) -> None:
        self.archive = archive
        super().__init__(archive.top, *settings, **named)

    def _find(self) -> None:
        archive = self.archive
        self.num_classes = len(archive.classes) or None
        self._maps_fit = archive.maps_fit
        self._mirrored_ids = mirrored_ids(archive.mirror_pairs)
        for field in sorted(self.fields.difference(archive.fields)):
            raise ValueError(f"{archive.title} has no {field}; it has image{''.join(f', {f}' for f in archive.fields)}")
        files = SplitFiles(archive, archive.served[self.split], self.fields)
        files.require()
        if files.missing:
            warn_once(files.missing_note())
        complete = self._complete(list(files.has.values()), len(files.names))
        # An array, whose memory worker processes share; each would copy a list.
        self.names = np.array(files.names)[complete][self._choose(None, len(complete))]
        if "label" in self.fields:
            self.label_names, self._labels = archive.label_names, archive.labels(self.names.tolist())
        self._start(len(self.names))

    def _having(self) -> dict[Field, int]:
        names = self.names.tolist()
        return {field: int(np.count_nonzero(self.archive.has(field, names))) for field in self.archive.fields}

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None and holds_archive(data)

    @classmethod
    def _source(cls, data: str | os.PathLike[str] | None) -> Archive | None:
        return None if data is None else find_archive(data)

    @property
    def title(self) -> str:
        return f"{self.archive.heading} ({self.archive.served[self.split]})"

    def _read(self, position: int, part: Part) -> bytes:
        return self.archive.read(str(self.names[position]), part)

    def _name(self, position: int) -> str:
        return self.archive.path(str(self.names[position]), "image")

    def _files(self) -> Iterable[str]:
        return map(self._name, range(len(self.names)))
