"""The registry of data sets that ``--data`` may name.

It is not imported by ``regvq_fast.data``, since one data set, the scenes, uses that package.
"""

import os
from collections.abc import Collection

from regvq_fast.data.archives import ArchiveDataset
from regvq_fast.data.folder import ImageFolder
from regvq_fast.data.huggingface import HuggingFaceImages, HuggingFaceStream
from regvq_fast.data.image_dataset import ImageDataset, SplitSettings
from regvq_fast.data.samples import Crop, Field, Split
from regvq_fast.data.shards import ImageShards
from regvq_fast.scenes import ScenesDataset

DATASETS: list[type[ImageDataset]] = [
    ScenesDataset,
    ArchiveDataset,
    HuggingFaceStream,
    HuggingFaceImages,
    ImageShards,
    ImageFolder,  # last: it takes any path
]
"""The first class that recognizes a path opens it."""


def dataset_class(data: str | os.PathLike[str] | None) -> type[ImageDataset]:
    """Return the class of the data set that ``--data`` names; None: the flag is not given."""
    return next(kind for kind in DATASETS if kind.recognizes(data))


def build_dataset(
    data: str | os.PathLike[str] | None,
    *,
    split: Split,
    image_size: int,
    length: int | None = None,
    seed: int = 0,
    crop: Crop = "random-resized",
    flip: bool = True,
    fields: Collection[Field] = (),
) -> ImageDataset:
    """Open a split of the data set that ``--data`` names.

    Args:
        data: path of an official archive, recognized by the names in its top folder
            (:func:`~regvq_fast.data.archives.find_archive`); of tar shards: a tar file, a pattern of tar files with
            braces, or a folder with tar files and no image above them; of a Hugging Face data set, such as parquet
            files, or its name as ``hf:ORGANIZATION/NAME`` (:mod:`regvq_fast.data.huggingface.source`); or of a folder
            of images. None: the embedded scenes.
        split: "train" or "val".
        image_size: height and width of the samples, in pixels.
        length: number of scenes; for images, the largest number of validation images. None: the data set's default.
        seed: determines order, crops, flips and scenes.
        crop, flip: of training images; scenes have neither.
        fields: additional fields of samples of images; scenes always have caption and segmentation.

    Raises:
        ValueError: the folder holds several archives. Otherwise as the data set's constructor.
    """
    settings = SplitSettings(split, image_size, length, seed, crop, flip, fields)
    return dataset_class(data).open(data, settings)
