"""The ops as plain PyTorch expressions of their formulas: the reference of the tests.

They keep every M x N and L x L matrix and leave the gradients to autograd. Arguments and noise bits are the ops'.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.vector_quantize import CodebookGrad, VectorQuantizeOutput


def vector_quantize_reference(
    x: Tensor,
    codebook: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    tau: float | Tensor = 0.9,
    groups: int = 1,
    codebook_grad: CodebookGrad = "soft",
    noise: Tensor | None = None,
    head: int = 0,
) -> VectorQuantizeOutput:
    """Compute :func:`regvq_fast.ops.vector_quantize` of rows (M, [H], D) by its formulas.

    ``noise`` (M, N) replaces the noise of the seed, in calls without heads.
    """
    if codebook.ndim == 3:
        heads = [
            vector_quantize_reference(
                x[:, i],
                codebook[i],
                weight=None if weight is None else weight[i],
                bias=None if bias is None else bias[i],
                scale=scale,
                mask=mask,
                valid=valid,
                seed=seed,
                row_offset=row_offset,
                tau=tau,
                groups=groups,
                codebook_grad=codebook_grad,
                head=i,
            )
            for i in range(len(codebook))
        ]
        return VectorQuantizeOutput(*(torch.stack(values, 1) for values in zip(*heads, strict=True)))
    num_rows, num_codes = len(x), len(codebook)
    if weight is None:
        s = -scale * torch.cdist(x, codebook).square()
    else:
        s = scale * x @ weight.t() + (0.0 if bias is None else bias)
    a, temperature = s, torch.ones(num_rows, 1, dtype=x.dtype, device=x.device)
    if mask is not None:
        if noise is None:
            assert seed is not None
            noise = gumbel_noise(seed, torch.arange(num_rows, device=x.device) + row_offset, num_codes, head).to(
                x.dtype
            )
        a = s + mask.unsqueeze(1) * noise
        temperature = torch.where(mask, torch.as_tensor(tau, dtype=x.dtype, device=x.device), 1.0).unsqueeze(1)
    p = (a / temperature).softmax(1)
    indices, best_indices = a.argmax(1), s.argmax(1)
    hard = F.one_hot(indices, num_codes).to(x.dtype)
    straight_through = hard + p - p.detach()
    if codebook_grad == "hard":
        quantized = straight_through @ codebook
    else:
        # Value: hard @ codebook. Gradient: softmax to the rows; to the codes that of p @ codebook, or none.
        quantized = straight_through @ codebook.detach()
        if codebook_grad == "soft":
            soft = p.detach() @ codebook
            quantized = quantized + soft - soft.detach()
    grouped = straight_through.view(groups, -1, num_codes)
    if valid is None:
        posterior = grouped.mean(1)
    else:
        counted = valid.view(groups, -1, 1)
        posterior = (grouped * counted).sum(1) / counted.sum(1).clamp(min=1)
    perturbation = (codebook[indices] - codebook[best_indices]).square().sum(1).detach()
    return VectorQuantizeOutput(quantized, posterior, indices, best_indices, perturbation)


def weighted_info_nce_reference(
    query: Tensor, key: Tensor, weight: Tensor | None = None, *, tau: float = 0.07
) -> Tensor:
    """Compute :func:`regvq_fast.ops.weighted_info_nce` by Eq. 3 without its constant ``-log w_i``, or by Eq. 2."""
    a = query @ key.mT / tau
    positive = a.diagonal(dim1=1, dim2=2)
    if weight is None:
        return a.logsumexp(2) - positive
    length = query.shape[1]
    factor = torch.full_like(a[:1], -math.log(length))
    factor = torch.where(torch.eye(length, dtype=torch.bool, device=a.device), weight.log().unsqueeze(2), factor)
    return (a + factor).logsumexp(2) - positive
