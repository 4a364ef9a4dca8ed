"""Training data of a prior, from its folder: names of class ids, words and examples of captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from regvq_fast.config import read_config
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.image_dataset import ImageDataset
from regvq_fast.data.token_cache import read_info
from regvq_fast.data.tokens import TokenDataset
from regvq_fast.priors.config import PriorConfig
from regvq_fast.priors.diffusion.text import words_of
from regvq_fast.scenes.embedded import is_embedded

_CHUNK = 4096  # samples of a cache read at once


@dataclass(frozen=True)
class TrainedOn:
    """Training data of a prior."""

    kind: type[ImageDataset] | None
    """Class of the data set; None: unknown."""
    cache: Path | None
    """Token cache; None if there was none or it is missing."""

    @classmethod
    def of(cls, run: Path, config: type[PriorConfig]) -> Self:
        """Look up the training data of the prior in a folder; unknown if the folder does not say, or they are missing.

        Args:
            run: the folder.
            config: class of its configuration.
        """
        if is_embedded(run):
            return cls(dataset_class(None), None)
        try:
            tokens = read_config(run, config).tokens
            data = tokens.data if tokens.cache is None else read_info(tokens.cache).data
            return cls(dataset_class(data), tokens.cache)
        except (ValueError, OSError):
            return cls(None, None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class ids in semantic maps; empty if unknown."""
        return self.kind.class_names if self.kind else ()

    def words(self) -> frozenset[str]:
        """Return all words of the training captions; empty if unknown."""
        if self.kind and self.kind.vocabulary:
            return frozenset(words_of(self.kind.vocabulary))
        cached = self._cached("train")
        if cached is None or "caption" not in cached.info.fields:
            return frozenset()
        words: set[str] = set()
        for start in range(0, len(cached), _CHUNK):
            for caption in cached.__getitems__(range(start, min(start + _CHUNK, len(cached))))["caption"]:
                words.update(words_of(caption))
        return frozenset(words)

    def examples(self, field: str, size: int, count: int) -> list[Any]:
        """Return at most ``count`` conditions of the validation split: maps (h, w) uint8, or captions.

        Args:
            field: "segmentation" or "caption".
            size: side of the maps of the embedded scenes; those of a cache have the size of its token grid.
            count: largest number.
        """
        if self.kind is dataset_class(None):
            dataset: Any = build_dataset(None, split="val", image_size=size, length=count)
            return [dataset[k][field] for k in range(count)]
        cached = self._cached("val")
        if cached is None or field not in cached.info.fields:
            return []
        values: Any = cached.__getitems__(range(min(count, len(cached))))
        return list(values[field].unbind() if isinstance(values[field], torch.Tensor) else values[field])

    def _cached(self, split: Any) -> TokenDataset | None:
        try:
            return None if self.cache is None else TokenDataset(self.cache, split)
        except (ValueError, OSError):
            return None
