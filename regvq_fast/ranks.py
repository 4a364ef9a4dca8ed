"""The processes of a distributed run, as ``torchrun`` starts them, and their communication.

With a single process every function works without communication. Values of training go over NCCL without a
synchronization; values that the hosts agree on (:func:`any_rank`, :func:`raise_on_all_ranks`,
:func:`all_gather_strings`) go over gloo and never touch a GPU.
"""

import inspect
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regvq_fast.orphans import watch_parent

_OF_ALL = "all ranks stop with this error"
"""Note on an error, added by :func:`raise_on_all_ranks` and read by :func:`reported_by_rank_0`."""


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 to ``world_size() - 1``; rank 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_torchrun() -> bool:
    """Return whether ``torchrun`` started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if is_torchrun() else 0


def local_world_size() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_torchrun() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the run's process group inside the block; without ``torchrun``, do nothing."""
    if not is_torchrun():
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    # A killed torchrun sends no signal. Other launchers may end before their processes.
    over = watch_parent(signal.SIGTERM) if "TORCHELASTIC_RUN_ID" in os.environ else None
    try:
        yield
    finally:
        if over is not None:
            over.set()
        # gloo's thread needs the GIL to free the tensors of the last operation, and destroying the group waits for that
        # thread while holding the GIL: give the thread time to finish.
        time.sleep(0.5)
        dist.destroy_process_group()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of equally shaped tensors of all ranks, without a gradient."""
    if world_size() == 1:
        return value.detach()
    return sum_over_ranks(value) / world_size()


def mean_of_batch(mean: Tensor) -> Tensor:
    """Return the mean of equally shaped tensors of all ranks, with a gradient to this rank's.

    Data-parallel training takes the mean of the ranks' gradients, which is then that of the whole batch.
    """
    return mean if world_size() == 1 else mean + (mean_over_ranks(mean) - mean.detach())


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of equally shaped tensors of all ranks, without a gradient."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (M, ...) of all ranks in order, (ranks * M, ...), without a gradient; M is the same on all."""
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name in newer versions
    gather(gathered, rows.detach().contiguous())
    return gathered


def any_rank(value: int) -> int:
    """Return the largest value of all ranks; hosts wait for each other, but not for their GPUs."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_gather_strings(text: str) -> list[str]:
    """Return the strings of all ranks in order."""
    if world_size() == 1:
        return [text]
    content = text.encode()
    padded = torch.zeros(any_rank(len(content) + 1), dtype=torch.uint8)
    padded[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    length = torch.tensor([len(content)])
    rows = zip(gather_rows(padded[None]), gather_rows(length).tolist(), strict=True)
    return [bytes(row[:end].tolist()).decode() for row, end in rows]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's global generators, one row of bytes for each rank; only dropout uses them."""
    state = {"cpu": gather_rows(torch.get_rng_state()[None])}
    if device.type == "cuda":
        state["cuda"] = gather_rows(torch.cuda.get_rng_state(device)[None])
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the generators; those without a saved state, of a GPU or of an additional rank, stay as they are."""
    if rank() < len(state["cpu"]):
        torch.set_rng_state(state["cpu"][rank()].clone())  # it ignores the storage offset of a view
    if device.type == "cuda" and rank() < len(state.get("cuda", ())):
        torch.cuda.set_rng_state(state["cuda"][rank()], device)


def distributed(module: nn.Module) -> nn.Module:
    """Return the module such that gradients are averaged over the ranks, if there are several."""
    if world_size() == 1:
        return module
    # Buffers are a rank's own (batch statistics) or equal on all ranks, so they are not broadcast.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)  # type: ignore[arg-type]


@contextmanager
def synchronized(*modules: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch the averaging of gradients over ranks for forward passes inside the block on or off."""
    from torch.distributed.fsdp import FSDPModule  # takes half a second, which only training needs

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(enabled)
            elif isinstance(module, DistributedDataParallel) and not enabled:
                stack.enter_context(module.no_sync())
        yield


def check_agreement(values: Mapping[str, str], remedy: str = "all of them need the same files") -> None:
    """Raise ValueError if ranks have different values of a name, with which their losses would differ."""
    for name, value in values.items():
        found = list(dict.fromkeys(all_gather_strings(value)))
        if len(found) > 1:
            raise ValueError(f"the processes have {' and '.join(found)} {name}: {remedy}")


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a ValueError or OSError of the block on all ranks, even if only one rank has it.

    The block must not contain a collective operation, which a rank with an error would miss.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if world_size() > 1:
        sent = "" if error is None else ("value " if isinstance(error, ValueError) else "file ") + str(error)
        first = next(filter(None, all_gather_strings(sent)), None)
        if error is None and first is not None:
            kind, _, message = first.partition(" ")
            error = ValueError(message) if kind == "value" else OSError(message)
        if error is not None:
            error.add_note(_OF_ALL)
    if error is not None:
        raise error


def reported_by_rank_0(error: BaseException) -> bool:
    """Return whether this is not rank 0 and rank 0 raised the same error; also works without the process group."""
    return is_torchrun() and os.environ["RANK"] != "0" and _OF_ALL in getattr(error, "__notes__", ())


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on the others, which find the files that rank 0 wrote."""
    if rank() > 0:
        any_rank(0)
    try:
        yield
    finally:
        if rank() == 0:
            any_rank(0)
