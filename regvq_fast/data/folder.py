"""Any folder of images as a data set."""

import logging
import multiprocessing
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch.utils.data import Dataset

from regvq_fast.data.samples import Sample, Split, check_index, check_split, sample_random, shuffled_position
from regvq_fast.data.transforms import AREA_RANGE, center_box, image_to_tensor, open_rgb, random_box, resize_box

logger = logging.getLogger("regvq_fast")

Crop = Literal["random-resized", "center"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""What counts as an image file, in either case."""
HOLD_OUT = 0.05
"""Share of a folder without splits of its own that is kept for validation."""
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}


class ImageFolder(Dataset[Sample]):
    """Every image under a folder, as square uint8 RGB pictures (decoded as :func:`open_rgb` says).

    Splits: the folder's own where it has ``train`` and one of ``val``, ``validation`` or ``test`` (the first of these);
    otherwise validation is about 5 % of the images, chosen by a hash of their paths in the folder, so that adding
    images moves none from one split to the other. A single image serves as both, with a warning. Links to folders are
    followed, each folder once; names that begin with a dot are left out.

    Files that cannot be decoded are skipped: one warning each in the logger "regvq_fast", and the next readable file
    of the sorted list takes the place. They are found on first use, so that opening a large folder stays cheap.

    Args:
        root: the folder, searched recursively for jpg, jpeg, png, webp, bmp, tif, tiff and gif files.
        split: "train": endless, every image once an epoch in shuffled order. "val": each image once, central crop.
        image_size: height and width in pixels of the samples.
        crop: of training images. "random-resized": 50 to 100 % of the area of the largest square that fits, aspect
            0.9 to 1.1, anywhere in the image. "center": that square itself, in the middle. Resized with Lanczos.
        flip: mirror training images with probability 1/2.
        seed: order, crops and flips are functions of (seed, index) and of nothing else.
        limit: use at most so many validation images, spread evenly over the sorted list. None: all.

    A sample has ``image`` (3, image_size, image_size) uint8.

    Raises:
        FileNotFoundError: no such folder, or no image in it. NotADirectoryError: it is a file.
        ValueError: none of its images can be read (also on a later access, when the last one fails);
            an unknown split or crop; an image size or a limit below 1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split = "train",
        image_size: int = 256,
        crop: Crop = "random-resized",
        flip: bool = True,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        check_split(split)
        if crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {', '.join(map(repr, get_args(Crop)))}, got {crop!r}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.root = Path(root)
        self.split: Split = split
        self.image_size = image_size
        self.crop: Crop = crop
        self.flip = flip
        self.seed = seed
        self.files: Sequence[str] = _files_of_split(self.root, split)
        if split == "val" and limit is not None and limit < len(self.files):
            self.files = [self.files[k * len(self.files) // limit] for k in range(limit)]
        # In shared memory, so that what one worker process finds, all of them and the parent know.
        self._unreadable = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        self._reporting = multiprocessing.get_context("spawn").Lock()  # serves workers of every start method
        self._require_a_readable_header()

    def __len__(self) -> int:
        """Images in the split, unreadable ones included: their places are filled."""
        return len(self.files)

    @property
    def unreadable(self) -> int:
        """How many files turned out unreadable so far, whichever process met them."""
        return int(self._unreadable.sum())

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; IndexError for a negative one and, in validation, beyond the last."""
        check_index(index, len(self), self.split)
        training = self.split == "train"
        position = shuffled_position(index, len(self), self.seed) if training else index
        image = self._open_from(position)
        rng = sample_random("folder", self.seed, index)
        cropped = training and self.crop == "random-resized"
        box = random_box(*image.size, rng) if cropped else center_box(*image.size)
        image = resize_box(image, box, self.image_size, self.image_size)
        if training and self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Sample(image=image_to_tensor(image))

    def _open_from(self, position: int) -> Image.Image:
        """The image at ``position`` of the sorted list or, where it can't be read, the next one that can."""
        # Twice the resolution of the smallest crop: enough for its resizing to antialias.
        shorter_side = ceil(2 * self.image_size / AREA_RANGE[0] ** 0.5)
        for step in range(len(self)):
            candidate = (position + step) % len(self)
            if self._unreadable[candidate]:
                continue
            with self._skipping_unreadable(candidate):
                return open_rgb(self.files[candidate], shorter_side)
        raise self._none_readable()

    def _require_a_readable_header(self) -> None:
        """Open files, without decoding, up to the first that is an image: one, in a folder in good order."""
        for candidate, file in enumerate(self.files):
            with self._skipping_unreadable(candidate), Image.open(file):
                return
        raise self._none_readable()

    def _none_readable(self) -> ValueError:
        return ValueError(f"none of the {len(self)} images of the {self.split!r} split in {self.root} can be read")

    @contextmanager
    def _skipping_unreadable(self, position: int) -> Iterator[None]:
        """Flag the file at ``position``, and say so once, where the body fails to read it."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # of oddities in files that it reads, or rejects
                yield
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
            with self._reporting:  # two workers may meet the same file at once; it gets one line all the same
                if not self._unreadable[position]:
                    self._unreadable[position] = True
                    reason = " ".join(str(error).split()) or type(error).__name__
                    logger.warning("skipped unreadable image %s (%s)", self.files[position], reason)


def _files_of_split(root: Path, split: Split) -> list[str]:
    """Paths of the split's images, sorted; at least one."""
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}; give the path of a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; give the path of the folder that holds the images")
    folders = {
        name: next((root / folder for folder in choices if (root / folder).is_dir()), None)
        for name, choices in _SPLIT_FOLDERS.items()
    }
    own_splits = all(folders.values())
    folder = (folders[split] or root) if own_splits else root
    files = _find_images(folder)
    if not files:
        kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
        raise FileNotFoundError(f"no images in {folder} or its subfolders; put some there ({kinds})")
    if own_splits:
        return files
    if len(files) == 1:
        warnings.warn(f"{root} holds one image: it serves both training and validation", stacklevel=3)
        return files
    held_out = _held_out(root, files)
    return [file for file in files if (file in held_out) == (split == "val")]


def _find_images(folder: Path) -> list[str]:
    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:  # a link back up, or a second way to the same folder
            continue
        entered.add((status.st_dev, status.st_ino))
        # Sorted: which of two links to one folder is followed must not depend on the file system's order.
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                    found.append(entry.path)
    return sorted(found)


def _held_out(root: Path, files: Sequence[str]) -> set[str]:
    """The validation share of at least two files: never empty, never all."""
    ranks = {
        file: zlib.crc32(Path(file).relative_to(root).as_posix().encode("utf-8", "surrogateescape")) for file in files
    }
    ordered = sorted(files, key=lambda file: (ranks[file], file))
    count = sum(rank < HOLD_OUT * 2**32 for rank in ranks.values())
    return set(ordered[: min(max(count, 1), len(files) - 1)])
