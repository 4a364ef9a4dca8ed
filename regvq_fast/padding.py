"""Padding among the rows of a batch, which no mean counts, on one rank or several."""

import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ranks import mean_of_batch, sum_over_ranks, world_size


class Padding:
    """Means over the valid rows, and values with padding filled in.

    Args:
        valid: (M,) bool, False for padding; None: every row counts.
        over_ranks: count the valid rows of all ranks, each of which has M rows: the mean of the ranks' means is then
            that of the whole batch, however the padding is distributed. This, and `mean_of_batch`, are collective
            operations.
    """

    def __init__(self, valid: Tensor | None = None, *, over_ranks: bool = False) -> None:
        self.valid = valid
        self.over_ranks = over_ranks
        if valid is not None:
            self.count = sum_over_ranks(valid.sum()) if over_ranks else valid.sum()
            """() int64, number of valid rows."""

    def clear(self, values: Tensor, fill: float = 0) -> Tensor:
        """Return values (M, ...) with ``fill`` in rows of padding, which get no gradient."""
        if self.valid is None:
            return values
        return values.masked_fill(~self.valid.view(-1, *[1] * (values.ndim - 1)), fill)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of floating-point values (M, ...) over the valid rows; 0 without valid rows."""
        return values.mean() if self.valid is None else self._rescaled(self.clear(values).mean())

    def mean_squared_error(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of ``(a - b)^2``, of (M, D), over the valid rows; 0 without valid rows."""
        if self.valid is None:
            return F.mse_loss(a, b)
        return self._rescaled(F.mse_loss(self.clear(a), self.clear(b)))

    def mean_of_ranks(self, mean: Tensor) -> Tensor:
        """Return this rank's mean over its valid rows, weighted such that the ranks' mean is that of the batch."""
        if self.valid is None:
            return mean
        return self._rescaled(mean * (self.valid.sum().to(mean.dtype) / self.valid.shape[0]))

    def mean_of_batch(self, mean: Tensor) -> Tensor:
        """Return the mean over the valid rows, of all ranks if `over_ranks`, with a gradient to ``mean``."""
        mean = self.mean_of_ranks(mean)
        return mean_of_batch(mean) if self.over_ranks else mean

    def groups(self, num_rows: int, groups: int) -> tuple[int | Tensor, "Padding"]:
        """Return the valid rows of each of ``groups`` equal groups of ``num_rows``, and empty groups as padding."""
        if self.valid is None:
            return num_rows // groups, self
        rows = self.valid.view(groups, -1).sum(1)
        return rows, Padding(rows > 0, over_ranks=self.over_ranks)

    def _rescaled(self, mean: Tensor) -> Tensor:
        """Rescale a mean over all rows, with 0 for padding, to one over the valid rows."""
        assert self.valid is not None
        rows = self.valid.shape[0] * (world_size() if self.over_ranks else 1)
        return mean * (mean.new_full((), rows) / self.count.clamp(min=1))  # exactly 1 if every row counts
