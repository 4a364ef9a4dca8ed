"""Data sets that map a global sample index to a sample, deterministically, and their batches."""

from regvq_fast.data.archives import ARCHIVES, Archive, ArchiveDataset, find_archive
from regvq_fast.data.folder import ImageFolder
from regvq_fast.data.loading import (
    TimedBatches,
    build_dataset,
    default_workers,
    training_batches,
    validation_batches,
)
from regvq_fast.data.pictures import Crop, Field
from regvq_fast.data.samples import Batch, Sample, Split
from regvq_fast.data.scenes import CLASSES, ScenesDataset
from regvq_fast.data.shards import ImageShards, write_shards
from regvq_fast.data.tokens import TokenBatch, TokenDataset, TokenSample, majority_vote, tokenize_batch
from regvq_fast.data.transforms import to_float, to_uint8

__all__ = [
    "ARCHIVES",
    "CLASSES",
    "Archive",
    "ArchiveDataset",
    "Batch",
    "Crop",
    "Field",
    "ImageFolder",
    "ImageShards",
    "Sample",
    "ScenesDataset",
    "Split",
    "TimedBatches",
    "TokenBatch",
    "TokenDataset",
    "TokenSample",
    "build_dataset",
    "default_workers",
    "find_archive",
    "majority_vote",
    "to_float",
    "to_uint8",
    "tokenize_batch",
    "training_batches",
    "validation_batches",
    "write_shards",
]
