"""Multi-head attention by xformers on a GPU and by PyTorch elsewhere, and a key-value cache."""

import functools
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_XFORMERS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_XFORMERS_ALIGNMENT = 8  # its kernels read 16 bytes at a time; PyTorch takes other head sizes


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value for each head, by a fused kernel if there is one.

    On CUDA, if xformers is installed and has a kernel, this is `xformers.ops.memory_efficient_attention`, otherwise
    `F.scaled_dot_product_attention`. Compiled code uses PyTorch's too: xformers 0.0.35 can't be traced, so that each
    layer would break the graph, and its kernels, CUTLASS's and FlashAttention's, are also in PyTorch.

    Args:
        query: (B, L, heads, head_dim), floating point.
        key, value: (B, S, heads, head_dim) of the same type.
        causal: query i sees only keys 0 to i; needs S = L.

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
            except NotImplementedError as error:  # a build for another PyTorch imports, but has no kernels
                _without_kernel.add(kind)
                reason = str(error).partition("\n")[0]
                warnings.warn(f"PyTorch's attention runs, since xformers has no kernel: {reason}", stacklevel=2)
    return pytorch_attention(query, key, value, causal=causal)


_without_kernel: set[tuple[torch.device, torch.dtype, int, bool]] = set()  # kinds of call that xformers has refused


def pytorch_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Compute `attention` by PyTorch."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Compute `attention` by xformers, which must be installed; on CUDA only."""
    ops = _xformers()
    assert ops is not None
    return ops.memory_efficient_attention(query, key, value, attn_bias=ops.LowerTriangularMask() if causal else None)


class KeyValueCache:
    """Keys and values of every layer, for decoding a sequence token by token, in tensors of fixed address and shape.

    Attention runs over all `length` positions with a mask, which costs as much as the full sequence but has the fixed
    shapes that CUDA graphs and `torch.compile` need; or only over the positions reached. The first `fill` of a layer
    sets batch size and type. Memory: 2 * depth * B * length * width elements.

    Args:
        depth: number of layers.
        length: number of positions of a whole sequence.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        # One tensor per layer: compiled code would copy a common tensor at each write to a slice.
        self.keys: list[Tensor | None] = [None] * depth  # (B, heads, length, head_dim) each
        self.values: list[Tensor | None] = [None] * depth

    def fill(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the keys and values of the first L positions, and return the causal attention among them.

        Args:
            layer: number of the layer, from 0.
            query, key, value: (B, L, heads, head_dim).

        Returns:
            (B, L, heads, head_dim).
        """
        for cache, new in ((self.keys, key), (self.values, value)):
            batch, reached, heads, head_dim = new.shape
            # Zeros: positions not yet reached have weight 0, and 0 times uninitialized memory could be nan.
            tensor = new.new_zeros(batch, heads, self.length, head_dim)
            tensor[:, :, :reached] = new.transpose(1, 2)
            cache[layer] = tensor
        return attention(query, key, value, causal=True)

    def mask(self, position: Tensor) -> Tensor:
        """Return (1, 1, 1, length) to add to the scores of any layer: -inf after `position`, a 0-dim int64 tensor."""
        keys = self.keys[0]
        assert keys is not None
        later = torch.arange(self.length, device=position.device) > position
        return keys.new_zeros(1, 1, 1, self.length).masked_fill_(later, -torch.inf)

    def extend(
        self, layer: int, position: Tensor, reached: int, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Store the key and value of one position, and return the attention of its query up to this position.

        Args:
            layer: number of the layer, which has been filled.
            position: 0-dim int64 tensor, below `length`.
            reached: number of positions attended to: `position` + 1, or `length` with a mask.
            mask: None, or `mask(position)`.
            query, key, value: (B, 1, heads, head_dim).

        Returns:
            (B, 1, heads, head_dim).
        """
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        keys.index_copy_(2, position.view(1), key.transpose(1, 2))
        values.index_copy_(2, position.view(1), value.transpose(1, 2))
        keys, values = keys[:, :, :reached], values[:, :, :reached]
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)


@functools.cache
def _xformers() -> ModuleType | None:
    # Imported at the first use on a GPU, since it warns on machines without one.
    try:
        import xformers.ops
    except Exception as error:  # a build for another PyTorch may raise anything: OSError, RuntimeError, AttributeError
        if not (isinstance(error, ModuleNotFoundError) and error.name == "xformers"):  # not installed
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            warnings.warn(f"PyTorch's attention runs, since xformers fails to import: {reason}", stacklevel=2)
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
