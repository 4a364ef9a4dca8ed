"""The interface of a data set that ``--data`` may name: a class that implements it and is listed in DATASETS."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.samples import Batch, Crop, Field, Sample, Split


class SplitSettings(NamedTuple):
    """Arguments of :func:`regvq_fast.data.datasets.build_dataset`; a data set ignores those it has no use for."""

    split: Split
    image_size: int
    length: int | None = None
    seed: int = 0
    crop: Crop = "random-resized"
    flip: bool = True
    fields: Collection[Field] = ()


class FieldCounts(NamedTuple):
    """Number of training images, and how many of them have each optional field."""

    images: int
    having: Mapping[Field, int]

    @property
    def usable(self) -> tuple[Field, ...]:
        """Fields that at least 95 % of the images have, which a prior can be conditioned on: few are left out."""
        return tuple(sorted(field for field, count in self.having.items() if count >= 0.95 * self.images > 0))


class Provenance(NamedTuple):
    """Origin of the images of a validation split, for protocols of measurements."""

    data: str
    crop: str = "unknown"
    resize: str = "unknown"
    variant: str = ""
    """Distinguishes splits whose files and whose first and last images are the same."""
    files: Iterable[str | Path] = ()
    """Files that hold the images."""
    root: str = "."
    """Folder that the names of the files are relative to."""


@dataclass(frozen=True)
class TrainedPrior:
    """A trained prior and its tokenizer, as the evaluation of a data set uses them."""

    condition: str
    """Field of the samples that images are conditioned on, or "none"."""
    image_size: int
    seed: int
    """Seed of the data that it was trained on."""
    val_images: int
    """Length of its validation split."""
    reconstruct: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) uint8 to their reconstructions by the tokenizer, uint8."""
    sample: Callable[[Batch, Callable[[int, int], object]], Tensor]
    """Sample images (B, 3, H, W) uint8 under the conditions of a batch; reports sampling steps done and in total."""
    stage: Callable[[str], AbstractContextManager[Callable[[int, int], object]]]
    """Show the progress of a stage, given its name: enters a function of the numbers done and in total."""


class ImageDataset(Dataset[Sample], ABC):
    """One split of a data set of images: samples by global index, as :mod:`regvq_fast.data.samples` defines them.

    A new data set is a subclass and its line in :data:`regvq_fast.data.datasets.DATASETS`.
    """

    num_classes: int | None = None
    """Number of class ids in the semantic maps; None: unknown."""
    class_names: tuple[str, ...] = ()
    """Names of the class ids for legends, where they are the same for all data sets of the class."""
    label_names: tuple[str, ...] = ()
    """Names of the labels, the classes of whole images, by id; of samples with the field "label"."""
    vocabulary: str = ""
    """A text of all words of the captions, where they are the same for all data sets of the class."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the data set, for messages."""

    @classmethod
    @abstractmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        """Return whether ``--data`` names a data set of this class; None: the flag is not given."""

    @classmethod
    @abstractmethod
    def open(cls, data: str | os.PathLike[str] | None, settings: SplitSettings) -> Self:
        """Open a split of what ``--data`` names; raises ValueError or OSError that say what is wrong with it."""

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> "FieldCounts":
        """Count the training images of what ``--data`` names, and those with each field; without an override, none."""
        return FieldCounts(0, {})

    @classmethod
    def evaluate_samples(cls, prior: TrainedPrior) -> Mapping[str, float]:
        """Measure how well samples of a prior show what their conditions state; without an override, nothing.

        Returns:
            Numbers by name, for the summary of the prior's run.
        """
        return {}

    def provenance(self) -> Provenance:
        """Return the origin of the images."""
        return Provenance(self.title)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples in the split; of an epoch in training."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index``; IndexError for a negative one and, in validation, beyond the last."""
