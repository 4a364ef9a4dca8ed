"""Regularized vector quantization, backward: the straight-through softmax's gradients, chunk by chunk of rows.

Reg-VQ (Zhang et al., CVPR 2023), Algorithm 1. With u = (s + mask g) / t the scores over their temperature and lse
their log-sum-exp, both from the forward's formulas, dQ and dA the gradients of the quantized rows and of the posterior,
R rows in a group, f the factor of the product (2 scale or scale) and k the keys (codes or weight):

    p[m,n]  = exp(u[m,n] - lse[m])
    dP[m,n] = dQ_m . z_n + dA[group(m), n] / R
    r[m]    = sum_n p dP / sum_n p          (sum_n p is 1 but for the rounding of lse, which large scores make felt)
    dS[m,n] = p (dP - r) / t
    dx = f dS k,   dk = f dS^T x,   dcolumn = sum_m dS,   lookup = p^T dQ ("soft"; "hard": the sum by chosen code)
    distance:  dZ = lookup + dk - f diag(dcolumn) z        linear:  dZ = lookup,  dW = dk,  db = dcolumn

For a chunk of rows, one sweep makes p (scores and dP multiplied in its tiles, noise drawn again) and r, a second one
multiplies dP again and makes f dS, and three products give dx, dk and the look-up's gradient. That is 6 products of
2 M N D operations; sweeps that keep nothing take 8 (S, dP, sum p dP z, sum p z by rows; S, dP, dS^T x, p^T dQ by
codes). p and dS are kept in the type of x: a tensor-core product would round them to it anyway.

In fp16 p is kept times 2^15 and dS relative to a bound on its magnitude: fp16 has no room for probabilities under 1e-7
and for gradients after a loss scale.

Deterministic: every element has one writer, every sum a fixed order. Memory: two buffers of a chunk, which has
max(2^25, 512 N) scores at most (``fused`` at 16 bits: max(2^25, 1024 N)), in the type of x (``chunked``: two more in
fp32), and O((M + N) D).
"""

from functools import partial

import torch
import triton

from regvq_fast.kernels import schedules
from regvq_fast.kernels.code_gradients import code_gradients
from regvq_fast.kernels.constants import FP16_SCALE, LOG2_E
from regvq_fast.kernels.products import product_fp32, without_tf32
from regvq_fast.kernels.score_gradients import grad_scores_kernel, probabilities_kernel
from regvq_fast.kernels.segment_sum import segment_sum
from regvq_fast.kernels.tiles import column_term, order_rows

# Codes of a part at least: parts only add up their shares of r.
MIN_PART_CODES = 256


