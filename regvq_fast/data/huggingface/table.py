"""A Hugging Face data set on this machine, with random access."""

import os
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.huggingface.columns import (
    file_of,
    find_fields,
    has_text,
    read_labels,
    require_column,
    without_decoding,
)
from regvq_fast.data.huggingface.source import find_split, is_source, open_splits, parse_source
from regvq_fast.data.image_dataset import Provenance
from regvq_fast.data.image_files import CROP, RESIZE, ImageFileDataset
from regvq_fast.data.samples import Field, Part, Split


class HuggingFaceImages(ImageFileDataset):
    """The rows of a data set of the library ``datasets``, as square uint8 RGB images.

    As in :class:`~regvq_fast.data.folder.ImageFolder`, images are decoded here, from the bytes or the path in a row:
    crops, orientation and the handling of unreadable images are the same. ``datasets`` downloads a data set from the
    hub into Arrow files in its cache. They are memory-mapped: memory is 9 bytes per image and 4 per label, and worker
    processes get file names, not contents.

    Columns are found by type and usual name (:data:`~regvq_fast.data.huggingface.columns.NAMES`) or stated:
    ``hf:ORGANIZATION/NAME?image=photo&caption=title``. Labels are class labels; integers from 0 on, whose names are
    their digits; or texts, sorted over both splits. A negative number, as in test splits, means no label.

    Splits: the data set's own if it has "train" and one of "val", "validation", "valid", "dev" or "test" (the first of
    these), or stated ones: ``?train=train_full&val=small``. Otherwise about 5 % of the rows are for validation, chosen
    by a hash of their numbers, so that adding rows at the end moves none between the splits.

    Args:
        source: see :mod:`regvq_fast.data.huggingface.source`.
        split, image_size, crop, flip, seed, limit, fields: see
            :class:`~regvq_fast.data.image_files.ImageFileDataset`.

    Raises:
        FileNotFoundError: no such data set. OSError: the hub can't be reached, or refuses access.
        ValueError: ``datasets`` is not installed; no column for the image or a field, or several; no row with the
            fields; and what ``ImageFolder`` raises.
    """

    def _find(self) -> None:
        self._parsed = parse_source(self.source)
        splits = open_splits(self._parsed)
        self.split_name, own = find_split(self._parsed, splits, self.split)
        # Both splits, this one first: their labels have common ids.
        names = dict.fromkeys(
            [self.split_name, *(find_split(self._parsed, splits, part)[0] for part in get_args(Split))]
        )
        self._tables = [splits[name] for name in names]
        table = self._tables[0]
        self._identity: str = table._fingerprint
        parts: tuple[Part, ...] = ("image", *sorted(self.fields))
        columns = {part: require_column(self._parsed, table.features, part) for part in parts}
        has = [self._has(field, columns[field]) for field in sorted(self.fields)]
        if has and not np.logical_and.reduce(has).any():
            missing = " and ".join(sorted(self.fields))
            raise ValueError(f"none of the {len(table)} rows of {self.source} ({self.split_name}) has its {missing}")
        complete = self._complete(has, len(table))
        chosen = self._choose(None if own else row_hashes(complete), len(complete))
        self._rows: NDArray[np.int64] = complete[chosen]
        if "label" in self.fields:
            self.label_names, ids = self._read_labels(columns["label"])
            self._labels = ids[self._rows].astype(np.int32)
        undecoded = without_decoding(table, columns)
        self._columns: dict[Part, Any] = {part: undecoded.select_columns([columns[part]]) for part in parts}
        self._start(len(self._rows))

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data is not None and is_source(data)

    def _having(self) -> dict[Field, int]:
        columns = find_fields(self._parsed, self._tables[0].features)
        counts = {field: int(self._has(field, column)[self._rows].sum()) for field, column in columns.items()}
        return dict.fromkeys(get_args(Field), 0) | counts

    def provenance(self) -> Provenance:
        # The fingerprint of datasets: for a data set on the hub equal on all machines, unlike file times.
        data = self._parsed.path if self._parsed.is_local else self.source
        return Provenance(data, CROP, RESIZE, " ".join([self._identity, *sorted(self.fields)]))

    def _has(self, field: Field, column: str) -> NDArray[np.bool_]:
        """Return a mask of the rows with a field."""
        if field == "label":
            return self._read_labels(column)[1] >= 0
        values = _arrow(self._tables[0], column)
        return has_text(values) if field == "caption" else values.is_valid().to_numpy()

    def _read_labels(self, column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Return the names of the labels of both splits, and the ids of this split's rows."""
        values = [_arrow(table, column) for table in self._tables if column in table.features]
        names, ids = read_labels(self._parsed, self._tables[0].features[column], values)
        return names, ids[0]

    def _read(self, position: int, part: Part) -> bytes:
        (value,) = self._columns[part][int(self._rows[position])].values()
        return file_of(value, part)

    def _name(self, position: int) -> str:
        return f"row {self._rows[position]} of {self.source} ({self.split_name})"

    def _files(self) -> Sequence[str]:
        return [file["filename"] for file in self._tables[0].cache_files]


def row_hashes(rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return 32-bit hashes of row numbers (MurmurHash3's finalizer), which determine whether rows are held out."""
    bits = rows.astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))


def _arrow(table: Any, column: str) -> Any:
    """Return a column as an Arrow array, read lazily."""
    return table.select_columns([column]).with_format("arrow")[:][column]
