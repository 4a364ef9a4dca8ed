"""Nearest code of feature maps with the identity's gradient, as taming-transformers and its descendants compute it."""

from collections.abc import Callable

from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter, to_rows


class NearestCode(Adapter):
    """Look-up and loss of taming's ``VectorQuantizer2``; its subclasses have the ``forward`` that a library has."""

    embedding: nn.Embedding
    beta: float
    legacy: bool
    remap: str | None
    sane_index_shape: bool
    remap_to_used: Callable[[Tensor], Tensor]

    def _nearest(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> codes (B, D, H, W), loss, (None, None, indices); these (B * H * W,), options aside."""
        rows = to_rows(z)
        indices = self._nearest_codes(rows.flatten(0, 2), self.embedding.weight)
        quantized, loss = codes_and_loss(rows, self.embedding(indices).view(rows.shape), self.beta, self.legacy)
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(rows.shape[:3])
        return quantized, loss, (None, None, indices)


def codes_and_loss(rows: Tensor, codes: Tensor, beta: float, legacy: bool) -> tuple[Tensor, Tensor]:
    """Codes (B, H, W, D) -> maps (B, D, H, W), with the identity's gradient to the rows, and both terms of the loss.

    In the library's own order of operations, so that values are the same to the bit. ``legacy``: beta weighs the
    codebook's term instead of the commitment.
    """
    commitment, codebook = ((codes.detach() - rows) ** 2).mean(), ((codes - rows.detach()) ** 2).mean()
    loss = commitment + beta * codebook if legacy else beta * commitment + codebook
    quantized = rows + (codes - rows).detach()
    return quantized.permute(0, 3, 1, 2).contiguous(), loss
