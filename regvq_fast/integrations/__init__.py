"""The fused ops in other people's models: :func:`swap_quantizers` swaps the look-up of the quantizers it knows.

:func:`as_taming`, :func:`as_diffusers` and :func:`as_lucidrains` give a quantizer of ours, Reg-VQ first of all, the
interface that models around those libraries call.
"""

from regvq_fast.integrations.forms import as_diffusers, as_lucidrains, as_taming
from regvq_fast.integrations.swapping import Acceleration, accelerate, swap_quantizers

__all__ = ["Acceleration", "accelerate", "as_diffusers", "as_lucidrains", "as_taming", "swap_quantizers"]
