"""Data sets, which map a global sample index to a sample deterministically, and their batches.

:mod:`regvq_fast.data.datasets` opens what ``--data`` names.
"""

from regvq_fast.data.archives import ARCHIVES, Archive, ArchiveDataset, find_archive
from regvq_fast.data.encoded_images import EncodedImages
from regvq_fast.data.folder import ImageFolder
from regvq_fast.data.huggingface import HuggingFaceImages, HuggingFaceStream
from regvq_fast.data.image_dataset import ImageDataset
from regvq_fast.data.loading import TimedBatches, default_workers, training_batches, validation_batches
from regvq_fast.data.samples import Batch, Crop, Field, Sample, Split
from regvq_fast.data.shards import ImageShards, write_shards
from regvq_fast.data.tiles import Tiling, decode_tokens, tokenize_images
from regvq_fast.data.tokens import TokenBatch, TokenDataset, TokenSample, majority_vote, tokenize_batch
from regvq_fast.data.transforms import to_float, to_uint8

__all__ = [
    "ARCHIVES",
    "Archive",
    "ArchiveDataset",
    "Batch",
    "Crop",
    "EncodedImages",
    "Field",
    "HuggingFaceImages",
    "HuggingFaceStream",
    "ImageDataset",
    "ImageFolder",
    "ImageShards",
    "Sample",
    "Split",
    "Tiling",
    "TimedBatches",
    "TokenBatch",
    "TokenDataset",
    "TokenSample",
    "decode_tokens",
    "default_workers",
    "find_archive",
    "majority_vote",
    "to_float",
    "to_uint8",
    "tokenize_batch",
    "tokenize_images",
    "training_batches",
    "validation_batches",
    "write_shards",
]
