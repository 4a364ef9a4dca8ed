"""Prior-distribution regularization (Reg-VQ, section 3.1): keep the posterior over codes near a uniform prior."""

from typing import Literal

from torch import Tensor

from regvq_fast.padding import Padding
from regvq_fast.ranks import mean_over_ranks, sum_over_ranks, world_size

PriorScope = Literal["image", "batch", "global"]


def prior_kl(posterior: Tensor, rows: int | Tensor, padding: Padding | None = None) -> Tensor:
    """``mean over groups of sum_n posterior * log(N * posterior)``, the KL divergence to the uniform prior.

    Args:
        posterior: (G, N) float, rows summing to 1, as :func:`regvq_fast.ops.vector_quantize` returns it.
        rows: R, rows that a group's posterior is the mean of; (G,) int64 where they differ.
        padding: which of the groups count in the mean, if not all.

    Returns:
        0-dim, in nats, between 0 and log N; 0 log 0 = 0. Its floor is log(N / R) where R < N.

    Gradient: to ``posterior``, ``(log(N * posterior) + 1) / G``. That is minus infinity for an unused code, of which R
    rows tell no more than that its share is probably below 1 / R: it is taken at half a row's share, 1 / (2 R). (At
    the smallest fp32 number it would be -87, and the few unused codes of a batch would drown everything else.)
    """
    fixed = posterior.detach()
    half_a_row = 0.5 / rows.clamp(min=1).unsqueeze(1) if isinstance(rows, Tensor) else 0.5 / rows
    log_ratio = (fixed.clamp(min=half_a_row) * posterior.shape[1]).log()
    # The value of posterior * log_ratio with the gradient log_ratio + 1, which clamp would cut for unused codes.
    return (padding or Padding()).mean((posterior * (log_ratio + 1) - fixed).sum(1))


def posterior_groups(scope: PriorScope, batch_size: int) -> int:
    """Groups of rows with a posterior each: one an image for scope "image", else one."""
    return batch_size if scope == "image" else 1


def scoped_posterior(posterior: Tensor, scope: PriorScope, rows: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """Return the posterior that the regularizer sees, and the rows that a group's posterior is the mean of.

    For scope "global" those are the rows of all ranks: the mean of the ranks' posteriors, weighted by their rows, with
    the gradient to this rank's. The mean of the ranks' gradients, which data-parallel training takes, is then that of
    the whole batch.

    Args:
        posterior: (G, N) of this rank.
        scope: as in :func:`posterior_groups`.
        rows: of each group; (G,) int64 where they differ, among groups or ranks.
    """
    if scope != "global" or world_size() == 1:
        return posterior, rows
    if isinstance(rows, Tensor):
        all_rows: int | Tensor = sum_over_ranks(rows)
        weight = rows.to(posterior.dtype) * world_size() / all_rows.clamp(min=1)  # type: ignore[union-attr]
        posterior = posterior * weight.unsqueeze(1)
    else:
        all_rows = rows * world_size()
    return posterior + (mean_over_ranks(posterior) - posterior.detach()), all_rows
