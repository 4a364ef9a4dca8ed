"""VQ-VAE: nearest code from a codebook of running averages (van den Oord et al., 2017, appendix A.1)."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.ops import assign_codes, segment_sum
from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.ops.segment_sum import segment_counts
from regvq_fast.quantizers.nearest import NearestSettings
from regvq_fast.quantizers.quantizer import (
    CodebookQuantizer,
    CodeMap,
    QuantizerOutput,
    random_rows,
    sample_seed,
    straight_through,
    wide,
)
from regvq_fast.ranks import gather_rows
from regvq_fast.settings import arg, check_at_least

_KMEANS_STEPS = 10


@dataclass(frozen=True)
class EMASettings(NearestSettings):
    """Settings of VQ-VAE."""

    decay: Annotated[float, arg(name="codebook-decay")] = 0.99
    """Decay of the codes' running averages."""
    dead_threshold: float = 0.1
    """Usage, over uniform, that moves a code."""
    kmeans_init: bool = False
    """Initialize the codes by k-means of latents."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        check_at_least(0, {"dead_threshold": self.dead_threshold})


class EMAQuantizer(CodebookQuantizer):
    """Codes are exponential moving averages of the encoder outputs assigned to them; they get no gradient.

    A code whose running fraction of the rows falls below ``dead_threshold`` / N is dead: it moves to an encoder output
    sampled from the batch, and its fraction becomes twice the threshold. At a decay of 0.99 it then has 69 steps to be
    selected before it moves again. All codes of a new codebook are dead, so the first batch initializes them: each
    becomes an encoder output, or the mean of those assigned to it. With ``kmeans_init``, :meth:`initialize` fits them
    instead.

    The averages have the module's type. Train in float32: 16 bits would lose most of a step's change.

    Args:
        num_codes: N.
        code_dim: D.
        settings: fields of :class:`EMASettings`, and ``channels_last``; ``commitment`` weighs ``mean |z - sg(q)|^2``.

    Raises:
        ValueError: a setting that is out of range.
    """

    Settings = EMASettings
    settings: EMASettings
    cluster_share: Tensor
    cluster_sum: Tensor

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        self.embedding.weight.requires_grad_(False)
        self.frozen = False
        self.held: Tensor | None = None  # new codes between hold() and release()
        # Fractions of the rows, not counts: they don't depend on the batch size.
        self.register_buffer("cluster_share", torch.zeros(num_codes))
        self.register_buffer("cluster_sum", torch.zeros(num_codes, code_dim))
        self.register_load_state_dict_pre_hook(_adopt_loaded_codes)
        if self.settings.dead_threshold == 0:  # codes that are never selected stay where they are
            self.start_from_embedding()

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """With ``kmeans_init``, set codes and fractions by ten steps of k-means of z; otherwise do nothing.

        K-means starts from randomly chosen latents (PyTorch's global generator of the CPU). A code without latents
        stays such a latent, and is dead.
        """
        if not self.settings.kmeans_init:
            return
        rows = self._wide_rows(z)
        codes, counts = k_means(rows, random_rows(rows, self.num_codes), _KMEANS_STEPS)
        share = counts.to(rows.dtype) / len(rows)
        self.embedding.weight.copy_(codes)
        self.cluster_share.copy_(share)
        self.cluster_sum.copy_(share.unsqueeze(1) * codes)

    @torch.no_grad()
    def start_from_embedding(self) -> None:
        """Reset the averages to the current codes, each with the uniform fraction of the rows."""
        self.cluster_share.fill_(1 / self.num_codes)
        self.cluster_sum.copy_(self.embedding.weight / self.num_codes)

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        super().adopt(codes, z)
        self.start_from_embedding()
        return None

    def freeze(self) -> None:
        super().freeze()
        self.frozen = True

    def hold(self) -> None:
        self.held = self.embedding.weight.clone()

    def release(self) -> None:
        if self.held is not None:
            self.embedding.weight.copy_(self.held)
            self.held = None

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            padding, dtype = self._padding(valid, z), self._score_dtype(z)
            rows = padding.clear(self._wide_rows(z))
            codebook = wide(self.embedding.weight)
            indices = assign_codes(rows.to(dtype), codebook.to(dtype))
            codes = F.embedding(indices, codebook)
            quantized = straight_through(rows, codes, rotation_trick=self.settings.rotation_trick)
            commitment = padding.mean_squared_error(rows, codes)
            metrics = {"commitment": commitment.detach()}
            out = self._deterministic(z, quantized, indices, self.settings.commitment * commitment, metrics, padding)
            if self.training and not self.frozen:  # every rank makes the same update from the rows of all ranks
                seed = sample_seed(z.device) if seed is None else seed
                valid = None if padding.valid is None else gather_rows(padding.valid)
                self._update_codes(gather_rows(rows.detach()), gather_rows(indices), seed, valid)
            return out

    @torch.no_grad()
    def _update_codes(self, rows: Tensor, indices: Tensor, seed: Tensor, valid: Tensor | None) -> None:
        # No debiasing as in Adam: the codes are a ratio of two averages with the same bias.
        size: int | Tensor = rows.shape[0]
        rate: float | Tensor = 1 - self.settings.decay
        segments = self.num_codes
        if valid is not None:
            indices, segments = torch.where(valid, indices, segments), segments + 1  # the last is padding's, and unused
            rate = rate * valid.any().to(rows.dtype)  # nothing moves if all is padding
            size = valid.sum().clamp(min=1)
        batch_share = segment_counts(indices, segments)[: self.num_codes].to(rows.dtype) / size
        batch_sum = segment_sum(rows, indices, segments)[: self.num_codes] / size
        share = wide(self.cluster_share).lerp(batch_share, rate)
        total = wide(self.cluster_sum).lerp(batch_sum, rate)
        faded = share < 1e-5 / self.num_codes  # the ratio is close to 0 / 0, so the code stays where it is
        if self.settings.dead_threshold > 0:
            threshold = self.settings.dead_threshold / self.num_codes
            dead = share < threshold
            # A random row for each code, without repetition if there are enough rows.
            words = row_words(seed, torch.arange(rows.shape[0], device=rows.device), Stream.DEAD_CODES)
            if valid is not None:
                words = words.masked_fill(~valid, 2**32)  # padding last
                dead &= valid.any()
            candidates = rows[words.argsort()[torch.arange(self.num_codes, device=rows.device) % size]]
            total = torch.where(dead.unsqueeze(1), candidates * 2 * threshold, total)
            share = torch.where(dead, 2 * threshold, share)
            faded &= ~dead
        self.cluster_share.copy_(share)
        self.cluster_sum.copy_(total)
        moved = self.embedding.weight if self.held is None else self.held
        moved.copy_(torch.where(faded.unsqueeze(1), wide(moved), total / share.unsqueeze(1)))


def k_means(rows: Tensor, codes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Move codes (N, D) to the means of the rows (M, D) nearest to them, by some steps of Lloyd's algorithm.

    Returns:
        The codes, and the number of rows (N,) of each; a code without rows stays where it is.
    """
    for _ in range(steps):
        indices = assign_codes(rows, codes)
        counts = segment_counts(indices, len(codes))
        means = segment_sum(rows, indices, len(codes)) / counts.clamp(min=1).unsqueeze(1)
        codes = torch.where(counts.unsqueeze(1) > 0, means, codes)
    return codes, counts


def _adopt_loaded_codes(quantizer: EMAQuantizer, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add averages to a state dict with codes only, such as one of taming's."""
    codes = state_dict.get(f"{prefix}embedding.weight")
    if codes is not None and f"{prefix}cluster_share" not in state_dict:
        state_dict[f"{prefix}cluster_share"] = codes.new_full((quantizer.num_codes,), 1 / quantizer.num_codes)
        state_dict[f"{prefix}cluster_sum"] = codes.detach() / quantizer.num_codes
