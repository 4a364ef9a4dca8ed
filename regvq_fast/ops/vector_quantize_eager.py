"""The eager twin of ``vector_quantize``: the same mathematics and noise bits in plain PyTorch, in tiles of rows.

It runs on CPUs, in float64, and wherever Triton is missing, and is the oracle of the kernels' tests.
"""

import torch
from torch import Tensor

from regvq_fast.ops._common import compute_dtype, row_argmax, rows_per_tile
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.segment_sum import segment_counts, segment_sum_eager


class _Logits:
    """Scores of row tiles, ``factor * x keys^T + column``; both logit kinds are this one product."""

    def __init__(
        self,
        codebook: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        # Contiguous, as the gradients are that take their layout from here: the fake kernels promise it.
        self.codebook = codebook.to(dtype).contiguous()  # [N, D]
        self.is_distance = weight is None
        if weight is None:  # |x|^2 is constant in a row: it drops out of argmax and softmax
            self.keys = self.codebook
            self.factor = 2.0 * scale
            self.column = self.codebook.square().sum(1).mul_(-scale)  # [N]
        else:
            self.keys = weight.to(dtype).contiguous()
            self.factor = scale
            self.column = self.keys.new_zeros(len(self.keys)) if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.column, x, self.keys.t(), alpha=self.factor)  # [rows, N]


def _tiles(mask: Tensor | None, num_rows: int, num_codes: int, device: torch.device) -> list[tuple[Tensor, bool]]:
    """Tiles of row numbers, and whether any of a tile's rows is stochastic.

    On a CPU stochastic rows go apart from deterministic ones, so that only the former pay for noise. On a GPU they
    stay mixed: to count them would stop the device.
    """
    if mask is None or device.type == "cuda":
        kinds = [(torch.arange(num_rows, device=device), mask is not None)]
    else:
        kinds = [(mask.nonzero().squeeze(1), True), ((~mask).nonzero().squeeze(1), False)]
    step = rows_per_tile(num_codes, device)
    return [(tile, noisy) for rows, noisy in kinds for tile in rows.split(step) if len(tile)]


def _add_noise(scores: Tensor, mask: Tensor | None, seed: Tensor | None, rows: Tensor, row_offset: Tensor) -> Tensor:
    """Add Gumbel noise to the stochastic rows of a tile; returns which of its rows are, (rows, 1) bool."""
    assert mask is not None
    assert seed is not None
    stochastic = mask[rows].unsqueeze(1)
    scores.addcmul_(
        gumbel_noise(seed, rows + row_offset, scores.shape[1]).to(scores.dtype), stochastic.to(scores.dtype)
    )
    return stochastic


def vector_quantize_eager(
    x: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    tau: Tensor,
    row_offset: Tensor,
    scale: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(quantized, posterior, indices, best_indices, perturbation) of checked arguments."""
    num_rows, num_codes = len(x), len(codebook)
    dtype = compute_dtype(x)
    logits = _Logits(codebook, weight, bias, scale, dtype)
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    best_indices = torch.empty_like(indices)
    for rows, noisy in _tiles(mask, num_rows, num_codes, x.device):
        scores = logits(x[rows].to(dtype))
        best = row_argmax(scores)
        best_indices[rows] = best
        if noisy:
            _add_noise(scores, mask, seed, rows, row_offset)
            best = row_argmax(scores)
        indices[rows] = best
    quantized = codebook[indices]
    perturbation = (logits.codebook[indices] - logits.codebook[best_indices]).square_().sum(1)
    group_rows = max(1, num_rows // groups)
    group_of_row = torch.arange(num_rows, device=x.device).div_(group_rows, rounding_mode="floor")
    counts = segment_counts(group_of_row * num_codes + indices, groups * num_codes)
    posterior = counts.view(groups, num_codes).to(dtype).div_(group_rows)
    return quantized, posterior, indices, best_indices, perturbation


def vector_quantize_backward_eager(
    grad_quantized: Tensor,
    grad_posterior: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    indices: Tensor,
    tau: Tensor,
    row_offset: Tensor,
    scale: float,
    codebook_grad: str,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, codebook, weight, bias) in their types; None for those that nobody needs.

    With dP = dQ Z^T + dA / R and dS = p * (dP - sum_k p dP) / t, K the keys (codes or weight) and f their factor:
    dx = f dS K, dK = f dS^T x, column gradient = sum_m dS; distance logits chain the column into the codes.
    """
    num_rows, num_codes = len(x), len(codebook)
    dtype = compute_dtype(x)
    logits = _Logits(codebook, weight, bias, scale, dtype)
    soft = codebook_grad == "soft" and needs_codes
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    grad_keys = torch.zeros_like(logits.keys) if needs_codes else x.new_empty(0)  # [N, D]
    grad_lookup = torch.zeros_like(logits.codebook) if soft else x.new_empty(0)  # [N, D], sum of p^T dQ
    grad_column = logits.column.new_zeros(num_codes)  # [N], sum over m of dS
    if grad_posterior is not None:
        group_rows = max(1, num_rows // len(grad_posterior))
        grad_posterior = grad_posterior.to(dtype) / group_rows  # [G, N]

    for rows, noisy in _tiles(mask, num_rows, num_codes, x.device):
        x_tile, grad_tile = x[rows].to(dtype), grad_quantized[rows].to(dtype)
        scores = logits(x_tile)
        if noisy:
            stochastic = _add_noise(scores, mask, seed, rows, row_offset)
            temperature = torch.where(stochastic, tau, 1.0).to(dtype)
            scores /= temperature
        # Probabilities under 1e-26 become 0: on a CPU subnormal numbers would make softmax and the products below
        # several times slower. The clamp keeps them out of softmax (e^-60 < 1e-26), the threshold out of p.
        scores.clamp_(min=scores.amax(1, keepdim=True) - 60)
        p = torch.threshold_(scores.softmax(1), 1e-26, 0.0)
        # dP, with the posterior's gradient as a bias of its columns; the scores' memory takes it.
        grad = torch.mm(grad_tile, logits.codebook.t(), out=scores)
        if grad_posterior is not None:
            grad += grad_posterior if len(grad_posterior) == 1 else grad_posterior[rows // group_rows]
        grad -= torch.linalg.vecdot(p, grad).unsqueeze(1)
        grad *= p
        if noisy:
            grad /= temperature
        if grad_x is not None:
            grad_x[rows] = torch.mm(grad, logits.keys).mul_(logits.factor).to(x.dtype)
        if needs_codes:
            grad_column += grad.sum(0)
            grad_keys.addmm_(grad.t(), x_tile, alpha=logits.factor)
            if soft:
                grad_lookup.addmm_(p.t(), grad_tile)

    if not needs_codes:
        return grad_x, None, None, None
    grad_codes = grad_lookup if soft else torch.zeros_like(logits.codebook)
    if codebook_grad == "hard":
        grad_codes = segment_sum_eager(grad_quantized.to(dtype), indices, num_codes)
    if logits.is_distance:
        grad_codes += grad_keys.addcmul_(grad_column.unsqueeze(1), logits.codebook, value=-logits.factor)
        return grad_x, grad_codes.to(codebook.dtype), None, None
    assert weight is not None
    grad_bias = None if bias is None else grad_column.to(bias.dtype)
    return grad_x, grad_codes.to(codebook.dtype), grad_keys.to(weight.dtype), grad_bias
