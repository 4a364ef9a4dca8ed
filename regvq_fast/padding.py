"""Padding among the rows of a batch, which means ignore, on one process or several."""

import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ranks import sum_over_ranks, world_size


class Padding:
    """Means over the valid rows of M.

    Args:
        valid: (M,) bool, False for padding; None: every row is valid.
        over_ranks: count the valid rows of all ranks, which must all have M rows: the mean of the ranks' means is then
            that of the whole batch, however its padding is distributed. A collective operation.
    """

    def __init__(self, valid: Tensor | None = None, *, over_ranks: bool = False) -> None:
        self.valid = valid
        self.over_ranks = over_ranks
        if valid is not None:
            self.count = sum_over_ranks(valid.sum()) if over_ranks else valid.sum()
            """() int64, number of valid rows."""

    def clear(self, values: Tensor, fill: float = 0) -> Tensor:
        """Return values (M, ...) with ``fill`` in padding rows, which get no gradient."""
        if self.valid is None:
            return values
        return values.masked_fill(~self.valid.view(-1, *[1] * (values.ndim - 1)), fill)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of floating-point values (M, ...) over the valid rows; 0 if there are none."""
        return values.mean() if self.valid is None else self._rescaled(self.clear(values).mean())

    def mean_squared_error(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of ``(a - b)^2`` for (M, D) over the valid rows; 0 if there are none."""
        if self.valid is None:
            return F.mse_loss(a, b)
        return self._rescaled(F.mse_loss(self.clear(a), self.clear(b)))

    def mean_of_ranks(self, mean: Tensor) -> Tensor:
        """Return this rank's mean over its valid rows, weighted by their number as a term of the batch's mean."""
        if self.valid is None:
            return mean
        return self._rescaled(mean * (self.valid.sum().to(mean.dtype) / self.valid.shape[0]))

    def groups(self, num_rows: int, groups: int) -> tuple[int | Tensor, "Padding"]:
        """Return the number of valid rows in each of ``groups`` equal groups, and the padding of groups without any."""
        if self.valid is None:
            return num_rows // groups, self
        rows = self.valid.view(groups, -1).sum(1)
        return rows, Padding(rows > 0, over_ranks=self.over_ranks)

    def _rescaled(self, mean: Tensor) -> Tensor:
        """Convert a mean over all rows, with 0 in padding, into one over the valid rows."""
        assert self.valid is not None
        rows = self.valid.shape[0] * (world_size() if self.over_ranks else 1)
        return mean * (mean.new_full((), rows) / self.count.clamp(min=1))  # exactly 1 if every row is valid
