"""Prior-distribution regularization (Reg-VQ, section 3.1): keep the posterior over codes near a uniform prior."""

from typing import Literal

from torch import Tensor

from regvq_fast.padding import Padding
from regvq_fast.ranks import mean_of_batch, sum_over_ranks, world_size

PriorScope = Literal["image", "batch", "global"]


def prior_kl(posterior: Tensor, rows: int | Tensor, padding: Padding | None = None) -> Tensor:
    """Return the mean over groups of ``sum_n posterior * log(N * posterior)``, the KL divergence to the uniform prior.

    Args:
        posterior: (G, N) float, rows summing to 1, as :func:`regvq_fast.ops.vector_quantize` returns it.
        rows: R, the number of rows in a group; (G,) int64 if they differ.
        padding: groups that do not count in the mean, if any.

    Returns:
        0-dim, in nats, between 0 and log N; 0 log 0 = 0. If R < N, it is at least log(N / R).

    Gradient: to ``posterior``, ``(log(N * posterior) + 1) / G``. For an unused code this would be minus infinity, but R
    rows only show that its probability is likely below 1 / R: the gradient is taken at half a row, 1 / (2 R). (At the
    smallest fp32 number it would be -87, and a few unused codes would dominate the gradient.)
    """
    fixed = posterior.detach()
    half_a_row = 0.5 / rows.clamp(min=1).unsqueeze(1) if isinstance(rows, Tensor) else 0.5 / rows
    log_ratio = (fixed.clamp(min=half_a_row) * posterior.shape[1]).log()
    # The value of posterior * log_ratio with the gradient log_ratio + 1, which clamp would cut for unused codes.
    return (padding or Padding()).mean((posterior * (log_ratio + 1) - fixed).sum(1))


def posterior_groups(scope: PriorScope, batch_size: int) -> int:
    """Return the number of groups with a posterior each: one per image for scope "image", else 1."""
    return batch_size if scope == "image" else 1


def scoped_posterior(posterior: Tensor, scope: PriorScope, rows: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """Return the posterior for the regularizer, and the number of rows in a group.

    For scope "global" it is the mean of the ranks' posteriors, weighted by their rows: `mean_of_batch`.

    Args:
        posterior: (G, N) of this rank.
        scope: as in :func:`posterior_groups`.
        rows: number of rows in a group; (G,) int64 if they differ, among groups or ranks.
    """
    if scope != "global" or world_size() == 1:
        return posterior, rows
    if isinstance(rows, Tensor):
        all_rows: int | Tensor = sum_over_ranks(rows)
        weight = rows.to(posterior.dtype) * world_size() / all_rows.clamp(min=1)  # type: ignore[union-attr]
        posterior = posterior * weight.unsqueeze(1)
    else:
        all_rows = rows * world_size()
    return mean_of_batch(posterior), all_rows
