"""Checking the paper's data sets, and packing them small into shards: what ``train/data.py`` runs."""

import functools
import os
import shutil
import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.text import Text

from regvq_fast.data.archives import ARCHIVES, Archive, ArchiveName, find_archive
from regvq_fast.data.archives.base import encoded_map
from regvq_fast.data.archives.each import EachPicture, Problem
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.loading import default_workers
from regvq_fast.data.manifest import Manifest, write_manifest
from regvq_fast.data.pictures import OVERSAMPLING, Field, caption_lines, check_same_size
from regvq_fast.data.shards import write_shards
from regvq_fast.data.transforms import Box, crop_labels, crop_rgb, upright_size
from regvq_fast.data.verifying import SHOWN_PROBLEMS, verify
from regvq_fast.files import check_new_folder


@dataclass(frozen=True)
class DataCommand:
    """A run of ``train/data.py``."""

    command: Annotated[Literal["verify", "prepare"], tyro.conf.Positional]
    """verify: say what of a data set is there, and where to get the rest. prepare: pack it, resized, into shards."""
    root: Path
    """Folder that the official archives are unpacked in, or the top folder of one."""
    dataset: ArchiveName | None = None
    """Which data set it is. Not given: the one whose layout is found; needed where there are several."""
    fields: tuple[Field, ...] | None = None
    """What its images have to come with. Not given: what the paper's prior needs."""
    decode: bool = False
    """verify: open every image, map and caption as well."""
    out: Path | None = None
    """prepare: folder of the shards, new or empty."""
    size: int = 384
    """prepare: pixels of the shorter side; smaller images stay as they are. Training crops take down to 71 % of it."""
    quality: int = 95
    """prepare: of the JPEGs, which keep the full resolution of their colours."""
    shard_mib: int = 1000
    """prepare: most mebibytes of a shard."""
    workers: int | None = None
    """Processes that decode images. Not given: half of the cores; on two cores the process itself."""


def manage_data(command: DataCommand, console: Console | None = None) -> None:
    """Do what a command line of ``train/data.py`` says.

    Raises:
        ValueError, OSError: what is wrong with settings, archive or folder, in one sentence; of verify, too, where
            something is missing or can't be read.
    """
    console = console or Console()
    if command.workers is not None and command.workers < 0:
        raise ValueError(f"--workers must not be negative, got {command.workers}")
    if command.command == "verify" and command.out is not None:
        raise ValueError(f"--out {command.out} is for prepare; verify writes nothing: leave it out")
    if command.command == "prepare" and command.decode:
        raise ValueError("--decode is for verify; prepare opens every file in any case: leave it out")
    archive = _archive(command)
    fields: Collection[Field] = archive.needed if command.fields is None else command.fields
    for field in fields:
        if field not in archive.fields:
            raise ValueError(f"--fields {field}: {archive.title} has {', '.join(archive.fields)} only")
    workers = default_workers() if command.workers is None else command.workers
    if command.command == "verify":
        verify(archive, fields, decode=command.decode, workers=workers, console=console)
        return
    if command.out is None:
        raise ValueError("prepare needs a folder for the shards: name a new one with --out")
    # What is half-made is removed, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        prepare(
            archive,
            command.out,
            fields,
            size=command.size,
            quality=command.quality,
            shard_mib=command.shard_mib,
            workers=workers,
            console=console,
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def _archive(command: DataCommand) -> Archive:
    root = command.root
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is no folder: name the one that the archives are unpacked in")
    archive = find_archive(root, command.dataset)
    if archive is not None:
        return archive
    if command.dataset is None:
        layouts = "; ".join(f"{name}: {kind.layout}" for name, kind in ARCHIVES.items())
        raise FileNotFoundError(f"--root {root} has the layout of no data set ({layouts}): name one with --dataset")
    kind = ARCHIVES[command.dataset]
    places = ", ".join(str(root / top) for top in kind.tops)
    raise FileNotFoundError(
        f"{command.dataset} is not in {root}, nor in {places}: there should be {kind.layout}; get it from "
        f"{kind.source('image')}"
    )


