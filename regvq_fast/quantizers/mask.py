"""Stochastic mask (Reg-VQ, section 3.2): the positions of a token map whose codes are sampled."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from regvq_fast.ops.noise import Stream, row_words

MaskMode = Literal["exact", "bernoulli"]


def stochastic_mask(
    batch_size: int,
    positions: int,
    ratio: float,
    seed: Tensor,
    *,
    mode: MaskMode = "exact",
    row_offset: int | Tensor = 0,
    valid: Tensor | None = None,
) -> Tensor:
    """Sample a mask for each image from the seed.

    Args:
        batch_size: B.
        positions: H * W.
        ratio: fraction of stochastic positions, 0 to 1.
        seed: 0-dim int64 tensor.
        mode: "exact": floor(ratio * positions) positions of every image. "bernoulli": each with probability ``ratio``.
        row_offset: global number of the first position. The mask depends on (seed, global position) only, not on the
            split of a batch over ranks.
        valid: (B * H * W,) bool, False for padding, which is neither counted nor selected; None: no padding.

    Returns:
        (B * H * W,) bool.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in get_args(MaskMode):
        raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(MaskMode)))}, got {mode!r}")
    rows = torch.arange(batch_size * positions, device=seed.device) + row_offset
    words = row_words(seed, rows, Stream.MASK)
    if mode == "bernoulli":
        selected = words < int(ratio * 2**32)
        return selected if valid is None else selected & valid
    if valid is None:
        count = math.floor(ratio * positions + 1e-9)  # 0.29 * 100 is slightly less than 29
        order = words.view(batch_size, positions).argsort(1)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True).view(-1)
    counts = (ratio * valid.view(batch_size, positions).sum(1, keepdim=True).double() + 1e-9).floor()
    order = words.masked_fill(~valid, 2**32).view(batch_size, positions).argsort(1)  # padding last
    first = torch.arange(positions, device=seed.device) < counts
    return torch.zeros_like(first).scatter_(1, order, first).view(-1)
