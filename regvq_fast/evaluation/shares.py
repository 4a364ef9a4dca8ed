"""Division of a split among the ranks."""

from typing import Any

import torch
from torch.utils.data import Subset

from regvq_fast.data.image_files import ImageFileDataset
from regvq_fast.data.loading import validation_batches
from regvq_fast.ranks import rank, sum_over_ranks, world_size


def rank_share(count: int) -> range:
    """Return the indices of this rank's samples among ``count``."""
    return range(*(count * k // world_size() for k in (rank(), rank() + 1)))


def rank_batches(dataset: Any, batch_size: int, workers: int, device: torch.device | str) -> Any:
    """Return batches of this rank's samples of a data set."""
    pin_memory = torch.device(device).type == "cuda"
    return validation_batches(Subset(dataset, rank_share(len(dataset))), batch_size, workers, pin_memory)


def unreadable_images(dataset: Any) -> int:
    """Count the images of a data set that any rank found unreadable, each once; all ranks must call it.

    Several ranks may find the same one: every rank opens the first image, and reads past unreadable ones.
    """
    if not isinstance(dataset, ImageFileDataset):
        return 0
    return int(sum_over_ranks(dataset.unreadable_flags.int()).count_nonzero())
