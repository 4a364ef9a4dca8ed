"""Search for the largest batch that fits into a GPU's memory."""

import gc
from collections.abc import Callable

import torch
from rich.console import Console

from regvq_fast.config import Config, override
from regvq_fast.precision import choose_device, is_out_of_memory
from regvq_fast.ranks import world_size
from regvq_fast.training.memory import memory_limit, peak_memory
from regvq_fast.training.recipe import Recipe
from regvq_fast.training.trainer import Trainer


def largest_batch(fits: Callable[[int], bool], unit: int = 1) -> int:
    """Return the largest multiple of ``unit`` that fits, by doubling and bisection; 0 if none fits.

    Args:
        fits: returns whether a batch of this size fits; monotone.
        unit: batch sizes are multiples of it.
    """
    good, bad = 0, 1
    while fits(bad * unit):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit


def runs_in_memory(function: Callable[[], object], device: torch.device) -> bool:
    """Call ``function``; return False, with its memory freed, if it runs out of memory."""
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


def find_batch_size(kind: type[Recipe[Config]], config: Config) -> None:
    """Find and print the largest ``--batch-size`` that fits on one GPU. Writes nothing.

    Steps are not compiled: compilation takes a minute for each size, and compiled steps need less memory.

    Raises:
        ValueError: the device is a CPU, there are several processes, or even the smallest batch does not fit.
    """
    device = choose_device(config.run.device)
    if world_size() > 1:
        raise ValueError("--find-batch-size measures one GPU: run it without torchrun, then multiply by the processes")
    limit = memory_limit(device)
    if limit is None:
        raise ValueError("--find-batch-size needs a GPU: on a CPU the system swaps before an allocation fails")
    console = Console()
    peaks: dict[int, int] = {}

    def fits(batch_size: int) -> bool:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        def take_steps() -> None:
            # Without --steps, assume enough steps for every network to take part.
            steps = config.optimizer.steps or 10**6
            trainer = Trainer(kind, override(config, batch_size=batch_size, compile=False, steps=steps))
            last_joins = max((first for first in trainer.networks.first_step.values() if first < steps), default=0)
            for number in (last_joins, last_joins + 1):
                trainer.step(number)
            trainer.record()  # waits for the device

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
