"""A Hugging Face data set that is streamed from the hub instead of downloaded."""

import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import get_worker_info

from regvq_fast.console import warn_once
from regvq_fast.data.huggingface.columns import file_of, find_fields, require_column, without_decoding
from regvq_fast.data.huggingface.source import explained, find_split, is_stream, open_splits, parse_source
from regvq_fast.data.image_dataset import FieldCounts, Provenance, SplitSettings
from regvq_fast.data.image_files import CROP, HOLD_OUT, RESIZE, ImageFileDataset
from regvq_fast.data.reading import is_of_the_machine, why_unreadable
from regvq_fast.data.samples import Field, Part, Sample, check_index
from regvq_fast.ranks import rank, world_size

logger = logging.getLogger("regvq_fast")

BUFFER = 1000
"""Size of a process's shuffle buffer in rows; the files that it reads are shuffled, too."""
MOST_UNREADABLE = 1000
"""Number of consecutive unreadable images after which a process raises an error."""


class HuggingFaceStream(ImageFileDataset):
    """The rows of ``hf:...?stream`` as they arrive, as square uint8 RGB images.

    For data that don't fit on the disk. Unlike in other data sets, training samples are not a function of (seed,
    index); only crop, flip and the choice of a caption are, given the image. Each process (a worker, or a rank without
    workers) reads its own files; if there are fewer files than processes, all read every file and serve different
    rows. A process shuffles within a buffer of 1000 rows, and begins another pass after the last row. Therefore

    - the order depends on the numbers of ranks and workers;
    - an epoch is a number of samples, in which images may be repeated or missing;
    - a resumed run begins the pass of its epoch anew.

    Validation samples are exact: they are read once, at the start, and kept in memory as encoded files.

    Columns and splits are found as in :class:`HuggingFaceImages`. Without a validation split, about 5 % of the images
    are held out by a hash of their bytes, and the first ``limit`` of them are used; this reads about 20 ``limit``
    rows. Labels must be class labels, whose names are known beforehand. Rows without the fields are left out silently;
    unreadable images cause warnings, but are not counted.

    Args:
        source: see :mod:`regvq_fast.data.huggingface.source`. ``length=N`` is the number of training images, if the
            data set does not state it.
        split, image_size, crop, flip, seed, limit, fields: see
            :class:`~regvq_fast.data.image_files.ImageFileDataset`.

    Raises:
        ValueError: an unknown length, or labels that are not class labels; otherwise as :class:`HuggingFaceImages`.
    """

    def _find(self) -> None:
        self._parsed = parsed = parse_source(self.source)
        splits = open_splits(parsed)
        name, self._is_own = find_split(parsed, splits, self.split)
        stream = splits[name]
        self._features = features = stream.features
        if features is None:
            raise ValueError(f"{self.source} does not list its columns and can't be streamed: leave out stream")
        parts: tuple[Part, ...] = ("image", *sorted(self.fields))
        self._columns = {part: require_column(parsed, features, part) for part in parts}
        if "label" in self.fields:
            self.label_names = tuple(features[self._columns["label"]].names)
        self._stream = without_decoding(stream, self._columns).select_columns(sorted(set(self._columns.values())))
        self._reader: tuple[int, Iterator[Mapping[str, Any]]] | None = None
        if self.split == "val":
            self._take(list(islice(filter(self._serves, self._each_row(self._stream)), self.limit)))
            if not self._rows:
                raise ValueError(f"no image of {self.source} ({name}) is a validation image with the fields")
            self._start(len(self._rows))
            return
        stated = (stream.info.splits or {}).get(name)
        length = int(parsed.options.get("length", 0)) or (stated.num_examples if stated else 0)
        if not length:
            raise ValueError(
                f"{self.source} does not state its number of images: append &length=N, the images per epoch"
            )
        self._length = length if self._is_own else max(round(length * (1 - HOLD_OUT)), 1)
        self.unreadable_flags = torch.zeros(0, dtype=torch.bool)  # images have no index to flag
        warn_once(
            f"{self.source} is streamed: the order of its images depends on --workers and the number of ranks, an "
            "epoch may miss or repeat images, and a resumed run does not continue where it stopped in the data"
        )

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> FieldCounts:
        """Count a field for all images if it has a column, since rows without a value are left out."""
        stream = cls.open(data, SplitSettings("train", image_size=1))
        return FieldCounts(len(stream), stream._having())

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None and is_stream(data)

    def __len__(self) -> int:
        """Return the number of samples of an epoch in training, or of validation images."""
        return self._length if self.split == "train" else len(self._rows)

    def provenance(self) -> Provenance:
        return Provenance(self.source, CROP, RESIZE, " ".join(sorted(self.fields)))

    def __getitem__(self, index: int) -> Sample:
        if self.split == "val":
            return super().__getitem__(index)
        check_index(index, len(self), self.split)
        for _ in range(MOST_UNREADABLE):
            self._take([self._next(index // len(self))])
            try:
                return self._load(0, index)
            except Exception as error:  # as in reading a folder
                if is_of_the_machine(error):
                    raise
                logger.warning("skipped unreadable image %s (%s)", self._name(0), why_unreadable(error))
        raise ValueError(
            f"{MOST_UNREADABLE} images of {self.source} in a row can't be read: check its column of images"
        )

    def _each_row(self, stream: Any) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a stream, as batches of one: plain iteration would divide them among workers again."""
        try:
            for batch in stream.iter(batch_size=1):
                yield {column: values[0] for column, values in batch.items()}
        except Exception as error:  # of datasets, the hub or Arrow
            if is_of_the_machine(error):
                raise
            raise explained(error, self._parsed) from None

    def _take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the rows of the next samples: all of validation, or one of training."""
        self._rows = rows
        if "label" in self.fields:
            self._labels = np.array([row[self._columns["label"]] for row in rows], dtype=np.int32)

    def _read(self, position: int, part: Part) -> bytes:
        return file_of(self._rows[position][self._columns[part]], part)

    def _name(self, position: int) -> str:
        image = self._rows[position][self._columns["image"]]
        path = image["path"] if isinstance(image, dict) else None
        return f"{path or 'without a name'} of {self.source}"

    def _files(self) -> Sequence[str]:
        return ()

    def _having(self) -> dict[Field, int]:
        columns = find_fields(self._parsed, self._features)
        return {field: len(self) if field in columns else 0 for field in get_args(Field)}

    def _serves(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row belongs to this split and has the fields."""
        label = row[self._columns["label"]] if "label" in self.fields else 0
        if "label" in self.fields and label is not None and label >= len(self.label_names):
            raise ValueError(
                f"{self.source} has a label {label} and only {len(self.label_names)} names of classes: write it anew"
            )
        if label is None or label < 0 or any(row[column] in (None, "", []) for column in self._columns.values()):
            return False
        if self._is_own:
            return True
        try:
            held_out = zlib.crc32(file_of(row[self._columns["image"]], "image")) < HOLD_OUT * 2**32
        except Exception as error:
            if is_of_the_machine(error):
                raise
            held_out = False  # training reports it
        return held_out == (self.split == "val")

    def _next(self, epoch: int) -> Mapping[str, Any]:
        """Return the next row of this process; the first one is of the pass ``epoch``."""
        if self._reader is None or self._reader[0] != os.getpid():  # a forked worker must not use its parent's reader
            self._reader = os.getpid(), self._passes(epoch)
        return next(self._reader[1])

    def _passes(self, epoch: int) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of this process, pass after pass."""
        import fsspec
        from datasets.distributed import split_dataset_by_node

        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        processes, process = world_size() * workers, rank() * workers + number
        fsspec.asyn.reset_lock()  # a fork may have copied it locked
        if self._stream.num_shards >= processes:
            stream = self._stream.shard(processes, process, contiguous=False)
        else:
            stream = split_dataset_by_node(self._stream, process, processes)
        stream = stream.shuffle(seed=self.seed, buffer_size=BUFFER)
        while True:
            stream.set_epoch(epoch)
            served = 0
            for row in filter(self._serves, self._each_row(stream)):
                served += 1
                yield row
            if not served:
                raise ValueError(
                    f"{self.source} has too few images with the fields for {processes} processes, of all ranks and "
                    "workers: give a smaller --workers"
                )
            epoch += 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}  # an iterator can't be pickled, and each process needs its own
