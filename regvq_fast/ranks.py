"""The processes of a distributed run, as ``torchrun`` starts them, and what they tell each other.

Every function here is that of one process alone where there are no others, and costs nothing then.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to ``num_ranks() - 1``; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the run's processes for the time of the block: NCCL on GPUs, gloo on CPUs; nothing without ``torchrun``."""
    if not is_torchrun():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of equally shaped tensors of all ranks, without a gradient."""
    if num_ranks() == 1:
        return value
    return sum_over_ranks(value) / num_ranks()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of equally shaped tensors of all ranks, without a gradient."""
    if num_ranks() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Equally many rows (M, ...) of every rank, in the order of the ranks, without a gradient; (ranks * M, ...)."""
    if num_ranks() == 1:
        return rows
    everybody = rows.new_empty(num_ranks() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everybody, rows.detach().contiguous())
    return everybody
