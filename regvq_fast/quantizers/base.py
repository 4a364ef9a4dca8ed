"""What all quantizers share: their output, their codebook, and the way between feature maps and rows."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regvq_fast.matmul import compute_dtype, score_dtype


class QuantizerOutput(NamedTuple):
    """What a quantizer returns for feature maps (B, D, H, W)."""

    quantized: Tensor
    """(B, D, H, W) with the quantizer's gradient to its input: float32 (float64 from a float64 module); of reg-vq and
    gumbel-vq on a GPU in the type of the scores' products."""
    indices: Tensor
    """(B, H, W) int64, the selected codes."""
    loss: Tensor
    """0-dim float32 or float64: weighted sum of the quantizer's own losses."""
    metrics: dict[str, Tensor]
    """0-dim, detached, for logging."""
    perturbation: Tensor
    """(B, H, W), of that type: |z[index] - z[best_index]|^2; 0 where the selection is deterministic."""
    mask: Tensor
    """(B, H, W) bool, the stochastic positions."""


class Quantizer(nn.Module):
    """A codebook of ``num_codes`` codes of ``code_dim`` channels; subclasses define ``forward``.

    On a GPU rows and codes are multiplied in the type of the maps, 16 bits under autocast, and summed in fp32. Set
    ``fp32_scores`` to multiply them in fp32. Parameters, losses, averages and statistics are in fp32 in any case, and
    so is everything on a CPU.
    """

    fp32_scores = False

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        if num_codes < 1 or code_dim < 1:
            raise ValueError(f"num_codes and code_dim must be at least 1, got {num_codes} and {code_dim}")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.embedding = nn.Embedding(num_codes, code_dim)

    def forward(self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0) -> QuantizerOutput:
        """Select a code for each position of z (B, D, H, W).

        In evaluation that is the best code everywhere. In training, quantizers that draw take the ``seed`` (0-dim
        int64), or one of PyTorch's global generator where none is given; ``row_offset`` is the number of z's first
        position among those of all ranks and parts of a batch. In a distributed run give all ranks the same seed.

        Raises:
            ValueError: maps of another shape, or none; on a CPU nan or inf in them.
        """
        raise NotImplementedError

    def initialize(self, z: Tensor) -> None:
        """Fit a new quantizer to the first latents (B, D, H, W) of a new encoder; some need no such start."""

    def codes(self) -> Tensor:
        """(N, D) the codes that indices stand for."""
        return self.embedding.weight

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of a token map, in the module's type: (B, H, W) int64 -> (B, D, H, W)."""
        return self.codes()[indices].permute(0, 3, 1, 2).to(self.embedding.weight.dtype)

    def set_progress(self, fraction: float) -> None:
        """Called with the part of training done, 0 to 1, before each step; schedules override it."""

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}"

    def _score_dtype(self, z: Tensor) -> torch.dtype:
        """Return the type in which rows of z are multiplied with codes."""
        return score_dtype(z, self.embedding.weight, self.fp32_scores)

    def _to_rows(self, z: Tensor) -> Tensor:
        """(B, D, H, W) -> (B*H*W, D) of the type of :func:`wide`; no copy for channels_last fp32 maps."""
        if z.ndim != 4 or z.shape[1] != self.code_dim:
            raise ValueError(f"the quantizer takes (B, {self.code_dim}, H, W) maps, got {tuple(z.shape)}")
        if z.numel() == 0:
            raise ValueError(f"the quantizer needs a position at least: there is none in maps of {tuple(z.shape)}")
        return z.to(compute_dtype(self.embedding.weight)).permute(0, 2, 3, 1).reshape(-1, self.code_dim)

    @staticmethod
    def _to_maps(rows: Tensor, z: Tensor) -> Tensor:
        """(B*H*W, D) -> (B, D, H, W) in channels_last, or (B*H*W,) -> (B, H, W), with the sizes of z."""
        batch, _, height, width = z.shape
        if rows.ndim == 1:
            return rows.view(batch, height, width)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _deterministic(
        self, z: Tensor, quantized: Tensor, indices: Tensor, loss: Tensor, commitment: Tensor
    ) -> QuantizerOutput:
        """Output of a selection without noise, of rows as maps with the sizes of ``z``."""
        index_map = self._to_maps(indices, z)
        return QuantizerOutput(
            self._to_maps(quantized, z),
            index_map,
            loss,
            {"commitment": commitment.detach()},
            torch.zeros_like(index_map, dtype=quantized.dtype),
            torch.zeros_like(index_map, dtype=torch.bool),
        )


def wide(parameter: Tensor) -> Tensor:
    """A parameter in float32, or in float64 if that is its type: what quantizers compute in."""
    return parameter.to(compute_dtype(parameter))


def straight_through(rows: Tensor, codes: Tensor) -> Tensor:
    """``codes`` forward, the identity to ``rows`` backward.

    Called before the losses of the rows it saves a copy of them: backward comes to it last, and adds its gradient to
    the losses' instead of adding theirs to its own, which belongs to the decoder.
    """
    return rows + (codes - rows).detach()


def draw_seed(device: torch.device) -> Tensor:
    """A 0-dim int64 seed from PyTorch's global generator of the device."""
    return torch.randint(torch.iinfo(torch.int64).max, (), device=device)
