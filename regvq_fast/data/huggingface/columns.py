"""The columns of a Hugging Face data set: their roles, and their values in the form of files."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from regvq_fast.data.huggingface.source import Source
from regvq_fast.data.labels import MOST_LABELS
from regvq_fast.data.samples import Field, Part

NAMES: dict[Part, tuple[str, ...]] = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values"),
    "caption": ("caption", "captions", "text", "txt", "sentences", "sentences_raw"),
    "label": ("label", "labels", "cls", "class", "fine_label", "category"),
    "segmentation": ("segmentation", "annotation", "mask", "label_map", "seg.png", "label", "labels"),
}
"""Usual names of columns, in lower case and with "_" between words; the type must fit, too."""
_KINDS: dict[Part, str] = {
    "image": "images",
    "caption": "texts, or lists of texts",
    "label": "class labels (or, unless streamed, whole numbers or texts)",
    "segmentation": "images",
}


def find_column(source: Source, features: Mapping[str, Any], part: Part) -> str | None:
    """Return the column with a part of the images, as the source states, or by name and type.

    Args:
        source: the data set.
        features: of ``datasets``, by column.
        part: the image or a field.

    Returns:
        The only column with a fitting type and a usual name; otherwise, for images and labels, the only one of type
        Image (without the name of a map) or ClassLabel; None if there is none.

    Raises:
        ValueError: the stated column is missing or has another type, or several columns fit.
    """
    stated = source.options.get(part)
    if stated is not None:
        if stated not in features:
            raise ValueError(f"{source.text} has no column {stated!r}; its columns are {', '.join(features)}")
        if not _fits(source, features[stated], part):
            raise ValueError(f"column {stated!r} of {source.text} has no {_KINDS[part]}: {features[stated]}")
        return stated
    fitting = [name for name in features if _fits(source, features[name], part)]
    found = [name for name in fitting if _is_usual(name, part)]
    if not found and part in ("image", "label"):
        # By type alone; texts, numbers and bytes are ambiguous.
        found = [
            name
            for name in fitting
            if type(features[name]).__name__ in ("Image", "ClassLabel")
            and not (part == "image" and _is_usual(name, "segmentation"))
        ]
    if len(found) > 1:
        raise ValueError(
            f"{source.text} has several columns that could be the {part}: {', '.join(found)}; choose one as "
            f"hf:...?{part}={found[0]}"
        )
    return found[0] if found else None


def require_column(source: Source, features: Mapping[str, Any], part: Part) -> str:
    """Return the column with a part of the images; ValueError also if there is none."""
    column = find_column(source, features, part)
    if column is None:
        listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
        raise ValueError(
            f"{source.text} has no column of {_KINDS[part]} for the {part}; its columns are {listed}: name one as "
            f"hf:...?{part}=COLUMN"
        )
    return column


def find_fields(source: Source, features: Mapping[str, Any]) -> dict[Field, str]:
    """Return the columns of all fields; fields without a column, or with several unless one is stated, are left out."""
    found: dict[Field, str] = {}
    for field in get_args(Field):
        with suppress(ValueError):
            if column := find_column(source, features, field):
                found[field] = column
    return found


def without_decoding(table: Any, columns: Mapping[Part, str]) -> Any:
    """Return a data set or a stream with images as the bytes of their files."""
    import datasets

    table = table.with_format(None)  # a saved data set keeps its format
    for column in set(columns.values()):
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def file_of(value: Any, part: Part) -> bytes:
    """Return a value in the form of a file in a folder of images: an image's bytes, or one caption per line.

    Raises:
        ValueError: there is no value. OSError: the file of an image can't be read.
    """
    if value is None:
        raise ValueError(f"it has no {part}")
    if part == "caption":
        texts = [value] if isinstance(value, str) else value
        return "\n".join(" ".join(text.split()) for text in texts if text).encode()
    if isinstance(value, bytes):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    if value["path"] is None:
        raise ValueError(f"it has no {part}")
    import fsspec  # installed with datasets; streams contain addresses

    with fsspec.open(value["path"], "rb") as file:
        return file.read()


def has_text(texts: Any) -> NDArray[np.bool_]:
    """Return a mask (rows,) of the values with a caption in an Arrow column: null, "" and [] have none."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(texts) if _is_text(texts.type) else pc.list_value_length(texts)
    return pc.fill_null(pc.greater(lengths, 0), False).to_numpy()


def read_labels(
    source: Source, feature: Any, columns: Sequence[Any]
) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Return the names of the labels, and the ids in Arrow columns of labels; negative ids mean no label.

    Args:
        source: the data set.
        feature: of the columns.
        columns: of all splits, which have common ids.

    Raises:
        ValueError: a number above a million, or one of a class without a name.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = getattr(feature, "names", None)  # of a ClassLabel
    if _is_text(_arrow_type(feature)):
        names = sorted({name for column in columns for name in pc.unique(column).to_pylist() if name})
        known = pa.array(names, _arrow_type(feature))
        columns = [pc.index_in(column, value_set=known) for column in columns]
    ids = [pc.fill_null(column.cast(pa.int64()), -1).to_numpy() for column in columns]
    largest = max((int(found.max()) for found in ids if len(found)), default=-1)
    if names is None:
        if largest > MOST_LABELS:
            raise ValueError(f"labels of {source.text} must be at most {MOST_LABELS:,}, one is {largest:,}")
        names = map(str, range(largest + 1))
    elif largest >= len(names):
        raise ValueError(f"{source.text} has a label {largest} and only {len(names)} names of classes: write it anew")
    return tuple(names), ids


def _fits(source: Source, feature: Any, part: Part) -> bool:
    """Return whether a column of ``datasets`` can hold a part."""
    import pyarrow as pa

    kind = _arrow_type(feature)
    if part == "caption":
        return _is_text(kind) or (hasattr(kind, "value_type") and _is_text(kind.value_type))
    if part == "label":
        # The names of other labels are known only after reading all rows.
        streamed = "stream" in source.options
        return hasattr(feature, "names") or (not streamed and (_is_text(kind) or pa.types.is_integer(kind)))
    # Structs are files written by datasets.
    return pa.types.is_binary(kind) or (
        pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(k).name for k in range(kind.num_fields)}
    )


def _arrow_type(feature: Any) -> Any:
    import datasets

    return datasets.Features(column=feature).arrow_schema.field("column").type


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_usual(name: str, part: Part) -> bool:
    return name.lower().replace(" ", "_").replace("-", "_") in NAMES[part]


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
