"""Counter-based Gumbel noise: Philox4x32-10 (Salmon et al., SC 2011) keyed by the seed, counted by row and code.

Noise depends on ``(seed, global row, code)`` and on nothing else. The layout of a counter is

    c0 = code // 4    c1 = row >> 32    c2 = row & 0xffffffff    c3 = 0        key = (seed & 0xffffffff, seed >> 32)

and the four words of one call belong to four adjacent codes. ``c0`` depends on the code only, ``c1`` and ``c2`` on the
row only, so the first two of the ten rounds run on vectors, and only eight rounds on all pairs. ``kernels/noise.py``
has the same words in Triton, ``kernels/rows.c`` the same bits on CPUs with a C compiler.
"""

import torch
from torch import Tensor

from regvq_fast.native import rows_library, run_rows

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.4286068203e-6
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)


class Stream:
    """Streams of :func:`row_words`, independent of each other, one for each kind of sample.

    The number is ``c3`` of a counter, which is 0 for Gumbel noise. Results depend on it: never change one.
    """

    MASK = 1
    DEAD_CODES = 2
    KEPT_TOKENS = 3
    REPLACED_TOKENS = 4
    DROPPED_CONDITIONS = 5
    CONTRASTIVE_POSITIONS = 16  # to 31, one for each layer
    TIME_STEPS = 32
    CORRUPTION = 33  # and 34: whether to replace a token, and with which
    POSTERIOR = 35  # and 36, likewise
    DROPPED_CAPTIONS = 37
    SAMPLING_STEPS = 38
    MASK_RATIOS = 39
    MASKED_TOKENS = 40
    CONFIDENCES = 41
    RESIDUAL_QUANTIZERS = 42


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of broadcastable counters.

    Args:
        c0, c1, c2, c3: int64 tensors holding unsigned 32-bit words; their shapes broadcast against each other.
        seed: 0-dim int64 tensor, the 64-bit key (low word first).

    Returns:
        Four int64 tensors of the common shape holding unsigned 32-bit words.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    # The high word of a 64-bit product goes into the next c0 or c2; its low word is the next c1 or c3, which only
    # enters an xor and so needs no mask until the end.
    for i in range(_ROUNDS):
        # From the second round on, c0 and c2 are temporaries that may be overwritten.
        product_0 = c0.mul_(_MULTIPLIER_0) if i else c0 * _MULTIPLIER_0
        product_1 = c2.mul_(_MULTIPLIER_1) if i else c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = ((product_0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    c1, c3 = c1 & _LOW, c3 & _LOW
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def gumbel_from_words(words: Tensor) -> Tensor:
    """Gumbel(0, 1) noise from unsigned 32-bit words (int64 tensor); float32, in [-2.82, 22.88], never inf or nan.

    ``v = (word + 1/2) / 2^32`` and ``g = -log(-log1p(-v))``. Small ``v``, where fp32 is densest, is the *upper* tail of
    the noise, which argmax selects: it is resolved to the last bit. Words that round to ``v = 1`` give ``1 - 2^-24``.
    The logarithms are written out, so that every CPU computes the same bits, here and in ``kernels/rows.c``.
    """
    v = words.to(torch.float32).add_(0.5).mul_(2.0**-32)
    u = 1 - v
    lost = (1 - u).sub_(v)  # what u lost by rounding
    u.masked_fill_(u == 0, 2.0**-24)
    return _logarithm(_logarithm(u).add_(lost.mul_(v.add_(1))).neg_()).neg_()


def _logarithm(x: Tensor) -> Tensor:
    """``log(x)`` of positive normal fp32 numbers, within 1 ulp; the comments are in ``kernels/rows.c``."""
    bits = x.view(torch.int32) - _SQRT_HALF
    k = (bits >> 23).to(torch.float32)
    f = bits.bitwise_and_(0x7FFFFF).add_(_SQRT_HALF).view(torch.float32) - 1
    s = f / (f + 2)
    z = s * s
    rest = torch.full_like(z, 2 / 9)
    for coefficient in (2 / 7, 2 / 5, 2 / 3, 0.0):
        rest.mul_(z).add_(coefficient)
    return (k * _LN2_LOW).sub_(s.mul_(f - rest)).add_(f).add_(k.mul_(_LN2_HIGH))


def gumbel_noise(seed: Tensor, rows: Tensor, num_codes: int, head: int = 0) -> Tensor:
    """Gumbel(0, 1) noise of some rows over all codes of a head.

    Args:
        seed: 0-dim int64 tensor.
        rows: (R,) int64 global row numbers, in any order.
        num_codes: N.
        head: number of the head; each head's codes begin at a multiple of four in the counters.

    Returns:
        (R, N) float32. Temporary memory: about 6 times the result in PyTorch, none in C.
    """
    if rows.device.type == "cpu":
        out = torch.empty(len(rows), num_codes)
        if rows_library(out):
            run_rows("regvq_noise", out, int(seed), head, rows.contiguous(), out)
            return out
    num_blocks = (num_codes + 3) // 4
    blocks = torch.arange(num_blocks, device=rows.device) + head * num_blocks
    words = philox4x32(
        blocks[None, :],
        (rows >> 32)[:, None],
        (rows & _LOW)[:, None],
        rows.new_zeros(1, 1),
        seed,
    )
    noise = torch.empty(len(rows), num_blocks, 4, dtype=torch.float32, device=rows.device)
    for i, word in enumerate(words):
        noise[..., i] = word
    return gumbel_from_words(noise).view(len(rows), 4 * num_blocks)[:, :num_codes]


def row_words(seed: Tensor, rows: Tensor, stream: int) -> Tensor:
    """Return a 32-bit random word for each row, token or image, for masks, sampled positions and the like.

    Args:
        seed: 0-dim int64 tensor.
        rows: int64 global row numbers, any shape.
        stream: a number in :class:`Stream`.

    Returns:
        int64 tensor of the shape of ``rows`` holding unsigned 32-bit words.
    """
    zero = torch.zeros_like(rows)
    return philox4x32(zero, rows >> 32, rows & _LOW, zero + stream, seed)[0]
