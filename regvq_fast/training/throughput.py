"""How well the device is used: operations of a step, the device's peak, power and memory."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regvq_fast.nvml import State, gpu_state
from regvq_fast.ranks import num_ranks

if TYPE_CHECKING:
    from regvq_fast.training.task import Task

# Dense matrix products, TFLOP/s, by a part of the GPU's name and the type: NVIDIA's data sheets, SXM where there is a
# choice, half of what they give with sparsity. fp32 is TF32, which precision.configure_backends switches on; V100 has
# none. The first match counts.
_PEAK_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250, torch.float16: 2250, torch.float32: 1125},
    "H200": {torch.bfloat16: 989, torch.float16: 989, torch.float32: 495},
    "H100 PCIe": {torch.bfloat16: 756, torch.float16: 756, torch.float32: 378},
    "H100": {torch.bfloat16: 989, torch.float16: 989, torch.float32: 495},
    "A100": {torch.bfloat16: 312, torch.float16: 312, torch.float32: 156},
    "L40S": {torch.bfloat16: 362, torch.float16: 362, torch.float32: 183},
    "V100": {torch.float16: 125, torch.float32: 15.7},
}


class DeviceMonitor:
    """Power, clocks and memory of a GPU for the records; nothing on a CPU, nor where NVML can't be asked.

    Args:
        device: that of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.facts: dict[str, str] = {}
        """What the monitor has to say at the start: which driver, or why there will be no numbers."""
        self._device = device
        self._read: Callable[[], State] = lambda: None
        if device.type == "cuda":
            driver, self._read, problem = gpu_state(device)
            self.facts = {"driver": problem or str(driver)}

    def read(self) -> dict[str, float]:
        """Watts, MHz, degrees Celsius and GiB in use by all processes of the GPU; GiB this one allocated at most."""
        state = self._read() or {}
        names = ("power_w", "sm_mhz", "celsius", "memory_used_gib")
        values = {name: float(state[name]) for name in names if state.get(name) is not None}
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return values


class Utilization:
    """Model FLOPs utilization (MFU) of a task: counted operations over the peak of all GPUs.

    Operations are counted in an extra pass for each kind of step, whose gradients are thrown away; it changes nothing
    that is trained.
    """

    def __init__(self, task: "Task[Any]") -> None:
        self._task = task
        self._flops: dict[tuple[str, ...], float] = {}  # for each sample of a step, by what is trained in it

    def read(self, step: int, images_per_second: float) -> dict[str, float]:
        """The ratio at this speed of the step that was taken last; nothing where the device's peak isn't known."""
        task = self._task
        peak = peak_flops(task.device, task.precision.dtype)
        if peak is None:
            return {}
        active = task.trained_at(step)
        if active not in self._flops:
            self._flops[active] = self._flops_per_sample()
        return {"mfu": images_per_second * self._flops[active] / (peak * num_ranks())}

    def _flops_per_sample(self) -> float:
        task, device = self._task, self._task.device
        inputs = task.inputs(task.read(task.train_set, range(2)))  # two: batch statistics need company
        first = torch.zeros((), dtype=torch.int64, device=device)
        one = torch.ones((), device=device)
        task.update.begin()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            flops = count_flops(
                lambda: task.forward_backward(*inputs, first_image=first, loss_scale=one, synchronize=False, plain=True)
            )
        task.update.undo()
        return flops / len(inputs[0])


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Operations a second that the device can do at most; None where that isn't known.

    Args:
        device: that of the run.
        dtype: of autocast; None: fp32, whose products are TF32 where the device has that.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in _PEAK_TFLOPS.items() if part in name), {})
    rate = rates.get(dtype or torch.float32)
    return None if rate is None else rate * 1e12


def count_flops(step: Callable[[], object]) -> int:
    """Count the operations of the matrix products and convolutions of ``step``, forward and backward; it is run once.

    The ops of this project count what their mathematics needs, whatever a kernel computes again; each has its formula
    in its file. What activation checkpointing computes again doesn't count, either.
    """
    with _FlopCounter() as counter:
        step()
    return counter.flops


class _FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode less its bookkeeping by module, whose hooks fail where gradients are taken of leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            return result  # a forward pass within backward: activation checkpointing
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
