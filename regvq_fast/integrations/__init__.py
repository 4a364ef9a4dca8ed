"""The fused ops in other people's models: :func:`swap_quantizers` swaps the look-up of the quantizers it knows."""

from regvq_fast.integrations.swapping import Acceleration, accelerate, swap_quantizers

__all__ = ["Acceleration", "accelerate", "swap_quantizers"]
