"""What data sets of image files have in common, whether the files lie in folders or in tar shards."""

import logging
import multiprocessing
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from regvq_fast.data.finding import CAPTION_SUFFIX, SEGMENTATION_SUFFIX, left_out_text
from regvq_fast.data.manifest import mirrored_ids, read_manifest
from regvq_fast.data.samples import Sample, Split, check_index, check_split, sample_random, shuffled_position
from regvq_fast.data.transforms import center_box, crop_labels, crop_rgb, image_to_tensor, random_box, upright_size

logger = logging.getLogger("regvq_fast")

Crop = Literal["random-resized", "center"]
"""How training images are cut: anywhere and at a random scale, or the largest central square."""
Field = Literal["caption", "segmentation"]
"""What a sample may hold besides its image."""
Part = Literal["image", "caption", "segmentation"]
"""A file of a sample."""
FIELD_SUFFIXES: dict[Field, str] = {"caption": CAPTION_SUFFIX, "segmentation": SEGMENTATION_SUFFIX}
"""Of the file of a field, beside the image of the same name."""

Result = TypeVar("Result")

_OF_A_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PAUSES = (0.1, 1.0, 5.0)
"""Seconds; a server of files that restarts takes longer, and is to be noticed."""

HOLD_OUT = 0.05
"""Share of the pictures that is kept for validation where they come without splits of their own."""
OVERSAMPLING: dict[Split, float] = {"train": 1.5, "val": 3.0}
"""How many times the pixels of a sample, in width and height, a JPEG's crop must have to be decoded at reduced size.

Samples of 256 pixels out of detailed photographs, against those of the full decoder: 44 dB at 1.5, as much as JPEG of
quality 90 itself takes away from such a sample (45 dB); 52 dB at 3, a third of a level, so that what is measured in
validation hardly depends on a trick of speed.
"""


