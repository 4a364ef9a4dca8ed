"""Speed of a run and utilization of the device: operations of a step, peak rate, power and memory."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regvq_fast.nvml import State, gpu_state
from regvq_fast.ranks import world_size

# Dense matrix products in TFLOP/s, by a substring of the GPU's name and the type; the first match counts. From NVIDIA's
# data sheets: half of the rates with sparsity, SXM unless the name says otherwise. fp32 means TF32, which
# precision.configure_backends enables; V100 has no TF32.
_PEAK_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250, torch.float16: 2250, torch.float32: 1125},
    "H200 NVL": {torch.bfloat16: 835, torch.float16: 835, torch.float32: 418},
    "H200": {torch.bfloat16: 989, torch.float16: 989, torch.float32: 495},
    "H100 NVL": {torch.bfloat16: 835, torch.float16: 835, torch.float32: 418},
    "H100 PCIe": {torch.bfloat16: 756, torch.float16: 756, torch.float32: 378},
    "H100": {torch.bfloat16: 989, torch.float16: 989, torch.float32: 495},
    "A100": {torch.bfloat16: 312, torch.float16: 312, torch.float32: 156},
    "L40S": {torch.bfloat16: 362, torch.float16: 362, torch.float32: 183},
    "V100": {torch.float16: 125, torch.float32: 15.7},
}


class DeviceMonitor:
    """Power, clocks and memory of a GPU; nothing on a CPU or without NVML.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._metadata = device, dict[str, str]()
        self._read: Callable[[], State] = lambda: None
        if device.type == "cuda":
            driver, self._read, problem = gpu_state(device)
            self._metadata = {"driver": problem or str(driver)}

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return the device's name, and for a GPU its driver version or why its state can't be read."""
        return "CPU" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device), self._metadata

    def read(self) -> dict[str, float]:
        """Return power (W), clock (MHz), temperature (degrees Celsius), memory in use and this process's peak (GiB)."""
        state = self._read() or {}
        names = ("power_w", "sm_mhz", "celsius", "memory_used_gib")
        values = {name: float(state[name]) for name in names if state.get(name) is not None}
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return values


class Utilization:
    """Model FLOPs utilization (MFU): counted operations over the peak rate of all GPUs.

    Args:
        device: of the run.
        dtype: of autocast; None: fp32.
        flops_per_image: counts the operations of a step, given its number.
        kind: returns the kind of a step, given its number; operations are counted once per kind.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        flops_per_image: Callable[[int], float],
        kind: Callable[[int], object],
    ) -> None:
        self._peak, self._count, self._kind = peak_flops(device, dtype), flops_per_image, kind
        self._flops: dict[object, float] = {}

    def __call__(self, step: int, images_per_second: float) -> dict[str, float]:
        """Return {"mfu": utilization} of a step at this speed; empty if the device's peak is unknown."""
        if self._peak is None:
            return {}
        if (kind := self._kind(step)) not in self._flops:
            self._flops[kind] = self._count(step)
        return {"mfu": images_per_second * self._flops[kind] / (self._peak * world_size())}


class Clock:
    """Images per second and waiting for data, over windows that end with a reading or a restart.

    Args:
        waited: returns the seconds spent waiting since its last call.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        self._waited = waited
        self._seconds, self._images = 0.0, 0  # of representative windows
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self._waited()
        self._begin, self.images = time.perf_counter(), 0

    def read(self, *, representative: bool) -> tuple[float, float]:
        """Return images per second and the fraction of time spent waiting for data in the window; begin a new one.

        Args:
            representative: count the window in `average`.
        """
        elapsed, images, waited = time.perf_counter() - self._begin, self.images, self._waited()
        if representative:
            self._seconds, self._images = self._seconds + elapsed, self._images + images
        self.restart()
        return images / elapsed, waited / elapsed

    @property
    def average(self) -> float:
        """Images per second over all representative windows; NaN if there is none."""
        return self._images / self._seconds if self._images else float("nan")


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Return the peak rate of the device in operations per second; None if it is unknown.

    Args:
        device: of the run.
        dtype: of autocast; None: fp32, with TF32 products if the device has them.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in _PEAK_TFLOPS.items() if part in name), {})
    rate = rates.get(dtype or torch.float32)
    return None if rate is None else rate * 1e12


def count_flops(step: Callable[[], object]) -> int:
    """Count the operations of matrix products and convolutions in one call of ``step``, forward and backward.

    The ops of this project count the operations of their formulas, without what a kernel recomputes; each op's file has
    its count. Recomputation by activation checkpointing is not counted, either.
    """
    with _FlopCounter() as counter:
        step()
    return counter.flops


class _FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode without its bookkeeping by module, whose hooks fail for gradients of leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            return result  # a forward pass inside backward: activation checkpointing
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
