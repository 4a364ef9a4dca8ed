"""Tiles of rows of the PyTorch fallbacks: their size, the argmax of a row, and whether scores are kept for backward."""

import torch
from torch import Tensor

# Scores of one tile, rows x codes, independent of M. On a CPU 4 MiB in fp32: a tile and its few temporaries stay in the
# caches, and still outweigh its hundred calls and the packing of the codes. On a GPU 64 MiB, since a tile takes about a
# hundred launches.
TILE_ELEMENTS = 1 << 20
CUDA_TILE_ELEMENTS = 1 << 24
# Most scores of a call that keeps them for its backward (8 MiB in fp32): computing them again takes a third of a small
# call's time. Scores with noise cost more and are kept in larger calls as well (up to 64 MiB).
KEPT_ELEMENTS = 1 << 21
NOISY_KEPT_ELEMENTS = 1 << 24
# Each tile adds to all N x D sums of the backward: with fewer rows that traffic outweighs its products.
_MIN_TILE_ROWS = 64
# Columns of a block in the blockwise argmax on a CPU, and the fewest columns and scores for which it is faster.
_ARGMAX_BLOCK, _ARGMAX_COLUMNS, _ARGMAX_SCORES = 64, 512, 1 << 18


def may_keep(num_scores: int, noisy: bool = False) -> bool:
    """Return whether a call with ``num_scores`` scores keeps them for its backward; ``noisy``: those with noise."""
    return num_scores <= (NOISY_KEPT_ELEMENTS if noisy else KEPT_ELEMENTS)


def row_argmax(scores: Tensor) -> Tensor:
    """Return the column of each row's maximum, the first of equals: (rows, N) -> (rows,) int64."""
    num_columns = scores.shape[1]
    if scores.device.type != "cpu" or num_columns < _ARGMAX_COLUMNS or scores.numel() <= _ARGMAX_SCORES:
        return scores.max(1).indices  # argmax(1) takes several times as long on some CPUs
    # A CPU computes maxima with vector instructions, but argmax element by element: find the best block of columns by
    # its maximum, then the column in this block. Both steps take the first of equals.
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
