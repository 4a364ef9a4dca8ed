"""Deterministic sums of rows by code: the hard codebook gradient and the EMA codebook."""

import torch
from torch import Tensor

from regvq_fast.dispatch import Impl, on_device_of, resolve_impl
from regvq_fast.matmul import compute_dtype
from regvq_fast.ops.validation import check_matrix, whole_number


def segment_counts(indices: Tensor, num_segments: int, *, heads: bool = False) -> Tensor:
    """Count how often each of ``num_segments`` values occurs in ``indices`` (any shape, int64): (num_segments,) int64.

    With ``heads`` each column of ``indices`` (..., H) is counted separately: (H, num_segments). Integer addition is
    associative, so the scatter is deterministic on every device. It does not synchronize.
    """
    if heads:
        return segment_counts(*_one_head(indices, num_segments)).view(-1, num_segments)
    flat = indices.reshape(-1)
    return flat.new_zeros(num_segments).scatter_add_(0, flat, torch.ones_like(flat))


def _one_head(indices: Tensor, num_segments: int) -> tuple[Tensor, int]:
    """Return indices (..., H) and their number of values as those of one head whose values continue head by head."""
    heads = indices.shape[-1]
    return indices + num_segments * torch.arange(heads, device=indices.device), heads * num_segments


def segment_sum(values: Tensor, indices: Tensor, num_segments: int, *, impl: Impl = "auto") -> Tensor:
    """Return ``out[n] = sum over m with indices[m] = n of values[m]``, added in a fixed order; no gradient.

    Equivalent to ``torch.zeros(N, D).index_add_(0, indices, values)``, whose order on CUDA is not fixed.

    Args:
        values: (M, D), or (M, H, D) of heads; fp16, bf16, fp32 or fp64.
        indices: (M,) or (M, H) int64 in [0, num_segments), on the device of ``values``.
        num_segments: N.
        impl: "auto" | "triton" | "eager".

    Returns:
        (N, D), or (H, N, D) of heads, of the type of ``values``, summed in fp32 (fp64 for fp64). Temporary memory:
        O(M * D); the kernel's O(M + N).

    Raises:
        ValueError: shapes or devices that don't fit; on a CPU also an index out of range (on CUDA checking would
            force a synchronization, and the result is undefined).
        TypeError: types that don't fit.
    """
    check_matrix("values", values, ndim=3 if isinstance(values, Tensor) and values.ndim == 3 else 2)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.shape != values.shape[:-1]:
        raise ValueError(
            f"indices must have shape {tuple(values.shape[:-1])}, one for each row, got {tuple(indices.shape)}"
        )
    if indices.device != values.device:
        raise ValueError(f"indices are on {indices.device} but values on {values.device}; move them to one device")
    num_segments = whole_number("num_segments", num_segments)
    if num_segments < 0:
        raise ValueError(f"num_segments must not be negative, got {num_segments}")
    chosen = resolve_impl(impl, values.device, values.dtype)
    return _segment_sum_op(values.detach(), indices, num_segments, chosen)


def segment_sum_eager(values: Tensor, indices: Tensor, num_segments: int) -> Tensor:
    # fp32 sums: adding 1 to a sum in fp16 or bf16 has no effect from 2048 or 256 on.
    order = indices.argsort(stable=True)
    counts = segment_counts(indices, num_segments)
    sorted_values = values[order].to(compute_dtype(values))
    return torch.segment_reduce(sorted_values, "sum", lengths=counts, axis=0, unsafe=True).to(values.dtype)


@torch.library.custom_op("regvq::segment_sum", mutates_args=())
def _segment_sum_op(values: Tensor, indices: Tensor, num_segments: int, impl: str) -> Tensor:
    if indices.device.type == "cpu" and indices.numel():
        smallest, largest = (int(extreme) for extreme in torch.aminmax(indices))
        if smallest < 0 or largest >= num_segments:
            raise ValueError(f"indices must be in [0, {num_segments}), got {smallest} to {largest}")
    size = num_segments
    if values.ndim == 3:
        indices, size = _one_head(indices, num_segments)
    rows, indices = values.flatten(0, -2), indices.flatten()
    if impl == "triton":
        from regvq_fast.kernels import segment_sum as kernel

        with on_device_of(values):
            sums = kernel.segment_sum(rows, indices, size).to(values.dtype)
    else:
        sums = segment_sum_eager(rows, indices, size)
    return sums.view(*values.shape[1:-1], num_segments, values.shape[-1])


@_segment_sum_op.register_fake
def _(values: Tensor, indices: Tensor, num_segments: int, impl: str) -> Tensor:
    return values.new_empty(*values.shape[1:-1], num_segments, values.shape[-1])
