"""Batches of a data set, loaded by worker processes or in a thread."""

import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from regvq_fast.data.samples import Batch, Sample
from regvq_fast.data.workers import OwnBatches, PatientBatches, WorkerLoader, start_worker

Item = TypeVar("Item")

_PREFETCH = 4
"""Batches that each worker prefetches, so that slow reads or large photographs don't delay steps."""


def default_workers(processes: int = 1) -> int:
    """Return the number of loader processes for each of ``processes`` training processes on this machine.

    Half of the cores divided by ``processes``, at least 1 and at most 8; 0 on 2 cores, which training needs itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else max(min(cores // 2 // processes, 8), 1)


class TimedBatches(Iterator[Batch]):
    """Batches, and the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._waited = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._waited += time.perf_counter() - start

    def waited(self) -> float:
        """Return the seconds spent waiting since the last call, including the start of the workers."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the worker processes, or the thread."""
        if isinstance(self._batches, PatientBatches | OwnBatches):
            self._batches.close()


def training_batches(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    start: int = 0,
    stride: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> TimedBatches:
    """Return an endless iterator over batches of samples ``start``, ``start + 1``, ... in this order.

    Batch k holds samples from ``start + k * stride`` on, for any number of workers. Workers start at once and end with
    the iterator; each prefetches 4 batches. Torch's global generator is not used.

    Args:
        dataset: accepts any index >= 0 (a training split).
        batch_size: samples per batch.
        start: first sample; to resume, the number of samples seen.
        stride: samples from one batch to the next. None: the batch size; larger if each rank loads part of a batch.
        workers: loader processes; 0: a thread of this process loads.
        pin_memory: put batches into pinned memory, for asynchronous copies to a GPU.

    Raises:
        ValueError: a batch size below 1, or a negative start or number of workers.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    _check(batch_size, workers)
    sampler = _CountingBatches(batch_size, start, stride or batch_size)
    batches = iter(_loader(dataset, workers, batch_sampler=sampler, pin_memory=pin_memory))
    return TimedBatches(batches)


def validation_batches(
    dataset: Dataset[Sample], batch_size: int, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return all samples of a validation split in order, in batches of which the last may be smaller; reusable.

    Arguments are as in :func:`training_batches`.

    Raises:
        ValueError: a batch size below 1, or a negative number of workers.
    """
    _check(batch_size, workers)
    return _loader(dataset, workers, batch_size=batch_size, pin_memory=pin_memory)


def in_order(dataset: Dataset[Item], workers: int = 0) -> Iterable[Item]:
    """Return the items of a data set unchanged and in order, loaded by worker processes if ``workers`` is not 0."""
    return WorkerLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


def _as_it_is(item: Any) -> Any:
    return item


def collate(samples: Sequence[Sample] | Batch) -> Batch:
    """Stack images, semantic maps and labels, list captions; every sample must have the same keys.

    A batch that the data set itself gathered (``__getitems__``, as TokenDataset) is returned unchanged.
    """
    if isinstance(samples, dict):
        return samples
    batch = Batch(image=torch.stack([sample["image"] for sample in samples]))
    if "segmentation" in samples[0]:
        batch["segmentation"] = torch.stack([sample["segmentation"] for sample in samples])
    if "caption" in samples[0]:
        batch["caption"] = [sample["caption"] for sample in samples]
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def read_samples(dataset: Any, indices: Iterable[int]) -> Batch:
    """Return some samples of a data set as a batch."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(indices))
    return collate([dataset[index] for index in indices])


def first_samples(dataset: Any, most: int) -> Batch:
    """Return the first samples of a data set as a batch: ``most`` of them, but at most 16."""
    return read_samples(dataset, range(min(most, 16)))


def spread_samples(dataset: Any, most: int) -> Batch:
    """Return at most ``most`` samples, spread evenly over a data set, since sorted images begin with one class."""
    count = min(most, len(dataset))
    return read_samples(dataset, [k * len(dataset) // count for k in range(count)])


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def split_batch(batch: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` equal micro-batches of a batch, which ``count`` divides."""
    if count == 1:
        yield dict(batch)
        return
    size = len(next(iter(batch.values()))) // count
    for first in range(0, count * size, size):
        yield {name: values[first : first + size] for name, values in batch.items()}


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
    return WorkerLoader(
        cast(Dataset[Batch], dataset),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=_PREFETCH if workers else None,
        collate_fn=collate,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # DataLoader seeds workers from it, by default from the global one
        **options,
    )
