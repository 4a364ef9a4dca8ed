"""The eager twin of ``vector_quantize``: the same mathematics and noise bits in plain PyTorch, in tiles of rows.

It runs on CPUs, in float64, and wherever Triton is missing, and is the oracle of the kernels' tests.
"""

import torch
from torch import Tensor

from regvq_fast.kernels.products import without_tf32
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
        scale: Tensor,
        dtype: torch.dtype,
    ) -> None:
        # Contiguous, as the gradients are that take their layout from here: the fake kernels promise it.
        self.codebook = codebook.to(dtype).contiguous()  # [N, D]
        self.is_distance = weight is None
        if weight is None:  # |x|^2 is constant in a row: it drops out of argmax and softmax
            self.keys = self.codebook
            self.factor = 2.0 * scale.to(dtype)
            self.column = self.codebook.square().sum(1).mul_(-scale)  # [N]
        else:
            self.keys = weight.to(dtype).contiguous()
            self.factor = scale.to(dtype)
            self.column = self.keys.new_zeros(len(self.keys)) if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        with without_tf32(x.device):
            return torch.addmm(self.column, x * self.factor, self.keys.t(), out=out)  # [rows, N]


def _tiles(num_rows: int, num_codes: int, device: torch.device) -> list[slice]:
    step = rows_per_tile(num_codes, device)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _temperatures(mask: Tensor, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """t of every row, (M, 1)."""
    return torch.where(mask, tau, 1.0).to(dtype).unsqueeze(1)


def _noisy(scores: Tensor, tile: slice, mask: Tensor, seed: Tensor | None, row_offset: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a tile, counted from its first, all stochastic ones among them, and their scores with Gumbel noise."""
    assert seed is not None
    stochastic = mask[tile]
    rows = _rows_to_draw(stochastic)
    noise = gumbel_noise(seed, rows + tile.start + row_offset, scores.shape[1]).to(scores.dtype)
    if len(rows) == len(stochastic):
        noise *= stochastic.unsqueeze(1)
    return rows, noise.add_(scores.index_select(0, rows))


def _rows_to_draw(stochastic: Tensor) -> Tensor:
    """On a CPU only the stochastic rows pay for noise. On a GPU all do: to count rows would stop the device."""
    if stochastic.device.type == "cuda":
        return torch.arange(len(stochastic), device=stochastic.device)
    return stochastic.nonzero().squeeze(1)


def vector_quantize_eager(
    x: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    tau: Tensor,
    scale: Tensor,
    row_offset: Tensor,
    groups: int,
    keeps_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(quantized, posterior, indices, best_indices, perturbation, kept) of checked arguments.

    kept: (s + mask g) / t for the backward, (M, N), if ``keeps_scores``; else empty.
    """
    num_rows, num_codes = len(x), len(codebook)
    dtype = compute_dtype(x)
    logits = _Logits(codebook, weight, bias, scale, dtype)
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    best_indices = torch.empty_like(indices)
    tiles = _tiles(num_rows, num_codes, x.device)
    kept = logits.keys.new_empty(num_rows if keeps_scores else 0, num_codes)
    buffer = kept if keeps_scores else logits.keys.new_empty(tiles[0].stop if tiles else 0, num_codes)
    for tile in tiles:
        scores = logits(x[tile].to(dtype), out=buffer[tile] if keeps_scores else buffer[: tile.stop - tile.start])
        best = row_argmax(scores)
        best_indices[tile] = best
        if mask is not None:
            rows, noisy = _noisy(scores, tile, mask, seed, row_offset)
            best[rows] = row_argmax(noisy)
            if keeps_scores:
                scores[rows] = noisy.div_(_temperatures(mask[tile], tau, dtype)[rows])
        indices[tile] = best
    quantized = codebook[indices]
    perturbation = (logits.codebook[indices] - logits.codebook[best_indices]).square_().sum(1)
    group_rows = max(1, num_rows // groups)
    group_of_row = torch.arange(num_rows, device=x.device).div_(group_rows, rounding_mode="floor")
    counts = segment_counts(group_of_row * num_codes + indices, groups * num_codes)
    posterior = counts.view(groups, num_codes).to(dtype).div_(group_rows)
    return quantized, posterior, indices, best_indices, perturbation, kept


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
    scale: Tensor,
    row_offset: Tensor,
    kept: Tensor,
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
    # The look-up's gradient. With distance logits the codes are the keys, and both sums are one.
    grad_lookup = grad_keys if logits.is_distance or not needs_codes else torch.zeros_like(logits.codebook)
    grad_column = logits.column.new_zeros(num_codes)  # [N], sum over m of dS
    if grad_posterior is not None:
        group_rows = max(1, num_rows // len(grad_posterior))
        grad_posterior = grad_posterior.to(dtype) / group_rows  # [G, N]
    # dS keeps its 1 / t until it meets x and the keys, which are narrower than it.
    temperature = logits.column.new_ones(num_rows, 1) if mask is None else _temperatures(mask, tau, dtype)

    tiles = _tiles(num_rows, num_codes, x.device)
    buffers = logits.keys.new_empty(2, tiles[0].stop if tiles else 0, num_codes)
    for tile in tiles:
        both = buffers[:, : tile.stop - tile.start]
        p, grad = both.unbind()
        x_tile, grad_tile, t = x[tile].to(dtype), grad_quantized[tile].to(dtype), temperature[tile]
        if len(kept):
            scores = kept[tile]
        else:
            scores = logits(x_tile, out=grad)
            if mask is not None:
                rows, noisy = _noisy(scores, tile, mask, seed, row_offset)
                scores[rows] = noisy.div_(t[rows])
        # Probabilities under 1e-26 become 0: on a CPU subnormal numbers would make softmax and the products below
        # several times slower. The clamp keeps them out of softmax (e^-60 < 1e-26), the threshold out of p.
        torch.clamp(scores, min=scores.amax(1, keepdim=True) - 60, out=grad)
        torch.threshold_(torch.softmax(grad, 1, out=p), 1e-26, 0.0)
        # dP, with the posterior's gradient as a bias of its columns.
        torch.mm(grad_tile, logits.codebook.t(), out=grad)
        if grad_posterior is not None:
            if len(grad_posterior) == 1:
                grad += grad_posterior
            else:
                numbers = torch.arange(tile.start, tile.stop, device=x.device)
                grad += grad_posterior[numbers // group_rows]
        torch._softmax_backward_data(grad, p, 1, dtype, grad_input=grad)
        if grad_x is not None:
            grad_x[tile] = torch.mm(grad, logits.keys).mul_(logits.factor / t).to(x.dtype)
        if needs_codes:
            grad_column.addmv_(grad.t(), 1 / t.squeeze(1))
            x_tile = x_tile * (logits.factor / t)
            if soft and logits.is_distance:
                grad_keys.addmm_(both.flatten(0, 1).t(), torch.cat([grad_tile, x_tile]))
            else:
                grad_keys.addmm_(grad.t(), x_tile)
                if soft:
                    grad_lookup.addmm_(p.t(), grad_tile)

    if not needs_codes:
        return grad_x, None, None, None
    if codebook_grad == "hard":
        grad_lookup += segment_sum_eager(grad_quantized.to(dtype), indices, num_codes)
    if logits.is_distance:
        grad_keys.addcmul_((grad_column * -logits.factor).unsqueeze(1), logits.codebook)
        return grad_x, grad_keys.to(codebook.dtype), None, None
    assert weight is not None
    grad_bias = None if bias is None else grad_column.to(bias.dtype)
    return grad_x, grad_lookup.to(codebook.dtype), grad_keys.to(weight.dtype), grad_bias
