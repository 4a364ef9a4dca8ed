"""LFQ: lookup-free quantization, the sign of each channel (Yu et al., "Language Model Beats Diffusion", 2024)."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.matmul import compute_dtype
from regvq_fast.ops import softmax_statistics
from regvq_fast.padding import Padding
from regvq_fast.quantizers.nearest import CommitmentSettings
from regvq_fast.quantizers.quantizer import NearestCodes, Quantizer, QuantizerOutput, straight_through, wide
from regvq_fast.settings import arg, check_at_least


@dataclass(frozen=True)
class LFQSettings(CommitmentSettings):
    """Settings of LFQ."""

    entropy_weight: float = 0.1
    """Weight of the entropy terms."""
    diversity: float = 1.0
    """Relative weight of the mean's entropy."""
    temperature: float = 0.01
    """Temperature of their soft assignment."""
    group_bits: Annotated[int, arg(metavar="N")] = 14
    """Maximum bits per entropy of the mean."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"entropy_weight": self.entropy_weight, "diversity": self.diversity})
        check_at_least(1, {"group_bits": self.group_bits})
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")

    def sizes(self, num_codes: int, code_dim: int) -> tuple[int, int]:
        bits = max(1, num_codes.bit_length() - 1)
        if num_codes != 1 << bits:
            raise ValueError(f"num_codes must be a power of two, got {num_codes}: use {1 << bits} or {2 << bits}")
        return num_codes, bits


class LFQQuantizer(Quantizer):
    """The sign of each channel: N = 2^D codes of -1 and 1, without a table of them.

    The first channel is the highest bit of an index. The gradient to the encoder is the identity. In training, with the
    soft assignment ``p[m] = softmax_n(-|x_m - z_n|^2 / temperature)`` of a row to all codes,

        loss = commitment * mean (x - sg(q))^2 + entropy_weight * (mean_m H(p[m]) - diversity * H(mean_m p[m]))

    over the rows of a micro-batch of this rank; in evaluation only the commitment.

    The bits of ``p[m]`` are independent, so its entropy is the sum over groups of bits. For the entropy of the mean
    this sum is an upper bound: codes of more than ``group_bits`` bits are split into groups of about equal size and use
    the bound, which is cheap even for 2^18 codes. Time and memory are those of `softmax_statistics` with the 2^bits
    codes of a group; only :meth:`codes`, :meth:`nearest_codes` and :meth:`logits` have N rows.

    Args:
        num_codes: N, a power of two.
        code_dim: D = log2(N).
        settings: fields of :class:`LFQSettings`, and ``channels_last``.

    Raises:
        ValueError: a size or a setting that is out of range.
    """

    Settings = LFQSettings
    settings: LFQSettings
    one: Tensor

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        self.register_buffer("one", torch.tensor(self._magnitude()), persistent=False)
        """() value of a channel whose bit is set."""

    def _magnitude(self) -> float:
        return 1.0

    def _bounded(self, rows: Tensor) -> Tensor:
        """Return rows (M, D) in the form that is quantized."""
        return rows

    def _latents(self, z: Tensor, padding: Padding | None = None) -> Tensor:
        rows = self._to_rows(z, compute_dtype(self.one))
        return self._bounded(rows if padding is None else padding.clear(rows))

    def _powers(self, bits: int) -> Tensor:
        """Return the values (bits,) of an index's bits, the highest first."""
        return 2 ** torch.arange(bits - 1, -1, -1, device=self.one.device)

    def _codes(self, bits: Tensor) -> Tensor:
        """Return the codes of bits (..., bits) bool, in the type of :func:`wide`."""
        one = wide(self.one)
        return torch.where(bits, one, -one)

    def _indices(self, rows: Tensor) -> Tensor:
        return ((rows > 0) * self._powers(self.code_dim)).sum(1)

    def _all_codes(self, bits: int) -> Tensor:
        return self._codes(torch.arange(1 << bits, device=self.one.device)[:, None] // self._powers(bits) % 2 > 0)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding = self._padding(valid, z)
            rows = self._finite(self._latents(z, padding))
            codes = self._codes(rows > 0)
            quantized = straight_through(rows, codes)
            commitment = padding.mean_squared_error(rows, codes)
            loss, metrics = self.settings.commitment * commitment, {"commitment": commitment.detach()}
            if self.training and self.settings.entropy_weight > 0:
                entropy, of_mean = self._entropies(rows, padding)
                loss = loss + self.settings.entropy_weight * (entropy - self.settings.diversity * of_mean)
                metrics |= {"entropy": entropy.detach(), "entropy_of_mean": of_mean.detach()}
            return self._deterministic(z, quantized, self._indices(rows), loss, metrics, padding)

    def _entropies(self, rows: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """Return the rows' mean entropy and the entropy of their mean, each a sum over groups of bits."""
        groups = rows.tensor_split(-(-self.code_dim // self.settings.group_bits), dim=1)
        entropies = []
        for group in groups:
            # All codes of a group have the same length, so -|x - z|^2 is 2 x.z up to a constant of the row.
            entropy, mean = softmax_statistics(
                group.contiguous(),
                self._all_codes(group.shape[1]),
                temperature=self.settings.temperature / 2,
                valid=padding.valid,
            )
            mean = padding.mean_of_batch(mean)
            of_mean = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
            entropies.append(torch.stack([padding.mean_of_ranks(entropy), of_mean]))
        entropy, of_mean = torch.stack(entropies).sum(0)
        return entropy, of_mean

    def codes(self) -> Tensor:
        """Return the codes (N, D) that indices stand for."""
        return self._all_codes(self.code_dim)

    def codes_of(self, indices: Tensor) -> Tensor:
        indices = indices.unsqueeze(-1)
        codes = self._codes(indices // self._powers(self.code_dim) % 2 > 0).masked_fill(indices < 0, 0)
        return self._channels(codes).to(self.one.dtype)

    def logits(self, z: Tensor) -> Tensor:
        return F.linear(self._latents(z), self.codes()).unflatten(0, self._positions(z))

    def best_codes(self, z: Tensor) -> Tensor:
        return self._indices(self._latents(z)).unflatten(0, self._positions(z))

    def nearest_codes(self) -> NearestCodes | None:
        codes = self.codes()
        return NearestCodes(codes, torch.zeros_like(codes[0]), torch.ones_like(codes[0]))
