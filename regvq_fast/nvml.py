"""GPU state from NVML: clocks, power, temperature, memory; needs the package nvidia-ml-py."""

from collections.abc import Callable
from typing import Any

import torch

State = dict[str, Any] | None

# Bits of nvmlClocksThrottleReasons (nvml.h): why the clocks are not higher.
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
    """Why a GPU's clocks are not higher, by NVML's bits; empty where nothing holds them back."""
    return [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]


def gpu_state(device: torch.device | None = None) -> tuple[str | None, Callable[[], State], str | None]:
    """The driver's version, a function that reads clocks, power and temperature, and why they can't be read, if so.

    Of the current GPU unless ``device`` is another. Without nvidia-ml-py the first is None, and so is every reading.
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
        except pynvml.NVMLError:  # not every GPU tells everything
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
