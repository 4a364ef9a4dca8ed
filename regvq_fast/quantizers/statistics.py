"""Sharpness of the softmax over the codes, measured on a few rows of each image."""

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS_OF_AN_IMAGE = 8
MAX_LOG_SCALE = 30.0
"""Bound of the log of the scale, which degenerate logits (equal codes) would take out of fp32's range."""
FITTED_ROWS = 512
"""Latents that a first scale is fitted to."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Multiples of this fraction of an image's positions spread over rows and columns of its grid."""


def softmax_of_some_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy (nats) and mean largest probability of ``softmax(rows weight^T + bias)``, 0-dim, without a gradient.

    Args:
        rows: (B, R, D), of which 8 per image are used, at the same positions in all; or (M, D), all of them. The
            mean of the ranks' means is that of the whole batch, however the images are shared.
        weight: (N, D).
        bias: (N,).

    Memory: 8 B N logits, in the products' own precision (TF32 where the process has chosen it).
    """
    if rows.ndim == 3:
        num_rows = rows.shape[1]
        stride = int(_GOLDEN_RATIO * num_rows) | 1
        positions = torch.arange(min(num_rows, _ROWS_OF_AN_IMAGE), device=rows.device) * stride % num_rows
        rows = rows.index_select(1, positions).flatten(0, 1)
    with torch.no_grad():
        log_p = torch.addmm(bias, rows, weight.t()).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return entropy, log_p.amax(1).exp().mean()


def log_scale_that_perturbs(fraction: float, perturbed: Callable[[float], float | Tensor]) -> float:
    """Return the log of the scale of the logits at which samples of the softmax take another code than the best one.

    Args:
        fraction: of the rows, which falls with the scale.
        perturbed: gives it at the log of a scale.
    """
    low, high = -MAX_LOG_SCALE, MAX_LOG_SCALE
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if perturbed(middle) > fraction else (low, middle)
    return middle
