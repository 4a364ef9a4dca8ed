"""Memory of a run: its peak, and advice after an out-of-memory error."""

from pathlib import Path

import torch

from regvq_fast.config import TrainConfig


def peak_memory(device: torch.device) -> int:
    """Return the peak of the memory allocated on a GPU, or on a CPU of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's ru_maxrss: it starts from the parent process's value.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def memory_limit(device: torch.device) -> int | None:
    """Return the GPU's memory in bytes; None on a CPU, where the system swaps or kills before an allocation fails."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def out_of_memory_advice(config: TrainConfig, device: torch.device, rank_batch: int, *, training: bool = True) -> str:
    """Return a message with the peak and up to two flags that would help.

    Activation checkpointing is not among them for an evaluation (``training`` False), which has no backward pass.
    """
    limit = memory_limit(device)
    peak = f"{peak_memory(device) / 2**30:.1f} GiB" + (f" of {limit / 2**30:.1f} GiB" if limit else "")
    used = config.optimizer.accumulate
    finer = next((k for k in range(used + 1, rank_batch + 1) if rank_batch % k == 0), None)
    flags = {
        "--amp": not config.run.amp and device.type == "cuda",
        "--activation-checkpointing": training and not config.run.activation_checkpointing,
        f"--grad-accum-steps {finer}": finer is not None,
    }
    useful = [flag for flag, helps in flags.items() if helps][:2]
    advice = f"add {' or '.join(useful)}" if useful else "use a smaller --batch-size in a new run"
    return f"out of memory{'' if training else ' in an evaluation'} at a peak of {peak}; {advice}"
