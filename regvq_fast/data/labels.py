"""Labels, the classes of whole images, from ``.cls`` files and from the folders of images."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MOST_LABELS = 1_000_000
"""Largest label; a larger number in a ``.cls`` file is an error, since it determines the size of a table."""


def folder_class(file: str, folder: str | os.PathLike[str]) -> str:
    """Return the name of the first folder below ``folder`` in a file's path; empty for a file in ``folder`` itself."""
    return file.removeprefix(os.path.join(folder, "")).rpartition(os.sep)[0].partition(os.sep)[0]


def folder_classes(files: Iterable[str], folder: str | os.PathLike[str]) -> set[str]:
    """Return the names of all classes of the files in a folder."""
    return {folder_class(file, folder) for file in files} - {""}


def cls_ids(texts: Mapping[str, Path], names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the labels, and the id of each text in ``.cls`` files.

    Integers are ids. If any text is not an integer, all are names, with ids in sorted order.

    Args:
        texts: all texts, each with a shard that contains it.
        names: of the ids, from a manifest; empty: the numbers from 0 to the largest id.

    Raises:
        ValueError: a number that is negative, above a million or without a name; or a text although names are given.
    """
    if not names and not all(re.fullmatch(r"[+-]?\d+", text) for text in texts):
        ordered = tuple(sorted(texts))
        return ordered, {name: number for number, name in enumerate(ordered)}
    largest = len(names) - 1 if names else MOST_LABELS
    ids: dict[str, int] = {}
    for text, shard in texts.items():
        ids[text] = int(text) if re.fullmatch(r"[+-]?\d{1,9}", text) else -1
        if not 0 <= ids[text] <= largest:
            raise ValueError(
                f"{shard} has the label {text!r} in a .cls file, where labels are numbers from 0 to {largest:,}: "
                "write it anew"
            )
    return tuple(names) or tuple(map(str, range(max(ids.values(), default=-1) + 1))), ids
