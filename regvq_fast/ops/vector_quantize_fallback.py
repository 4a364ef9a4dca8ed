"""PyTorch fallback of ``vector_quantize``: the same mathematics and noise bits, in tiles of rows.

It runs on CPUs, for float64, and without Triton.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from regvq_fast.dispatch import Inputs
from regvq_fast.matmul import compute_dtype, without_tf32
from regvq_fast.ops.row_passes import ColumnBias, Noise, select, softmax_backward
from regvq_fast.ops.segment_sum import segment_counts, segment_sum_eager
from regvq_fast.ops.tiling import may_keep, rows_per_tile


class _Logits:
    """Scores of tiles of rows, ``factor * x k^T + code_bias``, for distance and linear logits."""

    def __init__(self, a: Inputs) -> None:
        self.dtype = compute_dtype(a.x)
        # Contiguous: the gradients take their layout from here, and the fake kernels promise contiguous ones.
        self.codebook = a.codebook.to(self.dtype).contiguous()  # [N, D]
        self.is_distance = a.weight is None
        if a.weight is None:  # |x|^2 is constant in a row and drops out of argmax and softmax
            self.weight = self.codebook
            self.factor = 2.0 * a.scale.to(self.dtype)
            self.code_bias = self.codebook.square().sum(1).mul_(-a.scale)  # [N]
        else:
            self.weight = a.weight.to(self.dtype).contiguous()
            self.factor = a.scale.to(self.dtype)
            self.code_bias = self.weight.new_zeros(len(self.weight)) if a.bias is None else a.bias.to(self.dtype)
            self.code_bias = self.code_bias.contiguous()

    def products(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the scores of some rows without ``code_bias``."""
        with without_tf32(x.device):
            return torch.mm(x * self.factor, self.weight.t(), out=out)  # [rows, N]


class _Tile(NamedTuple):
    """Rows that are computed together, all with noise or all without."""

    rows: Tensor
    """Row numbers, (rows,) int64."""
    slice: slice
    """Positions in the order of all rows."""
    noisy: bool


def _order_rows(mask: Tensor) -> tuple[Tensor, int]:
    """Return row numbers (M,), stochastic rows first, and the number of rows in tiles with noise: on a GPU all."""
    rows = torch.arange(len(mask), device=mask.device)
    if mask.device.type == "cuda":  # counting the stochastic rows would force a synchronization
        return rows, len(rows)
    stochastic = rows[mask]
    return torch.cat([stochastic, rows[~mask]]), len(stochastic)


def _tiles(a: Inputs) -> list[_Tile]:
    """Return tiles of all rows, stochastic rows first, so that the other tiles need no noise."""
    num_rows, step = len(a.x), rows_per_tile(len(a.codebook), a.x.device)
    order, num_noisy = (torch.arange(num_rows, device=a.x.device), 0) if a.mask is None else _order_rows(a.mask)
    bounds = [*range(0, num_noisy, step), *range(num_noisy, num_rows, step), num_rows]
    return [_Tile(order[start:end], slice(start, end), start < num_noisy) for start, end in itertools.pairwise(bounds)]


def _most_rows(tiles: list[_Tile]) -> int:
    return max((len(tile.rows) for tile in tiles), default=0)


def _is_kept(tile: _Tile, kept: Tensor) -> bool:
    return len(kept) > 0 and may_keep(kept.numel(), tile.noisy)


