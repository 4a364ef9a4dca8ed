"""Tiles of rows of the PyTorch fallbacks: their size, and whether scores are kept for backward."""

import torch

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


def may_keep(num_scores: int, noisy: bool = False) -> bool:
    """Return whether a call with ``num_scores`` scores keeps them for its backward; ``noisy``: those with noise."""
    return num_scores <= (NOISY_KEPT_ELEMENTS if noisy else KEPT_ELEMENTS)


def rows_per_tile(num_columns: int, device: torch.device) -> int:
    """Return the rows of a tile of scores with ``num_columns`` columns."""
    elements = CUDA_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS
    return max(_MIN_TILE_ROWS, elements // num_columns)
