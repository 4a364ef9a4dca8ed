"""Sharpness of the softmax over the codes: for a few rows of each image, and entropies of all rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from regvq_fast.ops import softmax_statistics
from regvq_fast.padding import Padding

_ROWS_OF_AN_IMAGE = 8
MAX_LOG_SCALE = 30.0
"""Bound of the log of the scale: with degenerate logits (equal codes) it would leave fp32's range."""
FITTED_ROWS = 512
"""Number of latents that the first scale is fitted to."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Multiples of this fraction of an image's positions spread over rows and columns of its grid."""


def softmax_of_some_rows(
    rows: Tensor, weight: Tensor, bias: Tensor, padding: Padding | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy (nats) and mean largest probability of ``softmax(rows weight^T + bias)``.

    Both are 0-dim, without a gradient.

    Args:
        rows: (B, R, D), of which 8 per image are used, at the same positions; or (M, D), all of which are used. The
            mean of the ranks' means is that of the whole batch, however the images are distributed.
        weight: (N, D).
        bias: (N,).
        padding: of the B R rows; of each image up to 8 valid rows are used, chosen by their number among these.

    Memory: 8 B N logits. Products have the precision that the process has set, such as TF32.
    """
    padding = padding or Padding()
    if rows.ndim == 3:
        rows, padding = _some_rows(rows, padding)
    with torch.no_grad():
        log_p = torch.addmm(bias, rows, weight.t()).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return padding.mean(entropy), padding.mean(log_p.amax(1).exp())


def _some_rows(rows: Tensor, padding: Padding) -> tuple[Tensor, Padding]:
    """Return 8 rows of each image of (B, R, D), at the same positions without padding, and the padding among them."""
    batch, num_rows = rows.shape[:2]
    numbers = torch.arange(min(num_rows, _ROWS_OF_AN_IMAGE), device=rows.device)
    if padding.valid is None:
        stride = int(_GOLDEN_RATIO * num_rows) | 1
        return rows.index_select(1, numbers * stride % num_rows).flatten(0, 1), padding
    valid = padding.valid.view(batch, num_rows)
    counts = valid.sum(1, keepdim=True)
    strides = (_GOLDEN_RATIO * counts.double()).long() | 1
    # A stable sort by validity puts the valid rows of an image first.
    positions = (~valid).byte().argsort(stable=True).gather(1, numbers * strides % counts.clamp(min=1))
    some = Padding((numbers < counts).flatten(), over_ranks=padding.over_ranks)
    return rows.take_along_dim(positions.unsqueeze(2), 1).flatten(0, 1), some


def softmax_entropies(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, temperature: float, padding: Padding | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of the rows' softmax and the entropy of their mean softmax: nats, 0-dim, with gradients.

    Arguments are those of :func:`regvq_fast.ops.softmax_statistics`, and the rows' padding. If that is over ranks, the
    mean softmax is that of all ranks. As in IBQ and LlamaGen, 1e-5 is added in the logarithm of the mean.
    """
    padding = padding or Padding()
    entropy, mean = softmax_statistics(rows, weight, bias, temperature=temperature, valid=padding.valid)
    mean = padding.mean_of_batch(mean)
    return padding.mean_of_ranks(entropy), -(mean * (mean + 1e-5).log()).sum()


def log_scale_that_perturbs(fraction: float, perturbed: Callable[[float], float | Tensor]) -> float:
    """Return the log of the scale of the logits with which a fraction of the samples are not the best code.

    Args:
        fraction: of the rows.
        perturbed: function from the log of a scale to that fraction, which falls with the scale.
    """
    low, high = -MAX_LOG_SCALE, MAX_LOG_SCALE
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if perturbed(middle) > fraction else (low, middle)
    return middle
