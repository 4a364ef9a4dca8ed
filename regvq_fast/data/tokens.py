"""Samples of tokens, from a cache of ``regvq tokens`` or encoded on the fly.

Both give the same samples: a cache contains the first ``views`` epochs of a training stream in order, so that its
sample g equals the tokens of the images' sample g, for every g below its length.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.samples import Batch, Split, check_index, check_split, shuffled_position
from regvq_fast.data.token_cache import Shard, open_shard, read_info
from regvq_fast.data.transforms import to_float

_MAX_CLASSES = 256


class TokenSample(TypedDict):
    """The tokens of one image, with its conditions."""

    tokens: Tensor
    """(h, w) int64, indices of codes."""
    segmentation: NotRequired[Tensor]
    """(h, w) uint8, class id of each token."""
    caption: NotRequired[str]
    label: NotRequired[int]


class TokenBatch(TypedDict):
    """Samples of tokens, stacked."""

    tokens: Tensor
    """(B, h, w) int64."""
    segmentation: NotRequired[Tensor]
    """(B, h, w) uint8."""
    caption: NotRequired[list[str]]
    label: NotRequired[Tensor]
    """(B,) int64."""


class Tokenizer(Protocol):
    """The tokenizing method of a VQGAN."""

    def tokenize(self, images: Tensor) -> Tensor:
        """Return tokens (B, h, w) int64 of images (B, 3, H, W) float32 in -1..1."""


def tokenize_batch(tokenizer: Tokenizer, batch: Batch, device: torch.device | str = "cpu") -> TokenBatch:
    """Convert a batch of images to a batch of tokens, as a cache has it.

    The host does not wait for the device. Enter autocast around it for mixed precision.

    Args:
        tokenizer: for example a VQGAN.
        batch: images (B, 3, H, W) uint8; optionally semantic maps (B, H, W) uint8, captions and labels (B,).
        device: of the tokenizer.

    Returns:
        Tokens (B, h, w) int64, maps (B, h, w) uint8 by :func:`majority_vote` and labels on ``device``; captions.
    """
    tokens = tokenizer.tokenize(to_float(batch["image"].to(device, non_blocking=True)))
    converted = TokenBatch(tokens=tokens)
    if "segmentation" in batch:
        segmentation = batch["segmentation"].to(device, non_blocking=True)
        converted["segmentation"] = majority_vote(segmentation, (tokens.shape[1], tokens.shape[2]))
    if "caption" in batch:
        converted["caption"] = batch["caption"]
    if "label" in batch:
        converted["label"] = batch["label"].to(device, non_blocking=True)
    return converted


def majority_vote(segmentation: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the most frequent class id in each cell of a grid; the smallest in a tie.

    A pixel belongs to the cell of its centre, in exact integer arithmetic, so the map's sides need not be multiples of
    the grid's. Memory: 1 KiB per cell.

    Args:
        segmentation: (B, H, W) uint8.
        shape: (h, w) of the grid, at least 1 and at most (H, W).

    Returns:
        (B, h, w) uint8, on the device of the map.

    Raises:
        TypeError: not uint8. ValueError: not three dimensions, or a grid that is finer than the map.
    """
    if segmentation.dtype != torch.uint8:
        raise TypeError(f"class ids must be uint8, got {segmentation.dtype}")
    if segmentation.ndim != 3:
        raise ValueError(f"segmentation must be (B, H, W), got {tuple(segmentation.shape)}")
    batch, height, width = segmentation.shape
    if not (1 <= shape[0] <= height and 1 <= shape[1] <= width):
        raise ValueError(f"a map of {height} x {width} pixels has no majority in each of {shape[0]} x {shape[1]} cells")
    rows, columns = (
        (2 * torch.arange(pixels, device=segmentation.device) + 1) * cells // (2 * pixels)
        for pixels, cells in zip((height, width), shape, strict=True)
    )
    cell = rows[:, None] * shape[1] + columns
    votes = (cell * _MAX_CLASSES + segmentation.long()).view(batch, -1)
    counts = torch.zeros(batch, shape[0] * shape[1] * _MAX_CLASSES, dtype=torch.int32, device=segmentation.device)
    counts.scatter_add_(1, votes, torch.ones((), dtype=torch.int32, device=votes.device).expand_as(votes))
    winners = counts.view(batch, *shape, _MAX_CLASSES).argmax(dim=-1)  # the first in a tie
    return winners.to(torch.uint8)


