"""The fused ops in models of other libraries: :func:`swap_quantizers` swaps the look-up of known quantizers.

:func:`as_taming`, :func:`as_diffusers` and :func:`as_lucidrains` give one of this package's quantizers, such as Reg-VQ,
the interface of those libraries.
"""

from regvq_fast.integrations.forms import as_diffusers, as_lucidrains, as_taming
from regvq_fast.integrations.swapping import Acceleration, accelerate, swap_quantizers

__all__ = ["Acceleration", "accelerate", "as_diffusers", "as_lucidrains", "as_taming", "swap_quantizers"]