class PictureDataset(Dataset[Sample], ABC):
    """Square uint8 RGB pictures cut from image files, with captions and semantic maps if asked for.

    A subclass lists its pictures in a fixed order, lets :meth:`_choose` say which of them the split serves, reads
    their files (:meth:`_read`), and calls :meth:`_start` once it can.

    Files that cannot be decoded are skipped: one warning each in the logger "regvq_fast", and the next readable
    picture of the list takes the place. They are found on first use, so that opening a large data set stays cheap.
    Where the storage fails, not the file (:func:`is_of_the_machine`), it is asked again, and in the end it is an error.

    A picture's captions are the lines of its caption file, empty and repeated ones left out: training draws one of
    them, as a function of (seed, index), validation takes the first. A picture whose file has none is skipped like one
    that can't be decoded. Where the source says that two class ids change places in a mirror (a face's left eye becomes
    its right one), they do in the maps of mirrored pictures.

    Raises:
        ValueError: an unknown split, crop or field; an image size or a limit below 1.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: Split,
        image_size: int,
        crop: Crop,
        flip: bool,
        seed: int,
        limit: int | None,
        fields: Collection[Field],
    ) -> None:
        check_split(split)
        if crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {', '.join(map(repr, get_args(Crop)))}, got {crop!r}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        for field in fields:
            if field not in get_args(Field):
                raise ValueError(f"fields must be of {', '.join(map(repr, get_args(Field)))}, got {field!r}")
        self.source = os.fspath(source)
        self.split: Split = split
        self.image_size = image_size
        self.crop: Crop = crop
        self.flip = flip
        self.seed = seed
        self.limit = limit
        self.fields = frozenset(fields)
        self.left_out: dict[str, Mapping[str, int]] = {}
        """Files that look like images but are not used: number by reason, by folder or shard."""
        self._maps_fit = False  # must maps have the size of their images, rather than their shape alone?
        manifest = read_manifest(self.source)
        self.num_classes: int | None = len(manifest.classes) or None if manifest else None
        """Ids of the semantic maps: a picture whose map has others can't be read. None where nothing says so."""
        self._mirrored_ids = mirrored_ids(manifest.mirror_pairs if manifest else ())

    # ------------------------------------------------------------------------------------------- what a subclass adds

    @abstractmethod
    def _read(self, position: int, part: Part) -> bytes:
        """The file that holds this part of the picture at ``position`` of the split's list."""

    @abstractmethod
    def _name(self, position: int) -> str:
        """How to speak of that picture."""

    def _choose(self, hashes: NDArray[np.uint32] | None, count: int) -> NDArray[np.int64]:
        """Which of ``count`` >= 1 pictures the split serves.

        ``hashes`` are of their names; None says that all of them are of this split. Otherwise validation is about 5 %
        of them, those with the lowest hashes, so that adding pictures moves none from one split to the other.
        """
        chosen = np.arange(count)
        if hashes is not None and count == 1:
            warnings.warn(f"{self.source} holds one image: it serves both training and validation", stacklevel=3)
        elif hashes is not None:
            share = np.count_nonzero(hashes < HOLD_OUT * 2**32)
            held_out = np.zeros(count, dtype=bool)
            held_out[np.argsort(hashes, kind="stable")[: min(max(share, 1), count - 1)]] = True
            chosen = np.flatnonzero(held_out == (self.split == "val"))
        if self.split == "val" and self.limit is not None and self.limit < len(chosen):
            chosen = chosen[np.arange(self.limit) * len(chosen) // self.limit]
        return chosen

    def _complete(self, has: Sequence[NDArray[np.bool_]], count: int) -> NDArray[np.int64]:
        """Which of ``count`` pictures have every field that was asked for; one warning says how many haven't."""
        complete = np.flatnonzero(np.logical_and.reduce(has)) if has else np.arange(count)
        missing = " and ".join(sorted(self.fields))
        if not len(complete):
            files = " and ".join(f"NAME{FIELD_SUFFIXES[field]}" for field in sorted(self.fields))
            raise FileNotFoundError(
                f"none of the {count} images in {self.source} has its {missing}: in folders and tar shards, {files} "
                "must lie beside NAME.jpg"
            )
        if len(complete) < count:
            logger.warning("left out %d of %d images in %s: no %s", count - len(complete), count, self.source, missing)
        return complete

    def _start(self, count: int) -> None:
        """Get ready to serve ``count`` pictures, and make sure that one of them is an image."""
        # Of each picture; in shared memory, so that what one worker process finds, all of them and the parent know.
        self.unreadable_flags = torch.zeros(count, dtype=torch.bool).share_memory_()
        self._reporting = multiprocessing.get_context("spawn").Lock()  # serves workers of every start method
        for candidate in range(count):  # by its header, without decoding: the first will do, in data in good order
            with self._skipping_unreadable(candidate), Image.open(BytesIO(self._read(candidate, "image"))):
                return
        raise self._none_readable()

    # -------------------------------------------------------------------------------------------------------- samples

    def __len__(self) -> int:
        """Pictures in the split, unreadable ones included: their places are filled."""
        return len(self.unreadable_flags)

    @property
    def label(self) -> str:
        """What the pictures are, for people."""
        return self.source

    @property
    def unreadable(self) -> int:
        """How many pictures turned out unreadable so far, whichever process met them."""
        return int(self.unreadable_flags.sum())

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; IndexError for a negative one and, in validation, beyond the last."""
        check_index(index, len(self), self.split)
        position = shuffled_position(index, len(self), self.seed) if self.split == "train" else index
        for step in range(len(self)):
            candidate = (position + step) % len(self)
            if not self.unreadable_flags[candidate]:
                with self._skipping_unreadable(candidate):
                    return patiently(partial(self._load, candidate, index), partial(self._name, candidate))
        raise self._none_readable()

    def _load(self, position: int, index: int) -> Sample:
        """Sample ``index``, cut from the picture at ``position``."""
        rng = sample_random("folder", self.seed, index)
        training = self.split == "train"
        side = self.image_size
        with Image.open(BytesIO(self._read(position, "image"))) as file:
            size = upright_size(file)
            box = random_box(*size, rng) if training and self.crop == "random-resized" else center_box(*size)
            image = crop_rgb(file, box, side, side, OVERSAMPLING[self.split])
        mirrored = training and self.flip and rng.random() < 0.5
        sample = Sample(image=image_to_tensor(_mirror(image) if mirrored else image))
        if "segmentation" in self.fields:
            with Image.open(BytesIO(self._read(position, "segmentation"))) as file:
                if self._maps_fit:
                    check_same_size(file, size)
                labels = np.array(crop_labels(file, box, size, side, side, self.num_classes))
            if mirrored:
                labels = labels[:, ::-1] if self._mirrored_ids is None else self._mirrored_ids[labels[:, ::-1]]
            sample["segmentation"] = torch.from_numpy(labels.copy())
        if "caption" in self.fields:
            captions = caption_lines(self._read(position, "caption"))
            sample["caption"] = rng.choice(captions) if training else captions[0]
        return sample

    def _none_readable(self) -> ValueError:
        return ValueError(f"none of the {len(self)} images of the {self.split!r} split in {self.source} can be read")

    @contextmanager
    def _skipping_unreadable(self, position: int) -> Iterator[None]:
        """Flag the picture at ``position``, and say so once, where the body fails to read it."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # of oddities in files that it reads, or rejects
                yield
        except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
            if is_of_the_machine(error):
                raise
            with self._reporting:  # two workers may meet the same file at once; it gets one line all the same
                if not self.unreadable_flags[position]:
                    self.unreadable_flags[position] = True
                    logger.warning("skipped unreadable image %s (%s)", self._name(position), why_unreadable(error))


def left_out_note(*splits: object) -> str:
    """Return `; left out: 3 files (...)` of the splits of a data set; empty if nothing is known to be left out."""
    datasets = [split for split in splits if isinstance(split, PictureDataset)]
    places = {place: reasons for dataset in datasets for place, reasons in dataset.left_out.items()}
    # Both splits may have searched the same place: it counts once.
    reasons = sum(map(Counter, places.values()), Counter(unreadable=sum(dataset.unreadable for dataset in datasets)))
    text = left_out_text(reasons)
    return text and f"; left out: {text}"


@contextmanager
def opened_image(path: Path, name: str, damaged: Callable[[str], str]) -> Iterator[Image.Image]:
    """An image file that people chose, while it is open: what the block can't do with it is told by its name.

    Args:
        path: of the file.
        name: what messages call it.
        damaged: the message for a file that can't be read, by the reason.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no image, or the block can't read it.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image") from None
    except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
        if is_of_the_machine(error):
            raise
        raise ValueError(damaged(why_unreadable(error))) from None


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error in reading a file says nothing about the file: EIO, ESTALE, EMFILE, no memory.

    What Pillow raises of damaged files is an OSError, too, but has no number.
    """
    if isinstance(error, OSError):
        return error.errno is not None and not isinstance(error, _OF_A_FILE)
    return isinstance(error, MemoryError)


def patiently(work: Callable[[], Result], name: Callable[[], str]) -> Result:
    """What ``work`` returns; where the storage fails it, it gets a few more attempts, a pause before each.

    Raises:
        OSError: the storage still fails; the message has what ``name`` returns. Otherwise what ``work`` raises.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return work()
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            if (pause := next(pauses, None)) is None:
                raise OSError(error.errno, error.strerror, name()) from None
            time.sleep(pause)


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, in one line, by the error that came of reading it."""
    if isinstance(error, UnidentifiedImageError):  # whose message is about the buffer it was given
        return "it is no image"
    return " ".join(str(error).split()) or type(error).__name__


def caption_lines(data: bytes) -> list[str]:
    """The captions in a file, one at least: its lines, without empty and repeated ones, in order.

    Raises:
        ValueError: there is none, or the file is not UTF-8.
    """
    lines = list(dict.fromkeys(filter(None, map(str.strip, data.decode().splitlines()))))
    if not lines:
        raise ValueError("its caption is empty")
    return lines


def check_same_size(labels: Image.Image, size: tuple[int, int]) -> None:
    """Raise ValueError unless a map has the (width, height) of its image."""
    if labels.size != size:
        raise ValueError(f"its map has {labels.width} x {labels.height} pixels, the image {size[0]} x {size[1]}")


def _mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
