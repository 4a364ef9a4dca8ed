"""Inputs for ``weighted_info_nce``: shared by its tests."""

import torch
import torch.nn.functional as F
from torch import Tensor


def make_inputs(
    shape: tuple[int, int, int] = (2, 9, 4), weights: str = "random", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))
    query, key = (
        F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()
        for _ in range(2)
    )
    if weights == "none":
        return query, key, None
    weight = torch.rand(shape[:2], generator=generator, dtype=torch.float64) + 0.01
    if weights == "uniform":
        weight = torch.ones_like(weight)
    elif weights == "with zeros":
        weight[:, ::2] = 0
        weight[:, -1] = 1
    return query, key, weight / weight.sum(1, keepdim=True)
