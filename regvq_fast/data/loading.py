"""Batches of a data set, by worker processes where they pay."""

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from regvq_fast.data.folder import Crop, ImageFolder
from regvq_fast.data.samples import Batch, Sample, Split
from regvq_fast.data.scenes import ScenesDataset


def build_dataset(
    data: str | os.PathLike[str] | None,
    *,
    split: Split,
    image_size: int,
    length: int | None = None,
    seed: int = 0,
    crop: Crop = "random-resized",
    flip: bool = True,
) -> ScenesDataset | ImageFolder:
    """The data set that ``--data`` names: a folder of images, or the embedded scenes where it is None.

    ``length`` is the number of scenes or, for a folder, the most validation images to use. ``crop`` and ``flip``
    concern training on a folder. Raises what the data set's constructor raises.
    """
    if data is None:
        return ScenesDataset(split, image_size, length, seed)
    return ImageFolder(Path(data), split, image_size, crop, flip, seed, limit=length)


def default_workers() -> int:
    """Worker processes to use: half of the cores, at most 8; none on 2 cores, which training itself needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(cores // 2, 8)


def training_batches(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    start: int = 0,
    stride: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """An endless iterator over batches of samples ``start``, ``start + 1``, ... in this order.

    Batch k holds samples ``start + k * stride`` and on, whatever the number of workers; ``stride`` is the batch size
    unless the batch is a rank's part of a larger one. To resume, start at the number of samples seen. The data set must
    take any index >= 0 (a training split). Workers start at once and end with the iterator. Draws nothing from torch's
    global generator.

    Raises ValueError for a batch size below 1, or a negative start or number of workers.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    _check(batch_size, workers)
    sampler = _CountingBatches(batch_size, start, stride or batch_size)
    return iter(_loader(dataset, workers, batch_sampler=sampler, pin_memory=pin_memory))


def validation_batches(dataset: Dataset[Sample], batch_size: int, workers: int = 0) -> DataLoader[Batch]:
    """All samples of a validation split in order; the last batch may be smaller. Can be iterated any number of times.

    Raises ValueError for a batch size below 1 or a negative number of workers.
    """
    _check(batch_size, workers)
    return _loader(dataset, workers, batch_size=batch_size)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack images and semantic maps, list captions; every sample must have the same keys."""
    batch = Batch(image=torch.stack([sample["image"] for sample in samples]))
    if "segmentation" in samples[0]:
        batch["segmentation"] = torch.stack([sample["segmentation"] for sample in samples])
    if "caption" in samples[0]:
        batch["caption"] = [sample["caption"] for sample in samples]
    return batch


class _CountingBatches(Sampler[list[int]]):
    def __init__(self, batch_size: int, start: int, stride: int) -> None:
        self.batch_size = batch_size
        self.start = start
        self.stride = stride

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(self.start, self.stride):
            yield list(range(first, first + self.batch_size))


def _check(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")


def _loader(dataset: Dataset[Sample], workers: int, **options: Any) -> DataLoader[Batch]:
    return DataLoader(
        cast(Dataset[Batch], dataset),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # DataLoader seeds its workers from it; the default would be the global one
        **options,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the parent should speak, and end its workers.

    DataLoader itself keeps each worker to one compute thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
