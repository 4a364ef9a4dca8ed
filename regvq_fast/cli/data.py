"""The command ``regvq data``: check official archives of data sets, pack them into shards, make small ones."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from regvq_fast.config import run_command
from regvq_fast.data.archives import ARCHIVES, Archive, ArchiveName, find_archive
from regvq_fast.data.emoji import prepare_emoji
from regvq_fast.data.loading import default_workers
from regvq_fast.data.photos import prepare_photos
from regvq_fast.data.preparing import prepare
from regvq_fast.data.samples import Field
from regvq_fast.data.verifying import verify
from regvq_fast.settings import changed_flags

USAGE = """Check the paper's data sets and ImageNet, pack them into shards, or make two small data sets.

    regvq data verify --dataset cub200 --root data/      # list missing files
    regvq data verify --root data/CUB_200_2011 --decode  # also decode the files
    regvq data prepare --root data/CUB_200_2011 --out cub-shards
    regvq data emoji --out emoji                         # 1,906 captioned emoji
    regvq data photos --out photos                       # 2,200 labelled crops

Training reads the archives' folders as they are: --data data/CUB_200_2011. docs/data.md has addresses, layouts, splits.
"""


_OF_ARCHIVES = ("dataset", "fields", "decode", "size", "quality", "shard_mib", "workers")


@dataclass(frozen=True)
class DataCommand:
    """A run of ``regvq data``."""

    command: Annotated[Literal["verify", "prepare", "emoji", "photos"], tyro.conf.Positional]
    """verify: list existing and missing files of a data set. prepare: resize it and pack it into shards.
    emoji: download Google's emoji (74 MB) as captioned images, one folder per group.
    photos: crop ten photographs of scikit-image, one folder each."""
    root: Path | None = None
    """Folder of the unpacked official archives, or the top folder of one.
    emoji: the npm package emoji-datasource-google (.tgz), instead of a download."""
    dataset: ArchiveName | None = None
    """Data set. Default: detected from the layout; required if several are found."""
    fields: tuple[Field, ...] | None = None
    """Required fields. Default: those of the preset's prior; prepare also packs labels."""
    decode: bool = False
    """verify: also decode every image, map and caption."""
    out: Path | None = None
    """prepare: folder of the shards; emoji, photos: of the images. Must be new or empty."""
    size: int = 384
    """prepare: shorter side in pixels; smaller images are kept. Training crops use down to 67 % of it."""
    quality: int = 95
    """prepare: JPEG quality, without chroma subsampling."""
    shard_mib: int = 1000
    """prepare: maximum size of a shard in MiB."""
    workers: int | None = None
    """Image decoding processes. Default: half the cores, at most 8; 0 with two cores."""


def manage_data(command: DataCommand, console: Console | None = None) -> None:
    """Run a command line of ``regvq data``.

    Raises:
        ValueError, OSError: settings, archive or folder can't be used, or verify found missing or unreadable files; the
            message is one sentence.
    """
    console = console or Console()
    if command.workers is not None and command.workers < 0:
        raise ValueError(f"--workers must not be negative, got {command.workers}")
    if command.command == "verify" and command.out is not None:
        raise ValueError(f"--out {command.out} is for prepare, emoji and photos; verify writes nothing: leave it out")
    if command.command != "verify" and command.out is None:
        raise ValueError(f"{command.command} needs a folder to write to: name a new one with --out")
    if command.command == "prepare" and command.decode:
        raise ValueError("--decode is for verify; prepare opens every file in any case: leave it out")
    if command.command == "photos" and command.root is not None:
        raise ValueError(f"--root {command.root} is not for photos, which come with scikit-image: leave it out")
    if command.command in ("emoji", "photos") and (flags := changed_flags(command, _OF_ARCHIVES)):
        raise ValueError(f"{flags[0]} is for the archives of verify and prepare: leave it out")
    _run(command, console)


def _run(command: DataCommand, console: Console) -> None:
    """Run a command line with checked flags."""
    if command.command == "emoji":
        assert command.out is not None
        prepare_emoji(command.out, command.root, console=console)
        return
    if command.command == "photos":
        assert command.out is not None
        prepare_photos(command.out, console=console)
        return
    archive = _archive(command)
    fields: Collection[Field] = archive.needed if command.fields is None else command.fields
    for field in fields:
        if field not in archive.fields:
            raise ValueError(f"--fields {field}: {archive.title} has {', '.join(archive.fields)} only")
    workers = default_workers() if command.workers is None else command.workers
    if command.command == "verify":
        verify(archive, fields, decode=command.decode, workers=workers, console=console)
        return
    if command.fields is None and "label" in archive.fields and archive.label_names:
        fields = {*fields, "label"}
    assert command.out is not None
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


def _archive(command: DataCommand) -> Archive:
    """Return the archive in the folder that the command names; raise FileNotFoundError if there is none."""
    root = command.root
    if root is None:
        raise ValueError(f"{command.command} needs the folder of the unpacked archives: give it with --root")
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder: give the folder of the unpacked archives")
    archive = find_archive(root, command.dataset)
    if archive is not None:
        return archive
    if command.dataset is None:
        layouts = "; ".join(f"{name}: {kind.layout}" for name, kind in ARCHIVES.items())
        raise FileNotFoundError(f"--root {root} has no known layout ({layouts}): name one with --dataset")
    kind = ARCHIVES[command.dataset]
    tops = ", ".join(str(root / top) for top in kind.tops)
    raise FileNotFoundError(
        f"{command.dataset} is not in {root}, nor in {tops}: there should be {kind.layout}; get it from "
        f"{kind.source('image')}"
    )


def main(args: Sequence[str]) -> None:
    """Run ``regvq data``."""
    run_command("data", DataCommand, manage_data, USAGE, args, stopped="stopped; nothing unfinished is left")