def prepare(
    archive: Archive,
    out: Path,
    fields: Collection[Field],
    *,
    size: int = 384,
    quality: int = 95,
    shard_mib: int = 1000,
    workers: int = 0,
    console: Console,
) -> Manifest:
    """Pack the splits that training takes into shards for ``ImageShards``, and say so in ``regvq-data.json``.

    The folder appears when it is whole. Images get ``size`` pixels at the shorter side (Lanczos), maps with the nearest
    neighbour; those that are smaller keep their size, and their bytes where they are RGB JPEGs. Pictures without a
    field are packed without it, unless that is all of a split; what is missing or can't be read is left out, and
    counted.

    Raises:
        ValueError: a setting out of range, ``out`` a mount point or the current folder, a damaged list, or a split
            without a readable picture.
        FileExistsError: ``out`` is there, and not empty. FileNotFoundError: a list is missing, or all images of a split
            are, or a field of all of them.
    """
    if size < 1:
        raise ValueError(f"--size must be at least 1, got {size}")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality must be between 1 and 100, got {quality}")
    if shard_mib < 1:
        raise ValueError(f"--shard-mib must be at least 1, got {shard_mib}")
    check_new_folder(out)
    out = out.resolve()
    if out.is_mount() or out == Path.cwd():  # a folder that is made beside it can't take its place
        raise ValueError(f"--out {out} is a mount point or the current folder: name a new folder in it")
    found = {split: SplitFiles(archive, partition, fields) for split, partition in archive.served.items()}
    for files in found.values():
        files.require()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir()
    try:
        splits: dict[str, dict[str, Any]] = {}
        for split, files in found.items():
            partition = files.partition
            packed = EachPicture(files, functools.partial(_sample, size=size, quality=quality))
            counts = splits[split] = {"official": partition, "images": 0, **dict.fromkeys(sorted(fields), 0)}
            counts |= {"missing": len(files.missing), "unreadable": 0}
            if files.missing:
                console.print(Text(files.missing_told()), soft_wrap=True)
            samples = _counted(packed.results(workers, f"packing {partition}", console), counts, console)
            pattern = f"{partial}/".replace("%", "%%") + f"{split}-%06d.tar"
            counts["shards"] = len(write_shards(samples, pattern, shard_mib * 2**20))
            if not counts["shards"]:
                raise ValueError(f"none of the {len(packed)} {partition} images of {archive.label} can be read")
        manifest = Manifest(
            dataset=archive.name,
            title=archive.title,
            source=str(archive.top),
            size=size,
            quality=quality,
            splits=splits,
            classes=archive.classes if "segmentation" in fields else (),
            mirror_pairs=archive.mirror_pairs if "segmentation" in fields else (),
        )
        write_manifest(partial, manifest)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, told in manifest.splits.items():
        with_fields = "".join(f", {told[field]:,} with {field}" for field in sorted(fields))
        without = f"{told['missing']:,} missing, {told['unreadable']:,} unreadable left out"
        words = f"{told['images']:,} images{with_fields}, {without}, in {told['shards']} shards"
        console.print(Text(f"{out}: {name}: {words}"), soft_wrap=True)
    return manifest


def _sample(
    archive: Archive, name: str, fields: Collection[Field], *, size: int, quality: int
) -> dict[str, str | bytes]:
    """A picture as ``write_shards`` takes it; raises whatever is wrong with it."""
    data = archive.read(name, "image")
    with Image.open(BytesIO(data)) as file:
        full = upright_size(file)
        scale = min(size / min(full), 1)
        width, height = (max(round(side * scale), 1) for side in full)
        as_it_is = scale == 1 and file.mode == "RGB" and file.format == "JPEG" and not file.getexif()
        # Decoded whether it is kept or not: a damaged one shows. As finely as in validation, which is packed, too.
        image = crop_rgb(file, Box(0, 0, *full), width, height, OVERSAMPLING["val"])
    if not as_it_is:
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        data = buffer.getvalue()
    sample: dict[str, str | bytes] = {"__key__": os.path.splitext(name)[0], "jpg": data}
    if "segmentation" in fields:
        with Image.open(BytesIO(archive.read(name, "segmentation"))) as file:
            if archive.maps_fit:
                check_same_size(file, full)
            labels = crop_labels(file, Box(0, 0, *full), full, width, height, len(archive.classes))
        sample["seg.png"] = encoded_map(np.asarray(labels))
    if "caption" in fields:
        sample["txt"] = "\n".join(caption_lines(archive.read(name, "caption")))
    return sample


def _counted(
    results: Iterable[dict[str, str | bytes] | Problem], counts: dict[str, Any], console: Console
) -> Iterator[dict[str, str | bytes]]:
    """The samples that could be read, counted by what they have; the first problems are told."""
    for result in results:
        if isinstance(result, Problem):
            counts["unreadable"] += 1
            if counts["unreadable"] <= SHOWN_PROBLEMS:
                console.print(Text(f"left out {result.path}: {result.reason}"), soft_wrap=True)
            continue
        counts["images"] += 1
        for field, extension in (("caption", "txt"), ("segmentation", "seg.png")):
            if extension in result:
                counts[field] += 1
        yield result
