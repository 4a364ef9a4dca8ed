"""Verification of an official archive: existing, missing and unreadable files."""

import os
from collections.abc import Collection, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.archives.each_image import EachImage, Problem
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.reading import caption_lines, check_same_size, raw_lines
from regvq_fast.data.samples import Field, Part
from regvq_fast.data.transforms import center_box, crop_labels, upright_size

SHOWN_PROBLEMS = 10
"""Number of damaged images to name; further ones are only counted."""


class Need(NamedTuple):
    """Files that an archive should have, with found and expected numbers."""

    what: str
    found: int
    expected: int
    """Expected number; 0: unknown."""
    required: bool
    """True if it is an error when they are missing."""
    source: str
    """Address of the files."""
    example: str = ""
    """A missing file, or an image without the field."""

    @property
    def state(self) -> str:
        if self.found >= max(self.expected, 1):
            return "ok"
        return "missing" if self.required else "optional"


class Finding(NamedTuple):
    """Result of opening an image without a problem."""

    captions: int
    repeated: int
    """Repeated or empty lines of captions."""


def verify(
    archive: Archive, fields: Collection[Field], *, decode: bool = False, workers: int = 0, console: Console
) -> None:
    """Print the numbers of an archive's files beside the official ones, and where to get missing files.

    Args:
        archive: result of ``find_archive``.
        fields: required of all images; other fields of the archive are shown as optional.
        decode: open every image, map and caption, too.
        workers: processes that decode.
        console: to print to.

    Raises:
        ValueError: files are missing or unreadable, after all are checked; or a list is damaged.
    """
    found = list(needs(archive, fields))
    table = Table(title=Text(archive.heading), title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("found", justify="right")
    table.add_column("expected", justify="right")
    table.add_column("")
    for need in found:
        style = {"missing": "bold red", "optional": "dim"}.get(need.state, "")
        expected = f"{need.expected:,}" if need.expected else "unknown"
        table.add_row(Text(need.what), f"{need.found:,}", expected, Text(need.state, style))
    console.print(table)
    missing = [need for need in found if need.state == "missing"]
    splits = f"training takes {archive.served['train']}, validation {archive.served['val']}"
    maps = f"; maps have {len(archive.classes)} class ids" if archive.classes else ""
    names = archive.label_names if "label" in archive.fields and not missing else ()
    labels = f"; labels have {len(names)} classes" if names else ""
    console.print(Text(splits + maps + labels), soft_wrap=True)
    for source in dict.fromkeys(need.source for need in missing):
        same = [need for need in missing if need.source == source]
        example = next((f" ({need.example})" for need in same if need.example), "")
        what = ", ".join(need.what for need in same)
        console.print(Text(f"incomplete: {what}{example}; get it from {source}"), soft_wrap=True)
    damaged = _open_all(archive, fields, workers, console) if decode else 0
    if missing or damaged:
        states = ["incomplete"] * bool(missing) + [f"damaged in {damaged} images"] * bool(damaged)
        raise ValueError(f"{archive.heading} is {' and '.join(states)}: see above")


def needs(archive: Archive, fields: Collection[Field]) -> Iterator[Need]:
    """Yield the files that an archive should have, with the official numbers; other than ``fields`` are optional.

    Raises:
        ValueError: a list is damaged.
    """
    for path in archive.lists():
        exists = path.is_file()
        yield Need(path.name, int(exists), 1, True, archive.source("image"), "" if exists else f"{path} is missing")
    for partition, expected in archive.partitions.items():
        names = archive.listed(partition) if all(path.is_file() for path in archive.lists()) else []
        parts: tuple[Part, ...] = ("image", *archive.fields)
        for part in parts:
            has = archive.has(part, names) if names else np.zeros(0, dtype=bool)
            what = f"{partition} images" if part == "image" else f"{partition} images with {part}"
            count = int(np.count_nonzero(has))
            example = _example(archive, part, names[int(np.argmin(has))]) if count < len(names) else ""
            yield Need(what, count, expected, part == "image" or part in fields, archive.source(part), example)
            if part == "image":
                names = [name for name, there in zip(names, has, strict=True) if there]
                expected = expected or len(names)


def _example(archive: Archive, part: Part, name: str) -> str:
    path = archive.path(name, part)
    # One file may hold the captions of many images.
    return f"{archive.path(name, 'image')} has none" if os.path.exists(path) else f"{path} is missing"


def _open_all(archive: Archive, fields: Collection[Field], workers: int, console: Console) -> int:
    """Open every image; print the first problems, and return the number of problems."""
    images = problems = captions = repeated = 0
    if not all(path.is_file() for path in archive.lists()):
        return 0
    for partition in archive.partitions:
        opened = EachImage(SplitFiles(archive, partition, fields), examine)
        for result in opened.results(workers, f"opening {partition}", console):
            images += 1
            if isinstance(result, Problem):
                problems += 1
                if problems <= SHOWN_PROBLEMS:
                    console.print(Text(f"{result.path}: {result.reason}"), soft_wrap=True)
            else:
                captions += result.captions
                repeated += result.repeated
    if problems > SHOWN_PROBLEMS:
        console.print(f"and {problems - SHOWN_PROBLEMS} more")
    counted = f" and {captions:,} captions ({repeated:,} repeated or empty lines don't count)" if captions else ""
    console.print(Text(f"opened {images:,} images{counted}"), soft_wrap=True)
    return problems


def examine(archive: Archive, name: str, fields: Collection[Field]) -> Finding:
    """Decode an image and its fields; errors of reading are raised."""
    with Image.open(BytesIO(archive.read(name, "image"))) as file:
        size = upright_size(file)
        file.load()
    if "segmentation" in fields:
        with Image.open(BytesIO(archive.read(name, "segmentation"))) as file:
            if archive.maps_fit:
                check_same_size(file, size)
            # This checks all of its ids, and its shape.
            crop_labels(file, center_box(*size), size, 1, 1, len(archive.classes))
    if "caption" not in fields:
        return Finding(0, 0)
    data = archive.read(name, "caption")
    captions = caption_lines(data)
    return Finding(len(captions), len(raw_lines(data)) - len(captions))
