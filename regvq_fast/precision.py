"""Device, out-of-memory errors, mixed precision and backend settings, each in one function."""

import os
from typing import NamedTuple

import torch

from regvq_fast.ranks import is_torchrun, local_rank, local_world_size


def choose_device(name: str) -> torch.device:
    """Return the device that a flag names; "auto" is a GPU if there is one, and under torchrun this process's GPU.

    A GPU with a number becomes the current device, since kernels, cuBLAS's workspace and random states use that.

    Raises:
        ValueError: no such device, or a GPU without kernels in this build of PyTorch.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'--device {name} is not a device; use "auto", "cpu", "cuda" or "cuda:N"') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'--device {name} is not supported; use "auto", "cpu", "cuda" or "cuda:N"')
    if device.type == "cuda":
        if is_torchrun():
            device = torch.device("cuda", local_rank())
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            needed = f" and {local_world_size()} processes need one each" if is_torchrun() else ""
            raise ValueError(f"--device {name}: PyTorch finds {count} CUDA device(s){needed}")
        _check_build(device)
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def _check_build(device: torch.device) -> None:
    built = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if not built:  # a build for CPUs or for ROCm
        return
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < min(built):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} is an sm_{major}{minor}, but PyTorch {torch.__version__} is built "
            f"for sm_{min(built)} and newer only; install a build for CUDA 12.6: "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        )


def inference_device(name: str) -> torch.device:
    """Return the device that a flag names, and make a GPU deterministic, so that commands agree on samples."""
    device = choose_device(name)
    if device.type == "cuda":
        configure_backends(device, deterministic=True)
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class Precision(NamedTuple):
    """Precision of the networks; the losses are fp32 in each case."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32 throughout
    reason: str  # one line for the user

    def autocast(self, *, keep_casts: bool = True) -> torch.autocast:
        """Return a new, reusable autocast context.

        Args:
            keep_casts: cache cast weights until the context ends.
        """
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=keep_casts)

    def scaler(self) -> torch.amp.GradScaler:
        """Return loss scaling, active for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def configure_backends(device: torch.device, deterministic: bool) -> None:
    """Configure cuBLAS and cuDNN for the networks, process-wide; the scores of this project's ops stay fp32.

    fp32 convolutions and products use TF32, with 10 bits of mantissa and fp32's range; mixed precision has 7 to 10
    bits. cuDNN times its algorithms for each new shape and keeps the fastest. ``deterministic`` selects deterministic
    algorithms instead; an operation without one warns.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if device.type == "cuda":  # on other devices "high" may be less precise than TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def choose_precision(amp: bool, device: torch.device) -> Precision:
    """Return bf16 if the device supports it, else fp16 with loss scaling on a GPU and fp32 on a CPU."""
    if not amp:
        return Precision(device, None, "fp32 (mixed precision is off; --amp turns it on)")
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return Precision(device, torch.bfloat16, f"bf16 ({name} has it)")
        return Precision(device, torch.float16, f"fp16 with loss scaling ({name} has no bf16)")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return Precision(device, torch.bfloat16, "bf16 (this CPU has bf16 instructions)")
    return Precision(device, None, "fp32 (this CPU has no bf16 instructions: emulating them would be slower)")
