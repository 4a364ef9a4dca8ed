"""Prior-distribution regularization (Reg-VQ, section 3.1): keep the posterior over codes near a uniform prior."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable_dist
from torch import Tensor

PriorScope = Literal["image", "batch", "global"]


def prior_kl(posterior: Tensor) -> Tensor:
    """``mean over groups of sum_n posterior * log(N * posterior)``, the KL divergence to the uniform prior.

    Args:
        posterior: (G, N) float, rows summing to 1, as :func:`regvq_fast.ops.vector_quantize` returns it.

    Returns:
        0-dim, in nats, between 0 and log N; 0 log 0 = 0. Its floor is log(N / R) where a group has R < N rows.

    Gradient: to ``posterior``, ``log(N * posterior) + 1``, clamped at the smallest normal number for unused codes: a
    finite, strong pull towards them.
    """
    log_ratio = (posterior * posterior.shape[1]).clamp(min=torch.finfo(posterior.dtype).tiny).log()
    return (posterior * log_ratio).sum(1).mean()


def posterior_groups(scope: PriorScope, batch_size: int) -> int:
    """Groups of rows with a posterior each: one an image for scope "image", else one."""
    return batch_size if scope == "image" else 1


def scoped_posterior(posterior: Tensor, scope: PriorScope) -> Tensor:
    """The posterior that the regularizer sees: for scope "global" the mean over all ranks, with its gradient."""
    if scope == "global" and dist.is_available() and dist.is_initialized():
        return differentiable_dist.all_reduce(posterior) / dist.get_world_size()
    return posterior