def _temperatures(a: Inputs, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t of some rows, (rows, 1)."""
    if a.mask is None:
        return torch.ones(len(rows), 1, dtype=dtype, device=a.x.device)
    return torch.where(a.mask[rows], a.tau, 1.0).to(dtype).unsqueeze(1)


def _noise(a: Inputs, tile: _Tile, t: Tensor, head: int) -> Noise | None:
    if not tile.noisy:
        return None
    assert a.seed is not None
    assert a.mask is not None
    mask = a.mask[tile.rows]
    is_whole = mask.device.type == "cpu" and bool(mask.all())  # on a GPU a look at it would force a synchronization
    return Noise(a.seed, tile.rows + a.row_offset, None if is_whole else mask, t, head)


def _groups(a: Inputs, rows: Tensor) -> Tensor:
    """Return the groups of some rows."""
    return rows.div(max(1, len(a.x) // a.groups), rounding_mode="floor")


def _group_sizes(a: Inputs) -> int | Tensor:
    """Return the number of valid rows of a group, at least 1: one number, or (G, 1) where groups differ."""
    group_rows = len(a.x) // a.groups
    if a.valid is None:
        return max(1, group_rows)
    return a.valid.view(a.groups, group_rows).sum(1, keepdim=True).clamp_(min=1)


def vector_quantize_eager(a: Inputs, keeps_scores: bool) -> tuple[Tensor, ...]:
    """Return (quantized, posterior, indices, best_indices, perturbation, kept) of checked arguments.

    kept: (s + mask g) / t for the backward, ([H], M, N), in the order of the tiles; empty unless ``keeps_scores``. A
    large call leaves the tiles without noise unwritten, which takes no memory; the backward computes these again.
    """
    *heads, num_codes, _ = a.codebook.shape
    kept = a.x.new_empty(*heads, len(a.x) if keeps_scores else 0, num_codes, dtype=compute_dtype(a.x))
    if not heads:
        return *_quantize_head(a, 0, kept), kept
    results = [_quantize_head(_head(a, head), head, kept[head]) for head in range(len(kept))]
    return *(torch.stack(values, 1) for values in zip(*results, strict=True)), kept


def _head(a: Inputs, head: int) -> Inputs:
    """Return the arguments of one head."""
    weight, bias = (None if value is None else value[head] for value in (a.weight, a.bias))
    return a._replace(x=a.x[:, head], codebook=a.codebook[head], weight=weight, bias=bias)


def _quantize_head(a: Inputs, head: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of one head but ``kept``, which is written unless it is empty."""
    num_rows, num_codes = len(a.x), len(a.codebook)
    logits = _Logits(a)
    indices = torch.empty(num_rows, dtype=torch.int64, device=a.x.device)
    best_indices = torch.empty_like(indices)
    tiles = _tiles(a)
    buffer = logits.weight.new_empty(_most_rows(tiles), num_codes)
    for tile in tiles:
        keeps = _is_kept(tile, kept)
        out = kept[tile.slice] if keeps else buffer[: len(tile.rows)]
        scores = logits.products(a.x[tile.rows].to(logits.dtype), out=out)
        t = _temperatures(a, tile.rows, logits.dtype)
        best_indices[tile.rows], indices[tile.rows] = select(scores, logits.code_bias, _noise(a, tile, t, head))
    quantized = a.codebook[indices]
    perturbation = (logits.codebook[indices] - logits.codebook[best_indices]).square_().sum(1)
    group_of_row = _groups(a, torch.arange(num_rows, device=a.x.device))
    selected, size = group_of_row * num_codes + indices, a.groups * num_codes
    if a.valid is not None:
        selected = torch.where(a.valid, selected, size)  # one more bin, for padding
    counts = segment_counts(selected, size + 1)[:-1]
    posterior = counts.view(a.groups, num_codes).to(logits.dtype).div_(_group_sizes(a))
    return quantized, posterior, indices, best_indices, perturbation


def vector_quantize_backward_eager(
    a: Inputs,
    grad_quantized: Tensor,
    grad_posterior: Tensor | None,
    indices: Tensor,
    kept: Tensor,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[Tensor | None, ...]:
    """Return gradients of (x, codebook, weight, bias) in their types; None for those not needed.

    With dP = dQ Z^T + dA / R and dS = p * (dP - sum_k p dP) / t, K the logit weight (N, D) and f its factor:
    dx = f dS K, dK = f dS^T x, bias gradient = sum_m dS; distance logits chain the bias into the codes.
    """
    if a.codebook.ndim == 2:
        return _head_gradients(a, 0, grad_quantized, grad_posterior, indices, kept, needs_x, needs_codes)
    results = [
        _head_gradients(
            _head(a, head),
            head,
            grad_quantized[:, head],
            None if grad_posterior is None else grad_posterior[:, head],
            indices[:, head],
            kept[head],
            needs_x,
            needs_codes,
        )
        for head in range(len(a.codebook))
    ]
    grads = zip(*results, strict=True)
    return tuple(None if of[0] is None else torch.stack(of, dim) for of, dim in zip(grads, (1, 0, 0, 0), strict=True))


def _head_gradients(
    a: Inputs,
    head: int,
    grad_quantized: Tensor,
    grad_posterior: Tensor | None,
    indices: Tensor,
    kept: Tensor,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    num_codes = len(a.codebook)
    logits = _Logits(a)
    dtype = logits.dtype
    soft = a.codebook_grad == "soft" and needs_codes
    grad_x = torch.empty_like(a.x, memory_format=torch.contiguous_format) if needs_x else None
    grad_weight = torch.zeros_like(logits.weight) if needs_codes else a.x.new_empty(0)  # [N, D]
    # The look-up's gradient. With distance logits the codes are the logit weight, and one sum holds both gradients.
    grad_lookup = grad_weight if logits.is_distance or not needs_codes else torch.zeros_like(logits.codebook)
    grad_bias = logits.code_bias.new_zeros(num_codes)  # [N], sum over m of dS
    if grad_posterior is not None:
        grad_posterior = (grad_posterior.to(dtype) / _group_sizes(a)).contiguous()  # [G, N]
    tiles = _tiles(a)
    buffer = logits.weight.new_empty(2 * _most_rows(tiles), num_codes)
    for tile in tiles:
        rows = tile.rows
        both = buffer[: 2 * len(rows)]
        p, grad = both.split(len(rows))
        # 1 / t multiplies x and the products with the logit weight, which are narrower than dS.
        x_tile, grad_tile, t = a.x[rows].to(dtype), grad_quantized[rows].to(dtype), _temperatures(a, rows, dtype)
        if _is_kept(tile, kept):
            scores = kept[tile.slice]
        else:
            scores = logits.products(x_tile, out=p)
            select(scores, logits.code_bias, _noise(a, tile, t, head))
        torch.mm(grad_tile, logits.codebook.t(), out=grad)  # dP; the posterior's gradient is a per-code bias
        column_bias = None
        if grad_posterior is not None:
            column_bias = ColumnBias(grad_posterior, _groups(a, rows), None if a.valid is None else a.valid[rows])
        softmax_backward(scores, column_bias, p, grad)
        if grad_x is not None:
            grad_x[rows] = torch.mm(grad, logits.weight).mul_(logits.factor / t).to(a.x.dtype)
        if needs_codes:
            grad_bias.addmv_(grad.t(), 1 / t.squeeze(1))
            x_tile = x_tile * (logits.factor / t)
            if soft and logits.is_distance:
                grad_weight.addmm_(both.t(), torch.cat([grad_tile, x_tile]))
            else:
                grad_weight.addmm_(grad.t(), x_tile)
                if soft:
                    grad_lookup.addmm_(p.t(), grad_tile)

    if not needs_codes:
        return grad_x, None, None, None
    if a.codebook_grad == "hard":
        grad_lookup += segment_sum_eager(grad_quantized.to(dtype), indices, num_codes)
    if logits.is_distance:
        grad_weight.addcmul_((grad_bias * -logits.factor).unsqueeze(1), logits.codebook)
        return grad_x, grad_weight.to(a.codebook.dtype), None, None
    assert a.weight is not None
    bias = None if a.bias is None else grad_bias.to(a.bias.dtype)
    return grad_x, grad_lookup.to(a.codebook.dtype), grad_weight.to(a.weight.dtype), bias
