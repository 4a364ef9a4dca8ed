"""Base class of the data sets of image files, for example in folders or tar shards."""

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
"""Fraction of the images held out for validation if the data have no splits."""
OVERSAMPLING: dict[Split, float] = {"train": 1.5, "val": 3.0}
"""A JPEG is decoded at reduced size if the crop then has at least this many times the sample's width and height.

PSNR of 256-pixel samples of detailed photographs against full decoding: 44 dB at 1.5, similar to the loss of JPEG at
quality 90 (45 dB); 52 dB at 3, a third of a level, so that validation hardly depends on it.
"""
_IGNORED = 255
"""Id of pixels without a class in maps of PASCAL VOC and others."""
CROP = "largest central square"
RESIZE = "Lanczos with antialiasing (Pillow)"


class ImageFileDataset(ImageDataset):
    """Square uint8 RGB images cropped from image files, with captions, labels and semantic maps if requested.

    A subclass defines how to find its images (:meth:`_find`) and to read their files (:meth:`_read`).

    Undecodable files are skipped: each causes one warning in the logger "regvq_fast", and the next readable image of
    the list replaces it. They are found on first use, so that opening a large data set is fast. If the storage fails
    and not the file (:func:`is_of_the_machine`), reading is repeated a few times, then raises.

    An image's captions are the lines of its caption file, without empty and repeated ones. Training samples one of
    them, as a function of (seed, index); validation uses the first. An image without a caption is skipped like an
    undecodable one. Class ids that the source declares as mirror pairs (a face's left and right eye) are exchanged in
    the maps of mirrored images.

    A sample has ``image`` (3, image_size, image_size) uint8 and, if requested, ``segmentation`` (image_size,
    image_size) uint8, ``caption`` str and ``label`` int.

    Args:
        source: what the subclass reads.
        split: "train": endless, every image once an epoch in shuffled order. "val": each image once, central crop.
        image_size: height and width in pixels of the samples.
        crop: of training images. "random-resized": 50 to 100 % of the area of the largest square that fits, aspect
            0.9 to 1.1, anywhere in the image. "center": that square itself, in the middle. Resized with Lanczos.
        flip: mirror training images with probability 1/2.
        seed: order, crops and flips are functions of (seed, index) only.
        limit: largest number of validation images, spread evenly over the list. None: all.
        fields: what samples have besides their image. Images that lack one are left out, with a warning.

    Raises:
        ValueError: an unknown split, crop or field; an image size or a limit below 1; none of the images can be read
            (also on a later access, when the last one fails).
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: Split = "train",
        image_size: int = 256,
        crop: Crop = "random-resized",
        flip: bool = True,
        seed: int = 0,
        limit: int | None = None,
        fields: Collection[Field] = (),
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
        """Counts of unused files that look like images, by reason, for each folder or shard."""
        self._labels = np.empty(0, dtype=np.int32)  # of the split's images, if samples have labels
        self._has_255 = torch.zeros((), dtype=torch.bool).share_memory_()
        self._reporting = multiprocessing.get_context("spawn").Lock()  # works with every start method
        self._maps_fit = False  # True: maps must be as large as their images, not only of the same aspect ratio
        manifest = read_manifest(self.source)
        # Images whose maps have other class ids count as unreadable.
        self.num_classes = len(manifest.classes) or None if manifest else None
        self._mirrored_ids = mirrored_ids(manifest.mirror_pairs if manifest else ())
        self._stated_labels = manifest.label_names if manifest else ()
        self._find()

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
        """Count the training images, and those with each field; 0 for fields that no validation image has."""
        train, val = (cls.open(data, SplitSettings(split, image_size=1)) for split in get_args(Split))
        held_out = val._having()
        having = {field: count if held_out[field] else 0 for field, count in train._having().items()}
        return FieldCounts(len(train), having)

    # ----------------------------------------------------------------------------------------- for subclasses to define

    @abstractmethod
    def _find(self) -> None:
        """List the images in a fixed order, select those of the split (:meth:`_choose`), and call :meth:`_start`."""

    @abstractmethod
    def _read(self, position: int, part: Part) -> bytes:
        """Return the file with this part of the image at ``position`` of the split's list."""

    @abstractmethod
    def _name(self, position: int) -> str:
        """Return the name of the image at ``position``, for messages."""

    @abstractmethod
    def _files(self) -> Iterable[str | Path]:
        """Return the files that hold the images of the split."""

    @abstractmethod
    def _having(self) -> Mapping[Field, int]:
        """Return the number of the split's images with each field; called on a split opened without fields."""

    def _choose(self, hashes: NDArray[np.uint32] | None, count: int) -> NDArray[np.int64]:
        """Return the positions of the split's images among ``count`` >= 1.

        ``hashes`` are of their names; None: all images belong to this split. Otherwise the 5 % with the lowest hashes
        are for validation, so that adding images moves none between the splits.
        """
        chosen = np.arange(count)
        if hashes is not None and count == 1:
            warnings.warn(f"{self.source} holds one image: it serves both training and validation", stacklevel=4)
        elif hashes is not None:
            low = np.count_nonzero(hashes < HOLD_OUT * 2**32)
            held_out = np.zeros(count, dtype=bool)
            held_out[np.argsort(hashes, kind="stable")[: min(max(low, 1), count - 1)]] = True
            chosen = np.flatnonzero(held_out == (self.split == "val"))
        if self.split == "val" and self.limit is not None and self.limit < len(chosen):
            chosen = chosen[np.arange(self.limit) * len(chosen) // self.limit]
        return chosen

    def _complete(self, has: Sequence[NDArray[np.bool_]], count: int) -> NDArray[np.int64]:
        """Return the positions of the images with all requested fields; a warning counts the others."""
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
        """Finish the set-up with ``count`` images, and check that one of them can be opened."""
        # One flag per image, in memory that the parent and all worker processes share.
        self.unreadable_flags = torch.zeros(count, dtype=torch.bool).share_memory_()
        for candidate in range(count):  # reads the header only; usually the first one is readable
            with self._skipping_unreadable(candidate), Image.open(BytesIO(self._read(candidate, "image"))):
                return
        raise self._none_readable()

    # -------------------------------------------------------------------------------------------------------- samples

    def __len__(self) -> int:
        """Return the number of images in the split, including unreadable ones."""
        return len(self.unreadable_flags)

    @property
    def title(self) -> str:
        return self.source

    def provenance(self) -> Provenance:
        # The fields are included, since images without them are left out.
        title = os.path.abspath(self.source) if self.title == self.source else self.title
        return Provenance(title, CROP, RESIZE, " ".join(sorted(self.fields)), self._files(), self.source)

    @property
    def unreadable(self) -> int:
        """Number of images found unreadable so far, in all processes of this rank."""
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
        with self._reporting:  # one warning, even if two workers read such maps at once
            if not self._has_255:
                self._has_255.fill_(True)
                logger.warning(
                    "semantic maps of %s have pixels of 255, which some data sets ignore: here that is a class",
                    self.source,
                )

    def _none_readable(self) -> ValueError:
        return ValueError(f"none of the {len(self)} images of the {self.split!r} split in {self.source} can be read")

    @contextmanager
    def _skipping_unreadable(self, position: int) -> Iterator[None]:
        """Flag the image at ``position``, with one warning, if the body fails to read it."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # about irregularities in files
                yield
        except Exception as error:  # Pillow's decoders raise many types of errors for damaged files
            if is_of_the_machine(error):
                raise
            with self._reporting:  # one warning, even if two workers read the same file at once
                if not self.unreadable_flags[position]:
                    self.unreadable_flags[position] = True
                    logger.warning("skipped unreadable image %s (%s)", self._name(position), why_unreadable(error))


def left_out_note(*splits: object) -> str:
    """Return the text `; left out: 3 files (...)` for the splits of a data set; empty if no files are left out."""
    datasets = [split for split in splits if isinstance(split, ImageFileDataset)]
    sources = {source: reasons for dataset in datasets for source, reasons in dataset.left_out.items()}
    # A folder or shard that both splits searched counts once.
    reasons = sum(map(Counter, sources.values()), Counter(unreadable=sum(dataset.unreadable for dataset in datasets)))
    text = left_out_text(reasons)
    return text and f"; left out: {text}"


def _mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