def vector_quantize_backward(
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    x: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    indices: torch.Tensor,
    tau: torch.Tensor,
    scale: torch.Tensor,
    row_offset: torch.Tensor,
    lse: torch.Tensor,
    codebook_grad: str,
    needs_x: bool,
    needs_codes: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (x, codebook, weight, bias) in their types; None for those that nobody needs.

    indices (M,) int64 and lse (M,) fp32 are the forward's.

    Raises:
        RuntimeError: the forward kept no lse.
    """
    if len(lse) != len(x):
        raise RuntimeError(
            "vector_quantize kept nothing for a backward, since no input required a gradient where it was called: "
            "for gradients under torch.func.vmap give impl='eager'"
        )
    x, codebook, grad_quantized = x.contiguous(), codebook.contiguous(), grad_quantized.contiguous()
    keys = codebook if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    (num_rows, width), num_codes = x.shape, codebook.shape[0]
    how, dtype = schedules.schedule(x.device), x.dtype
    given = how == "chunked"
    # Each chunk reads and writes the codes' gradients: as few of them as 2 KiB a code and buffer allow.
    least = schedules.MIN_CHUNK_ROWS * (1 if given or dtype == torch.float32 else 2)
    chunk = schedules.equal_chunks(num_rows, schedules.chunk_rows(num_codes, least))
    factor = 2.0 if weight is None else 1.0  # times the scale, which is on the device
    column = column_term(codebook, weight is not None, bias, LOG2_E * (-1.0 if weight is None else 1.0), scale)
    group_rows = num_rows if grad_posterior is None else max(1, num_rows // grad_posterior.shape[0])
    if grad_posterior is not None:
        grad_posterior = grad_posterior.to(torch.float32).contiguous() / group_rows
    order = None if mask is None else order_rows(mask, min(chunk, schedules.ORDER_WINDOW))
    magnitude, p_scale = None, 1.0
    if dtype == torch.float16:
        p_scale = FP16_SCALE
        magnitude = _magnitude(grad_quantized, grad_posterior, codebook, tau, factor * scale)
    flags = {
        "D": width,
        "NOISE": mask is not None,
        "POSTERIOR": grad_posterior is not None,
        "ONE_GROUP": grad_posterior is not None and grad_posterior.shape[0] == 1,
        "GIVEN": given,
        "PRECISION": schedules.precision(dtype),
    }
    needs_column = needs_codes and (weight is None or bias is not None)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_keys = grad_lookup = grad_column = None
    if needs_codes and codebook_grad == "hard":
        grad_lookup = segment_sum(grad_quantized, indices, num_codes)

    def make_p(
        start: int,
        end: int,
        scores: torch.Tensor | None,
        products: torch.Tensor | None,
        p: torch.Tensor,
        tile: schedules.Tile,
    ) -> torch.Tensor:
        """Fills p; returns the sums of p dP and of p of the chunk's rows, (rows, 2)."""
        waves = 1 if order is None else schedules.NOISY_WAVES
        part = schedules.part_codes(end - start, num_codes, tile, MIN_PART_CODES, x.device, waves)
        num_parts = triton.cdiv(num_codes, part)
        shares = x.new_empty(end - start, 2, num_parts, dtype=torch.float32)
        probabilities_kernel[(triton.cdiv(end - start, tile.BM) * num_parts,)](
            x, keys, codebook, column, grad_quantized, grad_posterior, scores, products, lse,
            order, mask, seed, row_offset, tau, scale, p, shares,
            start, end, num_codes, part, num_parts, group_rows, factor * LOG2_E, p_scale,
            LINEAR=weight is not None, **flags, **tile.options(),
        )  # fmt: skip
        return shares.sum(2)

    def make_grad_scores(
        start: int,
        end: int,
        products: torch.Tensor | None,
        row_sums: torch.Tensor,
        p: torch.Tensor,
        grad_scores: torch.Tensor,
        tile: schedules.Tile,
    ) -> torch.Tensor | None:
        """Fills f dS; returns its column sums (N,), where they are needed."""
        part = schedules.part_codes(end - start, num_codes, tile, MIN_PART_CODES, x.device)
        grid = (triton.cdiv(end - start, tile.BM), triton.cdiv(num_codes, part))
        column_shares = column.new_empty(grid[0], num_codes) if needs_column else None
        grad_scores_kernel[grid](
            codebook, grad_quantized, grad_posterior, products, row_sums,
            order, mask, tau, scale, magnitude, p, grad_scores, column_shares,
            start, end, num_codes, part, group_rows, p_scale, factor,
            SCALED=magnitude is not None, COLUMN=needs_column, **flags, **tile.options(),
        )  # fmt: skip
        return None if column_shares is None else column_shares.sum(0)

    p_buffer, grad_scores_buffer = x.new_empty(2, min(chunk, num_rows), num_codes)
    kind = (num_codes, triton.next_power_of_2(min(chunk, num_rows)), needs_column, *flags.values())
    call = (how, dtype, width, kind, x.device)
    first_sweep = "probabilities" if weight is None else "probabilities_linear"  # of two tiles of codes
    one_row = grad_posterior is None or flags["ONE_GROUP"]  # of the posterior's gradient, or several, a tile of them
    second_sweep = "grad_scores" if one_row else "grad_scores_grouped"
    for start in range(0, num_rows, chunk):
        end = min(start + chunk, num_rows)
        p, grad_scores = p_buffer[: end - start], grad_scores_buffer[: end - start]
        scores = products = None
        if given:
            with without_tf32(x.device):
                scores = product_fp32(x[start:end], keys.t())
                products = product_fp32(grad_quantized[start:end], codebook.t())
        fill_p = partial(make_p, start, end, scores, products, p)
        row_sums = schedules.run(first_sweep, *call, fill_p)
        fill_grad_scores = partial(make_grad_scores, start, end, products, row_sums, p, grad_scores)
        column_sums = schedules.run(second_sweep, *call, fill_grad_scores)
        if grad_x is not None:
            if magnitude is None:
                torch.mm(grad_scores, keys, out=grad_x[start:end])
            else:
                torch.mul(product_fp32(grad_scores, keys), magnitude, out=grad_x[start:end])
        if needs_codes:
            grad_keys = product_fp32(grad_scores.t(), x[start:end], grad_keys)
            if codebook_grad == "soft":
                grad_lookup = product_fp32(p.t(), grad_quantized[start:end], grad_lookup)
        if column_sums is not None:
            grad_column = column_sums if grad_column is None else grad_column.add_(column_sums)

    if not needs_codes:
        return grad_x, None, None, None
    if grad_keys is None:  # no rows
        grad_weight, grad_bias = (None if tensor is None else torch.zeros_like(tensor) for tensor in (weight, bias))
        return grad_x, torch.zeros_like(codebook), grad_weight, grad_bias
    lookup_factor = 1 / p_scale if codebook_grad == "soft" else 1.0
    if weight is None:
        assert grad_column is not None
        # The column holds -scale |z|^2, and its sums the factor f = 2 scale.
        grad_codes = code_gradients(grad_lookup, lookup_factor, grad_keys, grad_column, magnitude, codebook)
        return grad_x, grad_codes, None, None
    if magnitude is not None:
        grad_keys *= magnitude
        grad_column = None if grad_column is None else grad_column * magnitude
    if grad_lookup is None:  # "none"
        grad_codes = torch.zeros_like(codebook)
    else:
        grad_codes = (grad_lookup if lookup_factor == 1 else grad_lookup.mul_(lookup_factor)).to(dtype)
    grad_bias = None if grad_column is None else (grad_column / (factor * scale)).to(dtype)
    return grad_x, grad_codes, grad_keys.to(dtype), grad_bias


def _magnitude(
    grad_quantized: torch.Tensor,
    grad_posterior: torch.Tensor | None,
    codebook: torch.Tensor,
    tau: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """What f dS is divided by, () fp32, so that it fills fp16: |f dS| <= f max |dP| / t, and max |dP| from norms."""

    def largest_norm(matrix: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
        return norms.max() if len(norms) else norms.new_zeros(())

    bound = largest_norm(grad_quantized) * largest_norm(codebook)
    if grad_posterior is not None:
        bound = bound + grad_posterior.abs().max()
    return (bound / tau.to(torch.float32).clamp(max=1.0)).clamp(min=1e-20) * (factor.to(torch.float32) * 2.0**-15)
