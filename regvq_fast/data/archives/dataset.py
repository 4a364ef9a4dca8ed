"""The pictures of an official archive as a data set."""

import logging
from collections.abc import Collection

import numpy as np

from regvq_fast.data.archives.base import Archive
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.manifest import mirrored_ids
from regvq_fast.data.pictures import Crop, Field, Part, PictureDataset
from regvq_fast.data.samples import Split

logger = logging.getLogger("regvq_fast")


class ArchiveDataset(PictureDataset):
    """An official split of one of the paper's data sets, as square uint8 RGB pictures.

    Everything is as in :class:`~regvq_fast.data.folder.ImageFolder`, but for what the archive knows better: which
    pictures are for training, where captions and maps lie, and which class ids change places in a mirrored picture.

    Args:
        archive: as ``find_archive`` found it.
        split: "train", or "val" for the official split that papers report on (``archive.served``).
        image_size, crop, flip, seed, limit, fields: as of ``ImageFolder``.

    Raises:
        FileNotFoundError: a list or all files of the split are missing, or none has the fields.
        ValueError: the archive has no such field, a damaged list, and what ``ImageFolder`` raises.
    """

    def __init__(
        self,
        archive: Archive,
        split: Split = "train",
        image_size: int = 256,
        crop: Crop = "random-resized",
        flip: bool = True,
        seed: int = 0,
        limit: int | None = None,
        fields: Collection[Field] = (),
    ) -> None:
        super().__init__(archive.top, split, image_size, crop, flip, seed, limit, fields)
        self.archive = archive
        self.num_classes = len(archive.classes) or None
        self._maps_fit = archive.maps_fit
        self._mirrored_ids = mirrored_ids(archive.mirror_pairs)
        for field in sorted(self.fields.difference(archive.fields)):
            raise ValueError(f"{archive.title} has no {field}; it has image{''.join(f', {f}' for f in archive.fields)}")
        files = SplitFiles(archive, archive.served[split], self.fields)
        files.require()
        if files.missing:
            logger.warning("%s", files.missing_told())
        complete = self._complete(list(files.has.values()), len(files.names))
        # An array: worker processes share its memory, where each would come to have a copy of a list.
        self.names = np.array(files.names)[complete][self._choose(None, len(complete))]
        self._start(len(self.names))

    @property
    def label(self) -> str:
        return f"{self.archive.label} ({self.archive.served[self.split]})"

    def _read(self, position: int, part: Part) -> bytes:
        return self.archive.read(str(self.names[position]), part)

    def _name(self, position: int) -> str:
        return self.archive.path(str(self.names[position]), "image")
