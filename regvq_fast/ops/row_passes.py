"""Passes over rows of scores: their best codes without and with noise, log-sum-exp, softmax and its backward.

fp32 on a CPU takes ``kernels/rows.c``, where a row is read and written while it lies in the caches. Other types and
devices, and machines without a C compiler, take PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regvq_fast.native import rows_library, run_rows
from regvq_fast.ops.noise import gumbel_noise

# Columns of a block in the blockwise argmax on a CPU, and the fewest columns and scores for which it is faster.
_ARGMAX_BLOCK, _ARGMAX_COLUMNS, _ARGMAX_SCORES = 64, 512, 1 << 18


class Noise(NamedTuple):
    """Gumbel noise of some rows."""

    seed: Tensor
    rows: Tensor
    """Global row numbers, (rows,) int64."""
    mask: Tensor | None
    """The rows that get noise, (rows,) bool; None: all."""
    t: Tensor
    """Divisor of the noisy scores, (rows, 1)."""
    head: int


def select(scores: Tensor, bias: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Return the best code of each row without and with noise, the first of equals; (rows,) int64 each.

    ``scores`` (rows, N) become ``scores + bias``, with noise ``(scores + bias + noise) / t``.
    """
    mask = None if noise is None else noise.mask
    if mask is None and rows_library(scores):
        best = torch.empty(len(scores), dtype=torch.int64)
        selected = best if noise is None else torch.empty_like(best)
        drawn = (0, 0, None, None) if noise is None else (int(noise.seed), noise.head, noise.rows, noise.t)
        run_rows("regvq_select", scores, *drawn, bias, scores, best, selected)
        return best, selected
    best = argmax(scores.add_(bias))
    if noise is None:
        return best, best
    values = gumbel_noise(noise.seed, noise.rows, scores.shape[1], noise.head).to(scores.dtype)
    scores.add_(values if mask is None else values.mul_(mask.unsqueeze(1)))
    selected = argmax(scores)
    scores.div_(noise.t)
    return best, selected


def argmax(scores: Tensor) -> Tensor:
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


class ColumnBias(NamedTuple):
    """Gradient of the columns that rows share, that of the posteriors."""

    values: Tensor
    """(G, N)"""
    groups: Tensor
    """Group of each row, (rows,) int64."""
    valid: Tensor | None
    """The rows that get it, (rows,) bool; None: all."""


def softmax_backward(scores: Tensor, column_bias: ColumnBias | None, p: Tensor, grad: Tensor) -> None:
    """Write ``p = softmax(scores)``, and change ``grad`` from the gradient of p to that of the scores; (rows, N) each.

    ``p`` may be ``scores``; ``column_bias`` is added to ``grad`` first. Probabilities under 1e-26 become 0: on a CPU
    subnormal numbers would make the products of p several times slower.
    """
    if rows_library(scores):
        values = groups = None
        if column_bias is not None:
            values, groups, valid = column_bias
            groups = groups if valid is None else torch.where(valid, groups, -1)
        run_rows("regvq_softmax_backward", scores, scores, values, groups, p, grad)
        return
    # The clamp keeps subnormal numbers out of softmax (e^-60 < 1e-26), the threshold out of p.
    torch.softmax(scores.clamp(min=scores.amax(1, keepdim=True) - 60), 1, out=p)
    torch.threshold_(p, 1e-26, 0.0)
    if column_bias is not None:
        values, groups, valid = column_bias
        added = values if len(values) == 1 else values[groups]
        if valid is None:
            grad += added
        else:
            grad.addcmul_(added, valid.to(grad.dtype).unsqueeze(1))
    torch._softmax_backward_data(grad, p, 1, grad.dtype, grad_input=grad)


def log_sum_exp(scores: Tensor) -> Tensor:
    """Return log(sum(exp)) of the last dimension."""
    if rows_library(scores) and scores.is_contiguous():
        lse = scores.new_empty(scores.shape[:-1])
        run_rows("regvq_log_sum_exp", scores.flatten(0, -2), scores, lse)
        return lse
    return scores.logsumexp(-1)


def softmax(scores: Tensor, lse: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Return ``factor exp(scores - lse)`` in ``out``, which may be ``scores``; ``lse``, ``factor``: one for each row.

    Exponentials are at least e^-60: on a CPU subnormal numbers would make products several times slower.
    """
    if rows_library(scores) and scores.is_contiguous() and out.is_contiguous():
        run_rows("regvq_softmax", scores.flatten(0, -2), scores, lse.contiguous(), factor.contiguous(), out)
        return out
    torch.sub(scores, lse.unsqueeze(-1), out=out)
    return out.clamp_(min=-60).exp_().mul_(factor.unsqueeze(-1))
