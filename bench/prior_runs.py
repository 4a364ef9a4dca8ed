"""What the benchmarks of the two priors share: sizes and cases, how they are measured and compared."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import measuring
import pytest
import torch
from torch import Tensor, nn

from regvq_fast.precision import Precision

NUM_CODES, NUM_TOKENS = 1024, 256
REPEATS = 5


class Size(NamedTuple):
    """A network, and the images of a batch."""

    device: str
    width: int
    depth: int
    heads: int
    images: int
    steps: int = 0
    """T of the diffusion sampler."""


def pairs(modes: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(size, mode) of a table of modes by size."""
    return [(size, mode) for size, names in modes.items() for mode in names]


def need_device(device: str) -> None:
    """Skips the test where there is no GPU for it."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the paper's size needs a CUDA GPU")


def training_step(network: nn.Module, precision: Precision, loss: Callable[[], Tensor]) -> measuring.Run:
    """A loss, its gradients and the update of AdamW."""
    optimizer, scaler = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True), precision.scaler()

    def step() -> None:
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


class Benchmark(NamedTuple):
    """A part of a prior's work, measured at several sizes in several modes."""

    op: str
    part: str
    sizes: dict[str, Size]
    make: Callable[[str, str], measuring.Run]
    """Of a size and a mode."""
    more: str = ""
    """What its description has to say beside the size."""

    def measure(self, measure_step: Callable[..., None], size: str, mode: str) -> None:
        """Time one of them, in a group with its twins."""
        device, width, depth, _, images, steps = self.sizes[size]
        detail = f"{NUM_TOKENS} tokens, width {width}, {depth} blocks{self.more.format(steps=steps)}"
        info = {"op": self.op, "part": self.part, "images": images, "detail": detail, "competitor": mode}
        group = f"{self.op} prior, {self.part}, {images} images of {detail}, {device}"
        measure_step(group, functools.partial(self.make, size, mode), info, device)


def compare(make: Callable[[str, str], measuring.Run], size: str, *modes: str) -> dict[str, float]:
    """Median seconds of runs on a CPU that take turns."""
    seconds = measuring.medians({mode: make(size, mode) for mode in modes}, REPEATS, warm_ups=2)
    print(f"\n{size}: " + ", ".join(f"{mode} {time:.4g} s" for mode, time in seconds.items()))
    return seconds
