"""diffusers: the ``VectorQuantizer`` of ``VQModel``, of its MoVQ and of Paella's."""

from torch import Tensor

from regvq_fast.integrations.taming_forward import NearestCode


class VectorQuantizer(NearestCode):
    """taming's ``VectorQuantizer2`` as diffusers carries it, with all of its options."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> codes, loss and (None, None, indices), as in ``diffusers.models.autoencoders.vae``."""
        return self._nearest(z)
