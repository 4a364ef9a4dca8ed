"""Deterministic sums of rows by code: the hard codebook gradient and the EMA codebook."""

import torch
from torch import Tensor

from regvq_fast.ops._common import Impl, compute_dtype, on_device_of, resolve_impl


def segment_counts(indices: Tensor, num_segments: int) -> Tensor:
    """How often each of ``num_segments`` values occurs in ``indices`` (any shape, int64); (num_segments,) int64.

    Integer additions commute exactly, so the scatter is deterministic on every device, and nothing synchronises.
    """
    flat = indices.reshape(-1)
    return flat.new_zeros(num_segments).scatter_add_(0, flat, torch.ones_like(flat))


def segment_sum(values: Tensor, indices: Tensor, num_segments: int, *, impl: Impl = "auto") -> Tensor:
    """``out[n] = sum over m with indices[m] = n of values[m]``, added in a fixed order on every device; no gradient.

    Equivalent to ``torch.zeros(N, D).index_add_(0, indices, values)``, which on CUDA adds in no fixed order.

    Args:
        values: (M, D) floating point.
        indices: (M,) int64 in [0, num_segments).
        num_segments: N.
        impl: "auto" | "triton" | "eager".

    Returns:
        (N, D) of the type of ``values``, summed in fp32 (fp64 for fp64). Temporary memory: O(M * D); the kernel's
        O(M + N).
    """
    chosen = resolve_impl(impl, values.device, values.dtype)
    return torch.ops.regvq.segment_sum(values.detach(), indices, num_segments, chosen)


def segment_sum_eager(values: Tensor, indices: Tensor, num_segments: int) -> Tensor:
    # In fp16 and bf16 a running sum stops growing at 2048 and 256.
    order = indices.argsort(stable=True)
    counts = segment_counts(indices, num_segments)
    sorted_values = values[order].to(compute_dtype(values))
    return torch.segment_reduce(sorted_values, "sum", lengths=counts, axis=0, unsafe=True).to(values.dtype)


@torch.library.custom_op("regvq::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, indices: Tensor, num_segments: int, impl: str) -> Tensor:
    if impl == "triton":
        from regvq_fast.kernels import segment_sum as kernel

        with on_device_of(values):
            return kernel.segment_sum(values, indices, num_segments).to(values.dtype)
    return segment_sum_eager(values, indices, num_segments)


@_segment_sum.register_fake
def _(values: Tensor, indices: Tensor, num_segments: int, impl: str) -> Tensor:
    return values.new_empty(num_segments, values.shape[1])
