"""GPU state from NVML: clocks, power, temperature, memory; needs the package nvidia-ml-py."""

from collections.abc import Callable
from typing import Any

import torch

State = dict[str, Any] | None

# Bits of nvmlClocksThrottleReasons (nvml.h): limits of the clocks.
_THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


def throttle_reasons(bits: int) -> list[str]:
    """Return the reasons that limit a GPU's clocks, from NVML's bits; empty if there are none."""
    return [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]


def gpu_state(device: torch.device | None = None) -> tuple[str | None, Callable[[], State], str | None]:
    """Return the driver's version, a function that reads the GPU's state, and a problem if it can't be read.

    The GPU is ``device``, by default the current one. With a problem, the version and all readings are None.
    """
    try:
        import pynvml
    except ImportError:
        return None, lambda: None, "no clocks, power, temperature or driver version: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return None, lambda: None, f"no clocks, power, temperature or driver version: NVML says {error}"

    def reading(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except pynvml.NVMLError:  # not every GPU supports every query
            return None

    def read() -> State:
        power, limit = reading(pynvml.nvmlDeviceGetPowerUsage), reading(pynvml.nvmlDeviceGetEnforcedPowerLimit)
        bits = reading(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        memory = reading(pynvml.nvmlDeviceGetMemoryInfo)
        return {
            "sm_mhz": reading(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_mhz": reading(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "memory_used_gib": None if memory is None else memory.used / 2**30,
            "celsius": reading(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            "throttled_by": None if bits is None else throttle_reasons(bits),
        }

    return driver, read, None
