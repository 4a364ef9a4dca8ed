"""The base class of data sets of image files, in folders or in tar shards."""

import logging
import multiprocessing
import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from regvq_fast.data.finding import CAPTION_SUFFIX, SEGMENTATION_SUFFIX, left_out_text
from regvq_fast.data.image_dataset import FieldCounts, ImageDataset, Provenance, SplitSettings
from regvq_fast.data.manifest import mirrored_ids, read_manifest
from regvq_fast.data.reading import caption_lines, check_same_size, is_of_the_machine, patiently, why_unreadable
from regvq_fast.data.samples import (
    Crop,
    Field,
    Part,
    Sample,
    Split,
    check_index,
    check_split,
    sample_random,
    shuffled_position,
)
from regvq_fast.data.transforms import center_box, crop_labels, crop_rgb, image_to_tensor, random_box, upright_size

logger = logging.getLogger("regvq_fast")

FIELD_SUFFIXES: dict[Field, str] = {"caption": CAPTION_SUFFIX, "segmentation": SEGMENTATION_SUFFIX}
"""Suffix of the file of a field, beside the image of the same name."""
_NEEDED: dict[Field, str] = {
    "caption": "NAME.txt beside NAME.jpg",
    "label": "a folder for each of two classes or more, or NAME.cls beside NAME.jpg in tar shards",
    "segmentation": "NAME.seg.png beside NAME.jpg",
}
"""Files that a field needs, for messages."""

HOLD_OUT = 0.05
"""Fraction of the images held out for validation where the data have no splits of their own."""
OVERSAMPLING: dict[Split, float] = {"train": 1.5, "val": 3.0}
"""A JPEG is decoded at reduced size if the crop then has at least this many times the sample's width and height.

Samples of 256 pixels of detailed photographs, compared with full decoding: 44 dB at 1.5, as much as JPEG of quality 90
itself loses (45 dB); 52 dB at 3, a third of a level, so that validation hardly depends on the reduction.
"""
_IGNORED = 255
"""Id of pixels of no class in maps of PASCAL VOC and others."""
CROP = "largest central square"
RESIZE = "Lanczos with antialiasing (Pillow)"


