"""Packing of official archives, resized, into shards."""

import functools
import os
from collections.abc import Collection, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from regvq_fast.data.archives import Archive
from regvq_fast.data.archives.archive import encoded_map
from regvq_fast.data.archives.each_image import EachImage, Problem
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.manifest import Manifest, write_manifest
from regvq_fast.data.reading import caption_lines, check_same_size
from regvq_fast.data.samples import Field
from regvq_fast.data.shards import write_shards
from regvq_fast.data.transforms import Box, crop_labels, crop_rgb, upright_size
from regvq_fast.data.verifying import SHOWN_PROBLEMS
from regvq_fast.files import atomic_folder


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
    """Pack the splits for training and validation into shards for ``ImageShards``, with ``regvq-data.json``.

    The folder is created atomically. Images are resized to ``size`` pixels on the shorter side (Lanczos; maps: nearest
    neighbour). Smaller images keep their size, and RGB JPEGs among them keep their bytes. Images without a field are
    packed without it, unless all images of a split lack it. Missing and unreadable images are left out and counted.

    Raises:
        ValueError: a setting out of range, ``out`` is a mount point or the current folder, a list is damaged, or a
            split has no readable image.
        FileExistsError: ``out`` exists and is not empty.
        FileNotFoundError: a list is missing, or a split has no images or none with a field.
    """
    if size < 1:
        raise ValueError(f"--size must be at least 1, got {size}")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality must be between 1 and 100, got {quality}")
    if shard_mib < 1:
        raise ValueError(f"--shard-mib must be at least 1, got {shard_mib}")
    with atomic_folder(out) as partial:
        found = {split: SplitFiles(archive, partition, fields) for split, partition in archive.served.items()}
        for files in found.values():
            files.require()
        splits: dict[str, dict[str, Any]] = {}
        for split, files in found.items():
            partition = files.partition
            packed = EachImage(files, functools.partial(_sample, size=size, quality=quality))
            counts = splits[split] = {"official": partition, "images": 0, **dict.fromkeys(sorted(fields), 0)}
            counts |= {"missing": len(files.missing), "unreadable": 0}
            if files.missing:
                console.print(Text(files.missing_note()), soft_wrap=True)
            samples = _counted(packed.results(workers, f"packing {partition}", console), counts, console)
            pattern = f"{partial}/".replace("%", "%%") + f"{split}-%06d.tar"
            counts["shards"] = len(write_shards(samples, pattern, shard_mib * 2**20))
            if not counts["shards"]:
                raise ValueError(f"none of the {len(packed)} {partition} images of {archive.heading} can be read")
        manifest = Manifest(
            dataset=archive.name,
            title=archive.title,
            source=str(archive.top),
            size=size,
            quality=quality,
            splits=splits,
            classes=archive.classes if "segmentation" in fields else (),
            label_names=archive.label_names if "label" in fields else (),
            mirror_pairs=archive.mirror_pairs if "segmentation" in fields else (),
        )
        write_manifest(partial, manifest)
    for name, packed_split in manifest.splits.items():
        with_fields = "".join(f", {packed_split[field]:,} with {field}" for field in sorted(fields))
        without = f"{packed_split['missing']:,} missing, {packed_split['unreadable']:,} unreadable left out"
        words = f"{packed_split['images']:,} images{with_fields}, {without}, in {packed_split['shards']} shards"
        console.print(Text(f"{out}: {name}: {words}"), soft_wrap=True)
    return manifest


def _sample(
    archive: Archive, name: str, fields: Collection[Field], *, size: int, quality: int
) -> dict[str, str | bytes]:
    """Return an image as ``write_shards`` takes it; errors of reading are raised."""
    data = archive.read(name, "image")
    with Image.open(BytesIO(data)) as file:
        full = upright_size(file)
        scale = min(size / min(full), 1)
        width, height = (max(round(side * scale), 1) for side in full)
        unchanged = scale == 1 and file.mode == "RGB" and file.format == "JPEG" and not file.getexif()
        # Always decoded, to find damaged files; at validation's resolution, since that split is packed, too.
        image = crop_rgb(file, Box(0, 0, *full), width, height, OVERSAMPLING["val"])
    if not unchanged:
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
    if "label" in fields:
        sample["cls"] = str(archive.labels([name])[0])
    return sample


def _counted(
    results: Iterable[dict[str, str | bytes] | Problem], counts: dict[str, Any], console: Console
) -> Iterator[dict[str, str | bytes]]:
    """Yield the readable samples and count their fields; print the first problems."""
    for result in results:
        if isinstance(result, Problem):
            counts["unreadable"] += 1
            if counts["unreadable"] <= SHOWN_PROBLEMS:
                console.print(Text(f"left out {result.path}: {result.reason}"), soft_wrap=True)
            continue
        counts["images"] += 1
        for field, extension in (("caption", "txt"), ("label", "cls"), ("segmentation", "seg.png")):
            if extension in result:
                counts[field] += 1
        yield result
