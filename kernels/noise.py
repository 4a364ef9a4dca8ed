"""Gumbel noise of a tile of scores: device functions of the fused kernels.

A 64-bit seed is the key and (code // 4, global row) the counter of Philox4x32-10 (Salmon et al., SC 2011). The words
equal those of ``regvq_fast/ops/noise.py`` bit for bit, and do not depend on the tile's shape or position. With the
multipliers m0, m1 and the key schedule k0 += 0x9E3779B9, k1 += 0xBB67AE85, a round is

    c0, c1, c2, c3  <-  hi(m1 c2) ^ c1 ^ k0,   lo(m1 c2),   hi(m0 c0) ^ c3 ^ k1,   lo(m0 c0)

from c0 = code // 4, c1 = row >> 32, c2 = row & 0xffffffff, c3 = 0. After one round c0 and c1 depend on the row only, c2
and c3 on the column only; so do the products of the second round. Broadcasting therefore runs the first two rounds on
vectors [BM, 1] and [1, BN / 4], and eight rounds on all pairs. The four words go to four adjacent codes.

    v = (word + 1/2) / 2^32,    E = -log(1 - v),    g = -log E

Small v is the upper tail of g, which argmax selects. Below v = 1/4, ``1 - v`` would lose v's low bits, so a polynomial
computes E with a relative error under 1e-7. g is within 1e-6 max(1, |g|) of its exact value, in [-2.82, 22.88], never
inf or nan.

The kernels keep scores and noise in units of log 2, where exp and log are one instruction each: g / log 2 = -log2 E.
Both logarithms use the special function unit (lg2.approx: absolute error 2^-22 on [1/2, 2], relative error 2^-22
elsewhere): libdevice's logarithm takes about 18 instructions, and each element needs two.
"""

import triton
import triton.language as tl

from regvq_fast.kernels.utils import INTERPRETED, LN_2

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round on uint32 tensors of any shapes that broadcast."""
    # One 32 x 32 -> 64 bit multiplication gives both words.
    product_0, product_1 = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
    new_c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
    new_c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
    return new_c0, product_1.to(tl.uint32), new_c2, product_0.to(tl.uint32)


@triton.jit
def philox_4x32(blocks, rows, seed):
    """The four words of codes 4 * blocks + (0, 1, 2, 3).

    blocks [1, BN / 4] integers in [0, 2^32), rows [BM, 1] int64, seed int64 scalar -> four [BM, BN / 4] uint32.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = blocks.to(tl.uint32), (rows >> 32).to(tl.uint32)
    c2, c3 = rows.to(tl.uint32), c0 ^ c0
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def noise_words(first_code, rows, seed, BN: tl.constexpr):
    """Words of codes first_code + (0 .. BN - 1), both multiples of 4; rows [BM] int64 -> [BM, BN] uint32."""
    blocks = first_code // 4 + tl.arange(0, BN // 4)
    w0, w1, w2, w3 = philox_4x32(blocks[None, :], rows[:, None], seed)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def log2(x):
    """log2 of fp32 values by the special function unit."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def gumbel_from_words(words):
    """Gumbel(0, 1) noise over log 2, fp32, from uint32 words of any shape."""
    v = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    v = tl.minimum(v, 0.999999940395355224609375)  # 1 - 2^-24: words that round to v = 1
    # -log(1 - v) = v + v^2 q(v): least squares at Chebyshev nodes of [0, 1/4].
    q = 0.295719288 * v + 0.11700609
    q = q * v + 0.206919703
    q = q * v + 0.249576307
    q = q * v + 0.333342687
    q = q * v + 0.499999967
    return -log2(tl.where(v < 0.25, v + v * v * q, -LN_2 * log2(1.0 - v)))


@triton.jit
def first_noise_code(head, num_codes):
    """Number of a head's first code in the noise's counters: each head begins at a multiple of four."""
    return head * (tl.cdiv(num_codes, 4) * 4)


@triton.jit
def gumbel_tile(first_code, rows, seed, BN: tl.constexpr):
    """Noise over log 2 of codes first_code + (0 .. BN - 1), both multiples of 4; rows [BM] int64 -> [BM, BN] fp32."""
    return gumbel_from_words(noise_words(first_code, rows, seed, BN))
