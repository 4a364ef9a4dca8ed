"""The block of Llama-like image models: RMSNorm, rotary embeddings of the grid, QK-norm, SwiGLU, no biases.

The network is that of LlamaGen (Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", 2024): RMSNorm (Zhang, Sennrich, 2019), rotary embeddings of rows and columns (Su et al., 2021), a gated
MLP (Shazeer, 2020). It differs in two ways: queries and keys are normalized (Henry et al., 2020), and a query has the
position of the token that it predicts (`grid_rotation`).

Shapes: (B, L, C) with L positions and C = width; D = C / heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.model import Checkpointed
from regvq_fast.models.transformer import Attend

_EPS = 1e-5  # added to the mean square, as in LlamaGen
_BASE = 100.0  # of the wavelengths, as usual for grids; 10000 is usual for texts
_HIDDEN_MULTIPLE = 64


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-5) * weight, over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_EPS)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one product.

    The 8 / 3 C hidden channels, rounded up to a multiple of 64, give as many weights as an MLP with 4 C of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention with queries and keys normalized, then rotated by their positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(2, 1, width // heads))  # of each channel, shared by the heads
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Attend, rotation: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C); `rotation` is that of `grid_rotation` for these positions."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        value = qkv[:, :, 2]
        # (B, L, 2, heads, D) in the type of the weights, fp32 under autocast.
        qk = F.rms_norm(qkv[:, :, :2].to(self.qk_gain.dtype), qkv.shape[-1:], eps=_EPS) * self.qk_gain
        query, key = rotate(qk, rotation).to(value.dtype).unbind(2)
        return self.proj(attend(query, key, value).flatten(2))


class LlamaBlock(Checkpointed):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln1 = RMSNorm(width)
        self.ln2 = RMSNorm(width)
        self.attn = RotarySelfAttention(width, heads)
        self.mlp = SwiGLU(width)
        self.drop = nn.Dropout(dropout)

    def layers(self, x: Tensor, attend: Attend, rotation: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        x = x + self.drop(self.attn(self.ln1(x), attend, rotation))
        return x + self.drop(self.mlp(self.ln2(x)))


def rotate(qk: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs of channels (d, d + D/2) of queries and keys (B, L, 2, heads, D) by their angles."""
    cosine, sine = rotation.unbind(2)
    return torch.addcmul(qk * cosine, qk.roll(qk.shape[-1] // 2, dims=-1), sine)


def grid_rotation(condition_shape: Sequence[int], token_shape: Sequence[int], head_dim: int) -> Tensor:
    """Return the cosines and sines with which `rotate` rotates queries and keys at every position of a sequence.

    The sequence is a condition that covers the image, then all tokens but the last. Coordinates are in tokens. A key
    has those of its cell or token; a query has those of the token that it predicts, or before the condition's last
    position those of its cell. A query's product with a key depends on the difference of their coordinates only: the
    cell over a token is at distance 0 from the query that predicts it, and the token above is at (1, 0), even at the
    ends of rows. Half of the pairs of channels rotate by rows, half by columns, by at most one radian per token.

    Returns:
        (1, K + L - 1, 2, 2, 1, D): position; cosine or sine, the sines of the first half of D negative; query or key.
    """
    condition, tokens = (_centers(shape, token_shape) for shape in (condition_shape, token_shape))  # (K, 2), (L, 2)
    queries, keys = torch.cat([condition[:-1], tokens]), torch.cat([condition, tokens[:-1]])
    frequency = _BASE ** -torch.linspace(0, 1, head_dim // 4 + 1, dtype=torch.float64)[:-1]
    angle = (torch.stack([queries, keys], dim=1)[..., None] * frequency).flatten(2)  # (K + L - 1, 2, D / 2)
    cosine, sine = angle.cos(), angle.sin()
    table = torch.stack([torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)], dim=1)
    return table[None, :, :, :, None].to(torch.get_default_dtype())


def _centers(shape: Sequence[int], onto: Sequence[int]) -> Tensor:
    """Return the centers (cells, 2) of a grid's cells, in cells of the grid `onto` over the same image."""
    sides = [
        (torch.arange(cells, dtype=torch.float64) + 0.5) * units / cells - 0.5
        for cells, units in zip(shape, onto, strict=True)
    ]
    return torch.cartesian_prod(*sides)
