"""Layers of the transformers: attention, block, initialization, and checks of sizes and ids.

The block is minGPT's, as in taming-transformers: pre-LayerNorm, exact GELU. It is used by the priors
(`.autoregressive.model`, `.diffusion.model` and `.maskgit.model` of `regvq_fast.priors`) and by the text encoder
(`regvq_fast.priors.diffusion.text`).

Shapes: (B, L, C) with L positions and C = width; ids (B, h, w), in row-major order (B, L) with L = h * w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.model import Checkpointed

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value (B, L, heads, head_dim) to the same shape

INIT_STD = 0.02
"""Standard deviation of initial weights."""


class SelfAttention(nn.Module):
    """Multi-head self-attention; one product gives query, key and value, in this order."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.dropout(self.proj(attend(query, key, value).flatten(2)))


class Block(Checkpointed):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def layers(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        x = x + self.attn(self.ln1(x), attend)
        return x + self.mlp(self.ln2(x))


def initialize(module: nn.Module) -> None:
    """Initialize a module as minGPT: N(0, 0.02) in linear layers and embeddings, biases 0; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def grid_sinusoids(shape: tuple[int, int], width: int) -> Tensor:
    """Return initial position embeddings (h * w, C) of a grid, with the mean square of `initialize`.

    Half of the channels depend on the row, half on the column: sines and cosines with frequencies from half a period
    per grid to half a period per position.
    """
    bands = max(1, width // 4)
    frequency = math.pi * max(shape) ** torch.linspace(0, 1, bands)

    def waves(length: int) -> Tensor:  # (length, 2 * bands)
        angle = ((torch.arange(length) + 0.5) / length)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    rows, columns = (waves(length) for length in shape)
    grid = torch.cat([rows[:, None].expand(-1, shape[1], -1), columns.expand(shape[0], -1, -1)], dim=2)
    # sqrt(2): the mean square of a sine is 1/2.
    return INIT_STD * math.sqrt(2) * F.pad(grid, (0, max(0, width - 4 * bands)))[..., :width].flatten(0, 1)


def check_sizes(sizes: Mapping[str, int], dropout: float = 0.0) -> None:
    """Check the sizes of a transformer, among them "width" and "heads".

    Raises:
        ValueError: a size below 1, a width that is not a multiple of the heads, a dropout outside [0, 1).
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    width, heads = sizes["width"], sizes["heads"]
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width {width} and {heads} heads")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def grid_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape (h, w) of a grid of ids as a tuple; ValueError with `name` if it is invalid."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} must be (height, width), each at least 1, got {tuple(shape)}")
    return shape[0], shape[1]


def flat_ids(name: str, ids: Tensor, shape: tuple[int, int], limit: int) -> Tensor:
    """Return ids (B, h, w) or (B, h * w) of the grid `shape` (h, w) as (B, h * w).

    Raises:
        ValueError: another shape; on a CPU also ids outside [0, limit) (CUDA is not checked, to avoid synchronizing).
        TypeError: not int64.
    """
    length = math.prod(shape)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.shape[1:] not in (shape, (length,)):
        raise ValueError(f"{name} must be (B, {shape[0]}, {shape[1]}) or (B, {length}), got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        smallest, largest = (int(bound) for bound in ids.aminmax())
        if smallest < 0 or largest >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got ids from {smallest} to {largest}")
    return ids.flatten(1)