class TokenDataset(Dataset[TokenSample]):
    """The samples of a token cache, memory-mapped.

    Training is endless. With the cache's own ``seed``, the first pass is the cached stream of ``views`` epochs; later
    passes, and those with other seeds, are shuffled over all views of all images. Validation has each sample once, in
    the order of the data set.

    Worker processes open the files themselves. A batch is gathered at once (``__getitems__``, which DataLoader calls),
    as one TokenBatch; see :func:`regvq_fast.data.loading.collate`.

    Args:
        folder: of the cache.
        split: "train" or "val".
        seed: determines the order of training samples.
        tokenizer_hash: required hash of the tokenizer (:func:`regvq_fast.models.weights.weights_hash`); None: any.

    Raises:
        FileNotFoundError: no cache, or a shard is missing.
        ValueError: an unknown split; an incomplete cache, or one of another tokenizer; a damaged file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: Split = "train",
        *,
        seed: int = 0,
        tokenizer_hash: str | None = None,
    ) -> None:
        check_split(split)
        self.folder = Path(folder)
        self.split: Split = split
        self.seed = seed
        self.info = info = read_info(self.folder)
        if not info.complete:
            raise ValueError(f"the token cache {folder} is not complete: run `regvq tokens` again, it goes on")
        if tokenizer_hash is not None and tokenizer_hash != info.tokenizer_sha256:
            raise ValueError(
                f"the token cache {folder} was made by {info.tokenizer} (SHA-256 {info.tokenizer_sha256[:12]}), not by "
                f"this tokenizer ({tokenizer_hash[:12]}): use that one, or make a cache with this one"
            )
        self._opened: list[Shard] | None = self._open()  # now, so that a damaged file is an error here

    def __len__(self) -> int:
        """Return the number of samples in the split; in training, of all views."""
        return self.info.samples(self.split)

    def __getitem__(self, index: int) -> TokenSample:
        """Return sample ``index``; IndexError for a negative one and, in validation, beyond the last."""
        batch = self.__getitems__([index])
        sample = TokenSample(tokens=batch["tokens"][0])
        if "segmentation" in batch:
            sample["segmentation"] = batch["segmentation"][0]
        if "caption" in batch:
            sample["caption"] = batch["caption"][0]
        if "label" in batch:
            sample["label"] = int(batch["label"][0])
        return sample

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """Return the samples at one or more indices, stacked; errors as in ``__getitem__``."""
        if self._opened is None:
            self._opened = self._open()
        locations = [divmod(self._position(index), self.info.shard_samples) for index in indices]
        shards = self._opened
        tokens = np.stack([shards[number].tokens[row] for number, row in locations]).astype(np.int64)
        if tokens.max() >= self.info.num_codes:  # out of range, an embedding on a GPU would end the process
            raise ValueError(
                f"{self.folder} holds the token {tokens.max()}, but its tokenizer has {self.info.num_codes} codes: "
                "a shard is damaged; delete the cache, and make it anew"
            )
        batch = TokenBatch(tokens=torch.from_numpy(tokens))
        if "segmentation" in self.info.fields:
            maps = [cast(Any, shards[number].segmentation)[row] for number, row in locations]
            segmentation = np.stack(maps)
            if segmentation.max() >= (self.info.num_classes or _MAX_CLASSES):  # an embedding, too
                raise ValueError(
                    f"{self.folder} holds the class id {segmentation.max()}, of {self.info.num_classes} classes: "
                    "delete the cache, and make it anew"
                )
            batch["segmentation"] = torch.from_numpy(segmentation)
        if "label" in self.info.fields:
            labels = np.array([cast(Any, shards[number].label)[row] for number, row in locations], dtype=np.int64)
            if labels.min() < 0 or labels.max() >= len(self.info.label_names):  # an embedding, too
                raise ValueError(
                    f"{self.folder} holds labels from {labels.min()} to {labels.max()}, of "
                    f"{len(self.info.label_names)} classes: a shard is damaged; delete the cache, and make it anew"
                )
            batch["label"] = torch.from_numpy(labels)
        if "caption" in self.info.fields:
            try:
                batch["caption"] = [shards[number].caption_of(row) for number, row in locations]
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.folder} holds a caption that is not UTF-8 ({error}): a shard is damaged; delete the cache, "
                    "and make it anew"
                ) from None
        return batch

    def _position(self, index: int) -> int:
        """Return the position of sample ``index`` in the cache."""
        count = len(self)
        check_index(index, count, self.split)
        if self.split == "val" or (index < count and self.seed == self.info.seed):
            return index
        return shuffled_position(index, count, self.seed)

    def _open(self) -> list[Shard]:
        return [
            open_shard(self.folder, self.info, self.split, number) for number in range(self.info.num_shards(self.split))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # pickling a mapped file would copy its contents
