"""FSQ: finite scalar quantization (Mentzer et al., 2023), the module of vector-quantize-pytorch."""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.invocation import install
from regvq_fast.matmul import compute_dtype
from regvq_fast.quantizers.quantizer import Quantizer, QuantizerOutput, QuantizerSettings
from regvq_fast.settings import arg

_PAPER_LEVELS = {
    256: (8, 6, 5),
    1024: (8, 5, 5, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}
"""Levels by the approximate number of codes (the paper's table 1)."""
_MOST_CODES = 2**20
"""Most codes; the library's module keeps a table of them."""


@dataclass(frozen=True)
class FSQSettings(QuantizerSettings):
    """Settings of FSQ."""

    levels: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """Levels of the channels. Default: the paper's for --num-codes."""

    def check(self) -> None:
        super().check()
        if self.levels and (min(self.levels) < 3 or math.prod(self.levels) > _MOST_CODES):
            raise ValueError(
                f"levels must be at least 3 each, and their product at most {_MOST_CODES}, got "
                f"{' '.join(map(str, self.levels))}"
            )
        if find_spec("vector_quantize_pytorch") is None:
            raise ValueError(f"fsq needs vector-quantize-pytorch: {install('baselines')}")

    def levels_for(self, num_codes: int) -> tuple[int, ...]:
        """Return the levels; if none are given, the paper's for ``num_codes``."""
        papers = _PAPER_LEVELS | {math.prod(levels): levels for levels in _PAPER_LEVELS.values()}
        if not self.levels and num_codes not in papers:
            *most, last = map(str, _PAPER_LEVELS)
            raise ValueError(
                f"fsq has no levels for num_codes {num_codes}: name them with --levels, or use {', '.join(most)} or "
                f"{last} codes"
            )
        return self.levels or papers[num_codes]

    def sizes(self, num_codes: int, code_dim: int) -> tuple[int, int]:
        levels = self.levels_for(num_codes)
        return math.prod(levels), len(levels)


class FSQQuantizer(Quantizer):
    """Channels bounded by tanh and rounded to a few levels each, without a loss of its own.

    The gradient is straight-through at the rounding and exact at the tanh. The first channel is the lowest digit of an
    index.

    Args:
        num_codes: N, the product of the levels.
        code_dim: D, the number of levels given.
        settings: fields of :class:`FSQSettings`, and ``channels_last``.

    Raises:
        ValueError: a size or a setting that is out of range, or vector-quantize-pytorch is not installed.
    """

    Settings = FSQSettings
    settings: FSQSettings

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        from vector_quantize_pytorch import FSQ

        levels = tuple(self.settings.levels_for(num_codes))  # JSON gives a list
        self.settings = replace(self.settings, levels=levels)
        self.fsq = FSQ(levels)

    def codes(self) -> Tensor:
        """Return the codes (N, D) that indices stand for."""
        return self.fsq.implicit_codebook

    def _latents(self, z: Tensor) -> Tensor:
        return self._to_rows(z, compute_dtype(self.codes()))

    def _indices(self, quantized: Tensor) -> Tensor:
        """Return the indices (M,) of codes (M, D); for nan, which is not checked on a GPU, some valid index."""
        return self.fsq.codes_to_indices(quantized).long().clamp(0, self.num_codes - 1)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding = self._padding(valid, z)
            rows = self._finite(padding.clear(self._latents(z)))
            quantized = self.fsq.quantize(rows)
            return self._deterministic(z, quantized, self._indices(quantized.detach()), rows.new_zeros(()), {}, padding)

    def codes_of(self, indices: Tensor) -> Tensor:
        codes = self.fsq.indices_to_codes(indices.clamp(min=0).flatten()).unflatten(0, indices.shape)
        return self._channels(codes.masked_fill((indices < 0).unsqueeze(-1), 0)).to(self.codes().dtype)

    def logits(self, z: Tensor) -> Tensor:
        # Channels before rounding, in units of a level (the paper's appendix A.1): the nearest digits are the code.
        rows = self._latents(z)
        levels = torch.tensor(self.settings.levels, device=rows.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(rows + torch.atanh(offset / half)) * half - offset
        digits = self.codes().to(rows.dtype) * (levels // 2)
        return F.linear(bounded, digits, -0.5 * digits.square().sum(1)).unflatten(0, self._positions(z))

    def best_codes(self, z: Tensor) -> Tensor:
        return self._indices(self.fsq.quantize(self._latents(z))).unflatten(0, self._positions(z))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.settings.levels}"
