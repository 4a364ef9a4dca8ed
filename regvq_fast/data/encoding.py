"""Encoding of a data set into the shards of a token cache."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from regvq_fast.data.loading import validation_batches
from regvq_fast.data.samples import Sample, Split
from regvq_fast.data.token_cache import CacheInfo, shard_path, token_type, write_shard
from regvq_fast.data.tokens import TokenBatch, Tokenizer, tokenize_batch
from regvq_fast.precision import Precision


class ShardEncoder:
    """Writes shards of a token cache.

    Args:
        tokenizer: on the device of the precision.
        folder: of the cache.
        info: of the cache.
        precision: of the tokenizer.
        batch_size: images encoded at once.
        workers: of the loader.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: Path, info: CacheInfo, precision: Precision, batch_size: int, workers: int
    ) -> None:
        self.tokenizer, self.folder, self.info, self.precision = tokenizer, folder, info, precision
        self.batch_size, self.workers = batch_size, workers

    def encode(self, dataset: Dataset[Sample], split: Split, numbers: Sequence[int]) -> Iterator[int]:
        """Write some shards of a split, by ascending number; yield the number of images of each batch."""
        if not numbers:
            return
        device = self.precision.device
        images = _Shards(dataset, self.info, split, numbers)
        batches = validation_batches(images, self.batch_size, self.workers, pin_memory=device.type == "cuda")
        remaining = list(numbers)
        held: list[TokenBatch] = []  # on the device, so that the host waits for it once per shard
        for batch in batches:
            with self.precision.autocast():
                held.append(tokenize_batch(self.tokenizer, batch, device))
            yield len(batch["image"])
            while remaining and _samples(held) >= (size := len(self.info.shard_range(split, remaining[0]))):
                whole = _concatenated(held)
                self._write(split, remaining.pop(0), _slice(whole, 0, size))
                held = [_slice(whole, size, None)]

    def _write(self, split: Split, number: int, batch: TokenBatch) -> None:
        tokens = batch["tokens"].cpu().numpy().astype(token_type(self.info.num_codes))
        segmentation = batch["segmentation"].cpu().numpy() if "segmentation" in self.info.fields else None
        captions = batch["caption"] if "caption" in self.info.fields else None
        labels = batch["label"].cpu().numpy().astype(np.int32) if "label" in self.info.fields else None
        write_shard(shard_path(self.folder, split, number), tokens, segmentation, captions, labels)


class _Shards(Dataset[Sample]):
    """The images of some shards, by ascending number."""

    def __init__(self, dataset: Dataset[Sample], info: CacheInfo, split: Split, numbers: Sequence[int]) -> None:
        self.dataset, self.numbers, self.shard_samples = dataset, numbers, info.shard_samples
        self.count = sum(len(info.shard_range(split, number)) for number in numbers)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        shard, row = divmod(index, self.shard_samples)  # only a split's last shard may have fewer
        return self.dataset[self.numbers[shard] * self.shard_samples + row]


def _samples(batches: Sequence[TokenBatch]) -> int:
    return sum(len(batch["tokens"]) for batch in batches)


def _concatenated(batches: Sequence[TokenBatch]) -> TokenBatch:
    whole: dict[str, Any] = {}
    for name, first in batches[0].items():
        values: list[Any] = [batch[name] for batch in batches]  # type: ignore[literal-required]
        whole[name] = torch.cat(values) if isinstance(first, torch.Tensor) else list(itertools.chain(*values))
    return cast(TokenBatch, whole)


def _slice(batch: TokenBatch, start: int, stop: int | None) -> TokenBatch:
    return cast(TokenBatch, {name: cast(Any, values)[start:stop] for name, values in batch.items()})
