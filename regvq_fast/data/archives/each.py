"""Doing something to every picture of an official split, in worker processes."""

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Generic, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from regvq_fast.data.archives.base import Archive
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.loading import in_order
from regvq_fast.data.pictures import Field, Result, is_of_the_machine, patiently, why_unreadable


class Problem(NamedTuple):
    """A picture that something is wrong with."""

    path: str
    reason: str


class EachPicture(Dataset[Result | Problem], Generic[Result]):
    """What ``work`` makes of each picture of a split that is there, or the problem with it; each when it is asked for.

    Args:
        files: the split's pictures, and the fields that ``work`` is to look at.
        work: gets archive, a picture's name and those of the fields that the picture has; may raise anything.
    """

    def __init__(self, files: SplitFiles, work: Callable[[Archive, str, Collection[Field]], Result]) -> None:
        self.archive, self.work = files.archive, work
        # An array: worker processes share its memory, where each would come to have a copy of a list.
        self.names, self.has = np.array(files.names, dtype=np.str_), files.has

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Result | Problem:
        name = str(self.names[index])
        fields = [field for field, there in self.has.items() if there[index]]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # of oddities in files that it reads, or rejects
                return patiently(
                    lambda: self.work(self.archive, name, fields), lambda: self.archive.path(name, "image")
                )
        except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
            if is_of_the_machine(error):
                raise
            return Problem(self.archive.path(name, "image"), why_unreadable(error))

    def results(self, workers: int, description: str, console: Console) -> Iterable[Result | Problem]:
        """All of them in order, behind a progress bar on a terminal."""
        return track(
            in_order(self, workers),
            description,
            total=len(self),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
