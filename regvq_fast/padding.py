"""Padding among the rows of a batch: it counts in no mean, of one process or of several."""

import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ranks import sum_over_ranks, world_size


class Padding:
    """Means over the valid rows of M, and values without those of the others.

    Args:
        valid: (M,) bool, False for padding; None: every row counts.
        over_ranks: count the rows of all ranks, which have as many each, padding included: the mean of the ranks'
            means is then that of the whole batch, however its padding is shared. All ranks have to come here together.
    """

    def __init__(self, valid: Tensor | None = None, *, over_ranks: bool = False) -> None:
        self.valid = valid
        self.over_ranks = over_ranks
        if valid is not None:
            self.count = sum_over_ranks(valid.sum()) if over_ranks else valid.sum()
            """() int64, valid rows."""

    def clear(self, values: Tensor, fill: float = 0) -> Tensor:
        """Return values (M, ...) with ``fill`` in the rows of padding, which get no gradient."""
        if self.valid is None:
            return values
        return values.masked_fill(~self.valid.view(-1, *[1] * (values.ndim - 1)), fill)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of floating-point values (M, ...) over the valid rows; 0 where there are none."""
        return values.mean() if self.valid is None else self._rescaled(self.clear(values).mean())

    def mean_squared_error(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of ``(a - b)^2``, of (M, D), over the valid rows; 0 where there are none."""
        if self.valid is None:
            return F.mse_loss(a, b)
        return self._rescaled(F.mse_loss(self.clear(a), self.clear(b)))

    def mean_of_ranks(self, mean: Tensor) -> Tensor:
        """Return this rank's mean over its valid rows as a term of the whole batch's: weighted by their number."""
        if self.valid is None:
            return mean
        return self._rescaled(mean * (self.valid.sum().to(mean.dtype) / self.valid.shape[0]))

    def groups(self, num_rows: int, groups: int) -> tuple[int | Tensor, "Padding"]:
        """Return the valid rows of each of ``groups`` equal parts of ``num_rows``, and which parts have none."""
        if self.valid is None:
            return num_rows // groups, self
        rows = self.valid.view(groups, -1).sum(1)
        return rows, Padding(rows > 0, over_ranks=self.over_ranks)

    def _rescaled(self, mean: Tensor) -> Tensor:
        """Return a mean over all rows, of which padding has 0, as one over the valid rows."""
        assert self.valid is not None
        rows = self.valid.shape[0] * (world_size() if self.over_ranks else 1)
        return mean * (mean.new_full((), rows) / self.count.clamp(min=1))  # 1 where every row counts, to the bit
