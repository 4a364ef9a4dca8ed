"""Deterministic sums of rows by code: the hard codebook gradient and the EMA codebook."""

import torch
from torch import Tensor


def segment_counts(indices: Tensor, num_segments: int) -> Tensor:
    """How often each of ``num_segments`` values occurs in ``indices`` (any shape, int64); (num_segments,) int64.

    Integer additions commute exactly, so the scatter is deterministic on every device, and nothing synchronises.
    """
    flat = indices.reshape(-1)
    return flat.new_zeros(num_segments).scatter_add_(0, flat, torch.ones_like(flat))


def segment_sum(values: Tensor, indices: Tensor, num_segments: int) -> Tensor:
    """``out[n] = sum over m with indices[m] = n of values[m]``, added in the order of m on every device.

    Equivalent to ``torch.zeros(N, D).index_add_(0, indices, values)``, which on CUDA adds in no fixed order.

    Args:
        values: (M, D) floating point.
        indices: (M,) int64 in [0, num_segments).
        num_segments: N.

    Returns:
        (N, D) of the type of ``values``. Temporary memory: O(M * D).
    """
    # In fp16 and bf16 a running sum stops growing at 2048 and 256.
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    order = indices.argsort(stable=True)
    counts = segment_counts(indices, num_segments)
    return torch.segment_reduce(values[order].to(dtype), "sum", lengths=counts, axis=0, unsafe=True).to(values.dtype)
