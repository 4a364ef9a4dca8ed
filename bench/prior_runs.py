"""What the benchmarks of the two priors share: which cases there are, how they are measured and compared."""

from collections.abc import Callable
from typing import Any

import measuring
import pytest
import torch

REPEATS = 5


def pairs(modes: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(size, mode) of a table of modes by size."""
    return [(size, mode) for size, names in modes.items() for mode in names]


def need_device(device: str) -> None:
    """Skips the test where there is no GPU for it."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the paper's size needs a CUDA GPU")


def measure(
    measure_step: Callable[..., None], make: Callable[[], measuring.Run], info: dict[str, Any], device: str
) -> None:
    """Time what ``make`` makes, in a group with its twins."""
    group = f"{info['op']} prior, {info['part']}, {info['images']} images of {info['detail']}, {device}"
    measure_step(group, make, info, device)


def compare(make: Callable[[str, str], measuring.Run], size: str, *modes: str) -> dict[str, float]:
    """Median seconds of runs on a CPU that take turns."""
    seconds = measuring.medians({mode: make(size, mode) for mode in modes}, REPEATS, warm_ups=2)
    print(f"\n{size}: " + ", ".join(f"{mode} {time:.4g} s" for mode, time in seconds.items()))
    return seconds
