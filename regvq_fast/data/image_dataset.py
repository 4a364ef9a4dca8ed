"""The interface of the data sets that ``--data`` may name; their classes are listed in DATASETS."""

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
    """Arguments of :func:`regvq_fast.data.datasets.build_dataset`; a data set ignores those it does not need."""

    split: Split
    image_size: int
    length: int | None = None
    seed: int = 0
    crop: Crop = "random-resized"
    flip: bool = True
    fields: Collection[Field] = ()


class FieldCounts(NamedTuple):
    """Number of training images, and the number of them with each optional field."""

    images: int
    having: Mapping[Field, int]

    @property
    def usable(self) -> tuple[Field, ...]:
        """Fields of at least 95 % of the images, which priors use as conditions: few images are left out."""
        return tuple(sorted(field for field, count in self.having.items() if count >= 0.95 * self.images > 0))


class Provenance(NamedTuple):
    """Origin of the images of a validation split, for protocols of measurements."""

    data: str
    crop: str = "unknown"
    resize: str = "unknown"
    variant: str = ""
    """Distinguishes splits with the same files and the same first and last image."""
    files: Iterable[str | Path] = ()
    """Files that hold the images."""
    root: str = "."
    """Folder to which the names of the files are relative."""


@dataclass(frozen=True)
class TrainedPrior:
    """A trained prior and its tokenizer, for the evaluation by a data set."""

    condition: str
    """Field of the samples that is the condition, or "none"."""
    image_size: int
    seed: int
    """Seed of the training data."""
    val_images: int
    """Length of the validation split."""
    reconstruct: Callable[[Tensor], Tensor]
    """Map images (B, 3, H, W) uint8 to the tokenizer's reconstructions, uint8."""
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
    """Names of the class ids for legends, if all data sets of the class have the same."""
    label_names: tuple[str, ...] = ()
    """Names of the labels, the classes of whole images, by id; of samples with the field "label"."""
    vocabulary: str = ""
    """A text with all words of the captions, if all data sets of the class have the same."""

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
        """Open a split of what ``--data`` names; ValueError or OSError, with one sentence, if it can't be used."""

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> "FieldCounts":
        """Count the training images of what ``--data`` names, and those with each field; by default, none."""
        return FieldCounts(0, {})

    @classmethod
    def evaluate_samples(cls, prior: TrainedPrior) -> Mapping[str, float]:
        """Measure how well samples of a prior match their conditions; by default, return nothing.

        Returns:
            Numbers by name, for the summary of the prior's run.
        """
        return {}

    def provenance(self) -> Provenance:
        """Return the origin of the images."""
        return Provenance(self.title)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples in the split; in training, of an epoch."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index``; IndexError for a negative one and, in validation, beyond the last."""
