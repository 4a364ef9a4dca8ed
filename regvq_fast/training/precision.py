"""Mixed precision, switched on in one function."""

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """How the networks compute; quantizer and losses are fp32 in each case."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32 throughout
    reason: str  # one line for people

    def autocast(self) -> torch.autocast:
        """A fresh autocast context; may be entered any number of times."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, active for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose_precision(amp: bool, device: torch.device) -> Precision:
    """bf16 where the device computes in it, else fp16 with loss scaling on a GPU and fp32 on a CPU."""
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
