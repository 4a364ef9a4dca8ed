"""Set-up of the Triton kernel tests: compiled on a GPU, in Triton's interpreter elsewhere.

The interpreter must be chosen before Triton is imported, which other tests of a process may have done: so a file of
such tests runs once more, in a process of its own. Inputs and expectations are the CPU's in both.
"""

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from regvq_fast.dispatch import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in the interpreter's process")
without_interpreter = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter's process")
if_kernels_are_elsewhere = pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="kernels run in this process")


# Before sm_80 there are neither tensor cores that Triton can use nor bfloat16.
_OLD = DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 0)
SCHEDULES = ("chunked",) if _OLD else ("fused", "chunked")
FLOATS = (torch.float32, torch.float16) if _OLD else (torch.float32, torch.float16, torch.bfloat16)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def in_a_new_process(*command: str, **environment: str) -> str:
    """Run Python, out of the interpreter unless ``environment`` says otherwise; what it prints.

    How the tests are run at large, say on several processes, is not for this one.
    """
    ours = {"TRITON_INTERPRET", "PYTEST_ADDOPTS"}
    env = {name: value for name, value in os.environ.items() if name not in ours} | environment
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pass_in_the_interpreter(file: str) -> None:
    in_a_new_process("-m", "pytest", file, TRITON_INTERPRET="1")


@contextlib.contextmanager
def kernels(schedule: str) -> Iterator[None]:
    """Choose a schedule, and fill new memory with nan (integers: the largest): what a kernel leaves unwritten shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.dict(os.environ, {"REGVQ_SCHEDULE": schedule}):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def patch_dispatch(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Replace a name of ``regvq_fast.dispatch`` there and in every kernel's module that has imported it."""
    for module in ("vector_quantize", "vector_quantize_backward", "assign_codes", "weighted_info_nce"):
        monkeypatch.setattr(f"regvq_fast.kernels.{module}.{name}", value, raising=False)
    monkeypatch.setattr(f"regvq_fast.dispatch.{name}", value)


def set_split(monkeypatch: pytest.MonkeyPatch, codes: int) -> list[int]:
    """Let every split have so many codes, in whole tiles; the list will hold the number of splits of each sweep."""
    numbers = []

    def codes_per_split(num_rows: int, num_codes: int, tile: Tile, *_: Any) -> int:
        split_codes = math.ceil(min(codes, num_codes) / tile.BN) * tile.BN
        numbers.append(math.ceil(num_codes / split_codes))
        return split_codes

    patch_dispatch(monkeypatch, "codes_per_split", codes_per_split)
    return numbers


def surrounded(value: Tensor) -> Tensor:
    """A leaf on the device with the values, strides and alignment of ``value`` between nan (integers and bool: 1).

    A kernel that reads beside its input takes part of that.
    """
    length = 1 + sum(max(0, extent - 1) * stride for extent, stride in zip(value.shape, value.stride(), strict=True))
    beside = torch.nan if value.is_floating_point() else 1
    memory = torch.full((length + 96,), beside, dtype=value.dtype, device=DEVICE)
    place = memory.as_strided(value.shape, value.stride(), 32 + value.storage_offset() % 16)
    return place.copy_(value.detach()).requires_grad_(value.requires_grad)
