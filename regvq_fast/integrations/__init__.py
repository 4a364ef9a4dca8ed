"""The fused ops in other people's models: :func:`accelerate` swaps the look-up of the quantizers it knows, in place."""

from regvq_fast.integrations.swapping import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