class ImageFileDataset(ImageDataset):
    """Square uint8 RGB images cropped from image files, with captions and semantic maps if requested.

    A subclass lists its images in a fixed order, selects those of the split with :meth:`_choose`, reads their files
    (:meth:`_read`), and calls :meth:`_start` once it can.

    Files that cannot be decoded are skipped: one warning each in the logger "regvq_fast", and the next readable image
    of the list replaces it. They are found on first use, so that opening a large data set stays cheap. Where the
    storage fails, not the file (:func:`is_of_the_machine`), reading is repeated, and in the end raises.

    An image's captions are the lines of its caption file without empty and repeated ones: training samples one of
    them, as a function of (seed, index), validation takes the first. An image whose file has none is skipped like one
    that can't be decoded. Class ids that the source declares as mirror pairs (a face's left and right eye) are
    exchanged in the maps of mirrored images.

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
        """Files that look like images but are not used: counts by reason, for each folder or shard."""
        self._labels = np.empty(0, dtype=np.int32)  # of the split's images, if samples have labels
        self._has_255 = torch.zeros((), dtype=torch.bool).share_memory_()
        self._reporting = multiprocessing.get_context("spawn").Lock()  # works with every start method
        self._maps_fit = False  # maps must have the size of their images, not only their shape
        manifest = read_manifest(self.source)
        # An image whose map has other class ids can't be read.
        self.num_classes = len(manifest.classes) or None if manifest else None
        self._mirrored_ids = mirrored_ids(manifest.mirror_pairs if manifest else ())
        self._stated_labels = manifest.label_names if manifest else ()

    @classmethod
    def open(cls, data: str | os.PathLike[str] | None, settings: SplitSettings) -> Self:
        split, image_size, length, seed, crop, flip, fields = settings
        return cls(cls._source(data), split, image_size, crop, flip, seed, length, fields)

    @classmethod
    def _source(cls, data: str | os.PathLike[str] | None) -> Any:
        """Return the first argument of the constructor for what ``--data`` names."""
        return data

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> FieldCounts:
        """Count the training images, and those with each field; a field of no validation image counts as none."""
        train, val = (cls.open(data, SplitSettings(split, image_size=1)) for split in get_args(Split))
        held_out = val._having()
        having = {field: count if held_out[field] else 0 for field, count in train._having().items()}
        return FieldCounts(len(train), having)

    # ----------------------------------------------------------------------------------------- for subclasses to define

    @abstractmethod
    def _read(self, position: int, part: Part) -> bytes:
        """Return the file with this part of the image at ``position`` of the split's list."""

    @abstractmethod
    def _name(self, position: int) -> str:
        """Return the name of that image in messages."""

    @abstractmethod
    def _files(self) -> Iterable[str | Path]:
        """Return the files that hold the images of the split."""

    @abstractmethod
    def _having(self) -> Mapping[Field, int]:
        """Return the number of the split's images that have each field; called on a split opened without fields."""

    def _choose(self, hashes: NDArray[np.uint32] | None, count: int) -> NDArray[np.int64]:
        """Return the positions of the split's images among ``count`` >= 1.

        ``hashes`` are of their names; None: all of them are of this split. Otherwise validation is about 5 % of them,
        those with the lowest hashes, so that adding images moves none from one split to the other.
        """
        chosen = np.arange(count)
        if hashes is not None and count == 1:
            warnings.warn(f"{self.source} holds one image: it serves both training and validation", stacklevel=3)
        elif hashes is not None:
            low = np.count_nonzero(hashes < HOLD_OUT * 2**32)
            held_out = np.zeros(count, dtype=bool)
            held_out[np.argsort(hashes, kind="stable")[: min(max(low, 1), count - 1)]] = True
            chosen = np.flatnonzero(held_out == (self.split == "val"))
        if self.split == "val" and self.limit is not None and self.limit < len(chosen):
            chosen = chosen[np.arange(self.limit) * len(chosen) // self.limit]
        return chosen

    def _complete(self, has: Sequence[NDArray[np.bool_]], count: int) -> NDArray[np.int64]:
        """Return the positions of the images with all requested fields; one warning counts the others."""
        complete = np.flatnonzero(np.logical_and.reduce(has)) if has else np.arange(count)
        missing = " and ".join(sorted(self.fields))
        if not len(complete):
            files = ", and ".join(_NEEDED[field] for field in sorted(self.fields))
            raise FileNotFoundError(
                f"none of the {count} images in {self.source} has its {missing}: folders and tar shards need {files}"
            )
        if len(complete) < count:
            logger.warning("left out %d of %d images in %s: no %s", count - len(complete), count, self.source, missing)
        return complete

    def _start(self, count: int) -> None:
        """Prepare to serve ``count`` images, and check that one of them can be opened."""
        # One flag an image; in shared memory, so that all worker processes and the parent see each flag.
        self.unreadable_flags = torch.zeros(count, dtype=torch.bool).share_memory_()
        for candidate in range(count):  # by its header, without decoding; usually the first one is readable
            with self._skipping_unreadable(candidate), Image.open(BytesIO(self._read(candidate, "image"))):
                return
        raise self._none_readable()

    # -------------------------------------------------------------------------------------------------------- samples

    def __len__(self) -> int:
        """Return the number of images in the split, including unreadable ones, which others replace."""
        return len(self.unreadable_flags)

    @property
    def title(self) -> str:
        return self.source

    def provenance(self) -> Provenance:
        # The fields: an image without one of them is left out.
        title = os.path.abspath(self.source) if self.title == self.source else self.title
        return Provenance(title, CROP, RESIZE, " ".join(sorted(self.fields)), self._files(), self.source)

    @property
    def unreadable(self) -> int:
        """Return the number of images found unreadable so far, in all processes."""
        return int(self.unreadable_flags.sum())

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self), self.split)
        position = shuffled_position(index, len(self), self.seed) if self.split == "train" else index
        for step in range(len(self)):
            candidate = (position + step) % len(self)
            if not self.unreadable_flags[candidate]:
                with self._skipping_unreadable(candidate):
                    return patiently(partial(self._load, candidate, index), partial(self._name, candidate))
        raise self._none_readable()

    def _load(self, position: int, index: int) -> Sample:
        """Return sample ``index``, cropped from the image at ``position``."""
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
            if self.num_classes is None and labels.max() == _IGNORED and not self._has_255:
                self._report_255()
            if mirrored:
                labels = labels[:, ::-1] if self._mirrored_ids is None else self._mirrored_ids[labels[:, ::-1]]
            sample["segmentation"] = torch.from_numpy(labels.copy())
        if "caption" in self.fields:
            captions = caption_lines(self._read(position, "caption"))
            sample["caption"] = rng.choice(captions) if training else captions[0]
        if "label" in self.fields:
            sample["label"] = int(self._labels[position])
        return sample

    def _report_255(self) -> None:
        with self._reporting:  # one warning, even if two workers meet the first such maps at once
            if not self._has_255:
                self._has_255.fill_(True)
                logger.warning(
                    "semantic maps of %s have pixels of 255, which some data sets ignore: here it is a class",
                    self.source,
                )

    def _none_readable(self) -> ValueError:
        return ValueError(f"none of the {len(self)} images of the {self.split!r} split in {self.source} can be read")

    @contextmanager
    def _skipping_unreadable(self, position: int) -> Iterator[None]:
        """Flag the image at ``position``, and warn once, if the body fails to read it."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # about oddities in files that it reads or rejects
                yield
        except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
            if is_of_the_machine(error):
                raise
            with self._reporting:  # one warning, even if two workers read the same file at once
                if not self.unreadable_flags[position]:
                    self.unreadable_flags[position] = True
                    logger.warning("skipped unreadable image %s (%s)", self._name(position), why_unreadable(error))


def left_out_note(*splits: object) -> str:
    """Return `; left out: 3 files (...)` of the splits of a data set; empty if nothing is known to be left out."""
    datasets = [split for split in splits if isinstance(split, ImageFileDataset)]
    sources = {source: reasons for dataset in datasets for source, reasons in dataset.left_out.items()}
    # Both splits may have searched the same folder or shard, which counts once.
    reasons = sum(map(Counter, sources.values()), Counter(unreadable=sum(dataset.unreadable for dataset in datasets)))
    text = left_out_text(reasons)
    return text and f"; left out: {text}"


def _mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
