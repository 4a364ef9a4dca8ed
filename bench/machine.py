"""Where and with what a benchmark ran: GPU, clocks, versions, commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

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


def describe_gpu() -> dict[str, Any]:
    """The current GPU as PyTorch sees it."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }


def describe_software() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def throttle_reasons(bits: int) -> list[str]:
    return [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]


def gpu_state() -> tuple[str | None, Callable[[], State], str | None]:
    """The driver's version, a function that reads clocks, power and temperature, and why they can't be read, if so.

    They come from NVML through the package nvidia-ml-py; without it the first is None, and so is every reading.
    """
    try:
        import pynvml
    except ImportError:
        return None, lambda: None, "no clocks, power, temperature or driver version: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
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
        return {
            "sm_mhz": reading(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_mhz": reading(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "celsius": reading(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            "throttled_by": None if bits is None else throttle_reasons(bits),
        }

    return driver, read, None
