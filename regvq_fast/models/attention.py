"""Multi-head attention by the fastest implementation at hand: xformers' on a GPU, PyTorch's elsewhere."""

import functools
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_XFORMERS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_XFORMERS_ALIGNMENT = 8  # its kernels read 16 bytes at a time; other head sizes are left to PyTorch


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value, a head at a time; the L x L matrix never reaches memory.

    On CUDA, where xformers is installed and has a kernel, it is `xformers.ops.memory_efficient_attention`; everywhere
    else it is `F.scaled_dot_product_attention`. So it is in compiled code, too: in xformers 0.0.35 the choice of a
    kernel can't be traced (a comment of its own says so), so that each layer would break the graph, while the kernels
    it would choose are those that PyTorch has, CUTLASS's and FlashAttention's. Both are differentiable.

    Args:
        query: (B, L, heads, head_dim), floating point.
        key, value: (B, S, heads, head_dim) of the same type.
        causal: query i sees the keys 0 to i only; needs S = L.

    Returns:
        (B, L, heads, head_dim) of the same type.

    Raises:
        TypeError: tensors of different types.
        ValueError: shapes that don't fit.
    """
    _check(query, key, value, causal)
    if _wants_xformers(query):
        kind = (query.device, query.dtype, query.shape[-1], causal)
        if kind not in _without_kernel:
            try:
                return xformers_attention(query, key, value, causal=causal)
            except NotImplementedError as error:  # a build for another PyTorch has no kernels, and imports all the same
                _without_kernel.add(kind)
                reason = str(error).partition("\n")[0]
                warnings.warn(f"using PyTorch's attention: xformers has no kernel: {reason}", stacklevel=2)
    return pytorch_attention(query, key, value, causal=causal)


_without_kernel: set[tuple[torch.device, torch.dtype, int, bool]] = set()  # what xformers has refused


def pytorch_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """`attention` by PyTorch."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """`attention` by xformers, which must be installed; on CUDA only."""
    ops = _xformers()
    assert ops is not None
    return ops.memory_efficient_attention(query, key, value, attn_bias=ops.LowerTriangularMask() if causal else None)


class KeyValueCache:
    """The keys and values of every layer, for decoding a sequence token by token in tensors that never move or grow.

    Attention can run over all `length` places with a mask on those not reached yet: its cost is that of the full
    sequence, but shapes and addresses stay, as a CUDA graph and `torch.compile` want them. Or over the places reached.
    The first `fill` of a layer decides batch and type. Memory: 2 * depth * B * length * width elements.

    Args:
        depth: layers.
        length: places of a whole sequence.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        # A tensor a layer: of slices of one, compiled code would copy the whole at each write.
        self.keys: list[Tensor | None] = [None] * depth  # (B, heads, length, head_dim) each
        self.values: list[Tensor | None] = [None] * depth

    def fill(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the keys and values of the first L places; causal attention among them.

        Args:
            layer: from 0 on.
            query, key, value: (B, L, heads, head_dim).

        Returns:
            (B, L, heads, head_dim).
        """
        for cache, new in ((self.keys, key), (self.values, value)):
            batch, reached, heads, head_dim = new.shape
            # Zeros: a place that isn't reached yet has weight 0, and 0 times what empty memory may hold could be nan.
            tensor = new.new_zeros(batch, heads, self.length, head_dim)
            tensor[:, :, :reached] = new.transpose(1, 2)
            cache[layer] = tensor
        return attention(query, key, value, causal=True)

    def mask(self, place: Tensor) -> Tensor:
        """(1, 1, 1, length) to add to the scores: -inf behind `place`, a 0-dim int64 tensor. For all layers."""
        keys = self.keys[0]
        assert keys is not None
        behind = torch.arange(self.length, device=place.device) > place
        return keys.new_zeros(1, 1, 1, self.length).masked_fill_(behind, -torch.inf)

    def extend(
        self, layer: int, place: Tensor, reached: int, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Keep the key and value of one place; attention of its query to the places before it and itself.

        Args:
            layer: from 0 on; it has been filled.
            place: 0-dim int64 tensor, below `length`.
            reached: attention is over so many places, either `place` + 1 or, with a mask, `length`.
            mask: None, or that of `place`.
            query, key, value: (B, 1, heads, head_dim).

        Returns:
            (B, 1, heads, head_dim).
        """
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        keys.index_copy_(2, place.view(1), key.transpose(1, 2))
        values.index_copy_(2, place.view(1), value.transpose(1, 2))
        keys, values = keys[:, :, :reached], values[:, :, :reached]
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)


@functools.cache
def _xformers() -> ModuleType | None:
    # Imported at the first use on a GPU, since it warns loudly where there is none.
    try:
        import xformers.ops
    except Exception as error:  # a build for another PyTorch may raise anything: OSError, RuntimeError, AttributeError
        if not (isinstance(error, ModuleNotFoundError) and error.name == "xformers"):  # which is to have none
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            warnings.warn(f"using PyTorch's attention: xformers fails to import: {reason}", stacklevel=2)
        return None
    return xformers.ops


def _wants_xformers(query: Tensor) -> bool:
    return query.is_cuda and not torch.compiler.is_compiling() and _fits_xformers(query) and _xformers() is not None


def _fits_xformers(query: Tensor) -> bool:
    return query.dtype in _XFORMERS_DTYPES and query.shape[-1] % _XFORMERS_ALIGNMENT == 0


def _check(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(f"query must be (B, L, heads, head_dim), key and value (B, S, heads, head_dim), got {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query, key and value must have the same batch, heads and head_dim, got {shapes}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal attention needs as many keys as queries, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one type, got {query.dtype}, {key.dtype} and {value.dtype}")
