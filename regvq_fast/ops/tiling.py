"""Tiles of rows of the PyTorch fallbacks: their size, a row's maximum, and how many scores outlive the forward."""

import torch
from torch import Tensor

# Elements of one tile of scores, rows x codes; the memory of a call does not depend on M. On a CPU 4 MiB in fp32: a
# tile and its few temporaries stay in the caches, and its hundred calls and the packing of the codes for its products
# weigh little. On a GPU 64 MiB, since the fallback is a hundred launches a tile.
TILE_ELEMENTS = 1 << 20
CUDA_TILE_ELEMENTS = 1 << 24
# Scores that the forward keeps for its backward, if a call has no more (8 MiB in fp32): to multiply again would take a
# third of a small call's time. Scores with noise, which cost more, are kept in larger calls, too (up to 64 MiB).
KEPT_ELEMENTS = 1 << 21
NOISY_KEPT_ELEMENTS = 1 << 24
# Each tile adds to all N x D sums of the backward pass: with fewer rows that traffic outweighs its products.
_MIN_TILE_ROWS = 64
# Columns of a block in the search of a row's maximum on a CPU; with how many columns, and scores in all, it pays.
_ARGMAX_BLOCK, _ARGMAX_COLUMNS, _ARGMAX_SCORES = 64, 512, 1 << 18


def may_keep(num_scores: int, noisy: bool = False) -> bool:
    """Return whether a call of so many scores keeps those with noise, or those without, for its backward."""
    return num_scores <= (NOISY_KEPT_ELEMENTS if noisy else KEPT_ELEMENTS)


def row_argmax(scores: Tensor) -> Tensor:
    """Return the column of each row's maximum, the first one of equals: (rows, N) -> (rows,) int64."""
    num_columns = scores.shape[1]
    if scores.device.type != "cpu" or num_columns < _ARGMAX_COLUMNS or scores.numel() <= _ARGMAX_SCORES:
        return scores.max(1).indices  # on some CPUs argmax(1) takes several times as long for the same answer
    # A CPU finds maxima with vector instructions, but their positions one element after the other: so the best block of
    # columns is found first, and the position in that block alone. Both times the first of equals.
    whole = num_columns // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    tops = [scores[:, :whole].unflatten(1, (-1, _ARGMAX_BLOCK)).amax(2)]
    if whole < num_columns:
        tops.append(scores[:, whole:].amax(1, keepdim=True))
    start = torch.cat(tops, 1).max(1).indices.mul_(_ARGMAX_BLOCK).unsqueeze(1)
    columns = (start + torch.arange(_ARGMAX_BLOCK)).clamp_(max=num_columns - 1)
    return scores.gather(1, columns).max(1).indices.add_(start.squeeze(1))


def rows_per_tile(num_columns: int, device: torch.device) -> int:
    """Return the rows of a tile of scores with ``num_columns`` columns."""
    elements = CUDA_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS
    return max(_MIN_TILE_ROWS, elements // num_columns)
