"""Processing of every image of an official split, in worker processes."""

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Generic, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.archives.split_files import SplitFiles
from regvq_fast.data.loading import in_order
from regvq_fast.data.reading import Result, is_of_the_machine, patiently, why_unreadable
from regvq_fast.data.samples import Field


class Problem(NamedTuple):
    """An image that cannot be processed."""

    path: str
    reason: str


class EachImage(Dataset[Result | Problem], Generic[Result]):
    """The result of ``work``, or the problem, for each existing image of a split; computed on access.

    Args:
        files: images of the split, and the fields for ``work``.
        work: called with the archive, an image's name and its fields; may raise anything.
    """

    def __init__(self, files: SplitFiles, work: Callable[[Archive, str, Collection[Field]], Result]) -> None:
        self.archive, self.work = files.archive, work
        # An array, whose memory worker processes share; each would copy a list.
        self.names, self.has = np.array(files.names, dtype=np.str_), files.has

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Result | Problem:
        name = str(self.names[index])
        fields = [field for field, there in self.has.items() if there[index]]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # about irregularities in files
                return patiently(
                    lambda: self.work(self.archive, name, fields), lambda: self.archive.path(name, "image")
                )
        except Exception as error:  # Pillow's decoders raise many types of errors for damaged files
            if is_of_the_machine(error):
                raise
            return Problem(self.archive.path(name, "image"), why_unreadable(error))

    def results(self, workers: int, description: str, console: Console) -> Iterable[Result | Problem]:
        """Return all results in order, with a progress bar on a terminal."""
        return track(
            in_order(self, workers),
            description,
            total=len(self),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
