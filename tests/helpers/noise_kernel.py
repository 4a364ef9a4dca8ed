"""The kernels' noise written to memory, which no kernel of the library does: for the tests of its device functions."""

import torch
import triton
import triton.language as tl

from regvq_fast.kernels.noise import gumbel_from_words, noise_words
from regvq_fast.kernels.utils import LN_2

# BM rows, BN codes (a multiple of 4), warps.
CONFIG = {"BM": 16, "BN": 128, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def gumbel_noise_kernel(
    seed_ptr,  # () int64
    rows_ptr,  # (R,) int64
    out_ptr,  # (R, N) fp32, or int64 where WORDS
    num_rows,
    num_codes,
    WORDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM], place in rows and out
    first_code = tl.program_id(1) * BN
    code = first_code + tl.arange(0, BN)  # [BN]
    rows = tl.load(rows_ptr + row, mask=row < num_rows, other=0)
    words = noise_words(first_code, rows, tl.load(seed_ptr), BN)
    place = out_ptr + row[:, None] * num_codes + code[None, :]
    inside = (row < num_rows)[:, None] & (code < num_codes)[None, :]
    if WORDS:
        tl.store(place, words.to(tl.int64), mask=inside)
    else:
        tl.store(place, gumbel_from_words(words) * LN_2, mask=inside)


def gumbel_noise(
    seed: torch.Tensor, rows: torch.Tensor, num_codes: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Noise of some rows over all codes, as ``regvq_fast.ops.noise.gumbel_noise``.

    Args:
        seed: 0-dim int64 tensor on the device, read there.
        rows: (R,) int64 global row numbers, contiguous, in any order.
        num_codes: N.
        out: (R, N) contiguous, float32 for the noise, int64 for its raw 32-bit words; None: a new float32 tensor.

    Returns:
        ``out``.
    """
    if out is None:
        out = torch.empty(rows.shape[0], num_codes, dtype=torch.float32, device=rows.device)
    if out.numel():
        grid = (triton.cdiv(rows.shape[0], CONFIG["BM"]), triton.cdiv(num_codes, CONFIG["BN"]))
        words = out.dtype == torch.int64
        gumbel_noise_kernel[grid](seed, rows, out, rows.shape[0], num_codes, WORDS=words, **CONFIG)
    return out
