"""Memory of a run: its peak, what to do when it was not enough, and the largest batch that fits."""

import gc
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from regvq_fast.config import Config, TrainConfig, override
from regvq_fast.precision import choose_device
from regvq_fast.ranks import num_ranks

if TYPE_CHECKING:
    from regvq_fast.training.task import Task


def peak_memory(device: torch.device) -> int:
    """Bytes: most that were allocated on the GPU, or the most memory this process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_limit(device: torch.device) -> int | None:
    """Bytes of the GPU; None on a CPU, whose system swaps and kills before an allocation fails."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def out_of_memory_advice(config: TrainConfig, device: torch.device, rank_batch: int, *, training: bool = True) -> str:
    """The peak, and the two flags that help most and are not used yet.

    An evaluation (``training`` False) keeps no activations for a backward pass: to checkpoint them doesn't help there.
    """
    limit = memory_limit(device)
    peak = f"{peak_memory(device) / 2**30:.1f} GiB" + (f" of {limit / 2**30:.1f} GiB" if limit else "")
    parts = config.optimizer.accumulate
    finer = next((k for k in range(parts + 1, rank_batch + 1) if rank_batch % k == 0), None)
    flags = {
        "--amp": not config.run.amp and device.type == "cuda",
        "--activation-checkpointing": training and not config.run.activation_checkpointing,
        f"--grad-accum-steps {finer}": finer is not None,
    }
    useful = [flag for flag, helps in flags.items() if helps][:2]
    advice = f"add {' or '.join(useful)}" if useful else "use a smaller --batch-size in a new run"
    return f"out of memory{'' if training else ' in an evaluation'} at a peak of {peak}; {advice}"


def largest_batch(fits: Callable[[int], bool], unit: int = 1) -> int:
    """The largest multiple of ``unit`` that fits, found by doubling and then halving the interval; 0 if none does.

    Args:
        fits: whether a batch of this size does; monotone.
        unit: what a batch size must be a multiple of.
    """
    good, bad = 0, 1
    while fits(bad * unit):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit


def runs_in_memory(function: Callable[[], object], device: torch.device) -> bool:
    """Call ``function``; False where that runs out of memory, which is free again afterwards."""
    try:
        function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    gc.collect()  # outside of the handler, whose traceback holds the tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def find_batch_size(kind: type["Task[Config]"], config: Config) -> None:
    """Find and print the largest ``--batch-size`` of one process with which a step of the run fits; writes nothing.

    Steps are taken without compilation, which would need a minute for each size and takes less memory.

    Raises:
        ValueError: no limit to find, several processes, or not even the smallest batch fits.
    """
    device = choose_device(config.run.device)
    if num_ranks() > 1:
        raise ValueError("--find-batch-size looks at one GPU: run it without torchrun, then multiply by the processes")
    limit = memory_limit(device)
    if limit is None:
        raise ValueError("--find-batch-size needs a GPU: a CPU's memory has no such limit")
    console = Console()
    peaks: dict[int, int] = {}

    def fits(batch_size: int) -> bool:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        def take_steps() -> None:
            # Many steps: whatever joins in the run does so before its last one.
            task = kind(override(config, batch_size=batch_size, compile=False, steps=config.optimizer.steps or 10**6))
            step = max(task.compiles_at())  # where everything takes part
            for number in (step, step + 1):
                task.step(number)
            task.record()  # waits for the device

        with console.status(f"{batch_size} images ..."):
            found = runs_in_memory(take_steps, device)
        peaks[batch_size] = peak_memory(device)
        verdict = f"peak {peaks[batch_size] / 2**30:.2f} of {limit / 2**30:.2f} GiB" if found else "out of memory"
        console.print(f"{batch_size:>8} images  {verdict}", highlight=False)
        return found

    best = largest_batch(fits, config.optimizer.accumulate)
    if best == 0:
        raise ValueError(
            f"a batch of {config.optimizer.accumulate} does not fit into {limit / 2**30:.1f} GiB; "
            "add --activation-checkpointing, or make the model smaller"
        )
    console.print(f"largest batch of one process: --batch-size {best}", highlight=False)
