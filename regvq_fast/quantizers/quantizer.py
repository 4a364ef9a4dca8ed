"""The interface of quantizers, and the base of those with a codebook of embeddings."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.matmul import compute_dtype, score_dtype
from regvq_fast.ops.validation import check_finite, check_rows
from regvq_fast.padding import Padding
from regvq_fast.settings import Section


class QuantizerOutput(NamedTuple):
    """Output of a quantizer for latents of any shape: maps (B, D, H, W), sequences (B, D, T), video (B, D, T, H, W)."""

    quantized: Tensor
    """(B, D, *), with ``channels_last`` (B, *, D), with the quantizer's gradient to its input; 0 for padding. float32,
    or float64 from a float64 module; from reg-vq and gumbel-vq on a GPU, the type of the scores' products."""
    indices: Tensor
    """(B, *) int64, the selected codes; -1 for padding."""
    loss: Tensor
    """0-dim float32 or float64: weighted sum of the quantizer's own losses."""
    metrics: dict[str, Tensor]
    """0-dim and detached, for logging."""
    perturbation: Tensor
    """(B, *) of the same type: |z[index] - z[best_index]|^2; 0 where the selection is deterministic."""
    mask: Tensor
    """(B, *) bool, the stochastic positions."""


class NearestCodes(NamedTuple):
    """Codes such that the best one for a latent z is the nearest to ``(z - shift) * gain``."""

    codes: Tensor
    """(N, D), the decoder's input."""
    shift: Tensor
    """(D,)."""
    gain: Tensor
    """(D,)."""


class CodeMap(NamedTuple):
    """Map from a quantizer's codes to those of a trained decoder: ``scale * code + shift``."""

    scale: Tensor
    """(D,)."""
    shift: Tensor
    """(D,)."""


@dataclass(frozen=True)
class QuantizerSettings(Section):
    """Settings of a quantizer other than the codebook's size; subclasses add fields, which are flags."""

    def check_mask(self, positions: int) -> None:
        """Raise ValueError unless a stochastic mask selects some of an image's positions; here there is no mask."""
        raise ValueError("there are none: choose another")

    def sizes(self, num_codes: int, code_dim: int) -> tuple[int, int]:
        """Return N and D of the quantizer for those of a run; some quantizers derive D, or both.

        Raises:
            ValueError: the quantizer has no codebook of this size.
        """
        return num_codes, code_dim


class QuantizerSection(Protocol):
    """Settings of a run that all quantizers share, with the fields of one class of `QuantizerSettings`."""

    @property
    def num_codes(self) -> int: ...
    @property
    def code_dim(self) -> int: ...
    @property
    def fp32_scores(self) -> bool: ...


class Quantizer(nn.Module):
    """A map from latents to ``num_codes`` codes of ``code_dim`` channels; subclasses define `forward` and `codes_of`.

    Args:
        num_codes: N.
        code_dim: D.
        channels_last: latents and their codes are (B, *, D); else (B, D, *).
        settings: fields of `Settings`, kept as `settings`.

    Raises:
        ValueError: a size or a setting that is out of range.
    """

    Settings: ClassVar[type[QuantizerSettings]] = QuantizerSettings
    """Class of the settings."""
    scheduled: ClassVar[tuple[str, ...]] = ()
    """Names of the values that :meth:`set_progress` changes, for messages."""
    fp32_scores = False
    """Multiply latents and codes in fp32 even on a GPU under autocast."""

    def __init__(self, num_codes: int, code_dim: int, *, channels_last: bool = False, **settings: Any) -> None:
        super().__init__()
        if num_codes < 1 or code_dim < 1:
            raise ValueError(f"num_codes and code_dim must be at least 1, got {num_codes} and {code_dim}")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.channels_last = channels_last
        self.settings = self.Settings(**settings)
        self.settings.check()
        sizes = self.settings.sizes(num_codes, code_dim)
        if sizes != (num_codes, code_dim):
            raise ValueError(
                f"{type(self).__name__} has num_codes={sizes[0]}, code_dim={sizes[1]} with these settings, got "
                f"{num_codes} and {code_dim}"
            )

    @classmethod
    def settings_of(cls, section: Any) -> QuantizerSettings:
        """Return this quantizer's settings from the fields of a run's section."""
        return cls.Settings(**{item.name: getattr(section, item.name) for item in fields(cls.Settings)})

    @classmethod
    def from_section(cls, section: QuantizerSection) -> Self:
        """Build the quantizer that a run's section describes."""
        settings = cls.settings_of(section)
        quantizer = cls(*settings.sizes(section.num_codes, section.code_dim), **asdict(settings))
        quantizer.fp32_scores = section.fp32_scores
        return quantizer

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor as plain values."""
        named = {name: getattr(self, name) for name in ("num_codes", "code_dim", "channels_last")}
        return named | asdict(self.settings)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        """Select a code for each position of z, (B, D, *) or with ``channels_last`` (B, *, D).

        In evaluation this is the best code. In training some quantizers sample.

        Args:
            z: latents.
            seed: 0-dim int64, for quantizers that sample; the same on all ranks. None: sampled from PyTorch's global
                generator.
            row_offset: number of z's first position among those of all ranks and micro-batches.
            valid: (B, *) bool, False for padding, which may hold anything; None: no padding. Padding counts in no loss,
                statistic or average and gets no gradient, but row numbers count it. Give ``valid`` on all ranks or on
                none. Ranks may have different numbers of valid positions if their z have one size: the mean of the
                ranks' losses is then the loss of the whole batch.

        Raises:
            ValueError: latents of another shape, or none; on a CPU nan or inf in them; ``valid`` of another shape.
            TypeError: ``valid`` is not bool.
        """
        raise NotImplementedError

    def codes_of(self, indices: Tensor) -> Tensor:
        """Return the codes of tokens in the module's type: (B, *) int64 -> (B, D, *) or (B, *, D); zeros for -1."""
        raise NotImplementedError

    def logits(self, z: Tensor) -> Tensor:
        """Return the logits of all codes, (B, *, N), for latents z, up to a constant of each position.

        Their argmax is the code that evaluation selects, except for ties. This is plain PyTorch, which can be exported;
        it keeps N logits for each position.
        """
        raise NotImplementedError(f"{type(self).__name__} has no logits(z)")

    def best_codes(self, z: Tensor) -> Tensor:
        """Return the indices, (B, *), that evaluation selects for latents z, in plain PyTorch that can be exported."""
        return self.logits(z).argmax(-1)

    def initialize(self, z: Tensor) -> None:
        """Fit a new quantizer to the first latents of a new encoder; not all quantizers need it."""

    def nearest_codes(self) -> NearestCodes | None:
        """Return the codes, detached, if the best one is the nearest; None if they are selected in another way."""
        return None

    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        """Start from codes (N, D) of a trained decoder, such that latents select the nearest of them.

        Args:
            codes: of a trained model, or N latents.
            z: latents of the encoder, to which the quantizer's scales are fitted.

        Returns:
            The map from the quantizer's codes to those given; None if they are equal.

        Raises:
            ValueError: the quantizer can't start from given codes.
        """
        raise ValueError(f"{type(self).__name__} does not accept given codes")

    def freeze(self) -> None:
        """Keep the codes, and the weights that select them, from now on, even in training."""
        self.requires_grad_(False)

    def hold(self) -> None:
        """Keep the codes during several calls of a training step; :meth:`release` then moves them."""

    def release(self) -> None:
        """Move codes that follow averages by the updates since :meth:`hold`."""

    def set_progress(self, fraction: float) -> None:
        """Update scheduled values; called before each step with the fraction of training done, 0 to 1."""

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}"

    def _padding(self, valid: Tensor | None, z: Tensor) -> Padding:
        """Check ``valid``, (B, *), and return the padding of the rows of z."""
        if valid is not None:
            check_rows("valid", valid, self._positions(z), z)
            valid = valid.reshape(-1)
        return Padding(valid, over_ranks=self.training)  # only in training do all ranks run this together

    def _to_rows(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return latents as rows (M, D) of ``dtype``; no copy if the channels are contiguous in memory."""
        if z.ndim < 2 or z.shape[-1 if self.channels_last else 1] != self.code_dim:
            expected = f"(B, *, {self.code_dim})" if self.channels_last else f"(B, {self.code_dim}, *)"
            raise ValueError(f"the quantizer takes latents {expected}, got {tuple(z.shape)}")
        if z.numel() == 0:
            raise ValueError(f"the quantizer needs at least one position, got latents {tuple(z.shape)}")
        z = z.to(dtype)
        return (z if self.channels_last else z.movedim(1, -1)).reshape(-1, self.code_dim)

    def _finite(self, rows: Tensor) -> Tensor:
        """Return rows; raise as the ops do if they have nan or inf, on a CPU unless compiled."""
        if not torch.compiler.is_compiling():
            check_finite("x", rows)
        return rows

    def _positions(self, z: Tensor) -> torch.Size:
        """Return the sizes (B, *) of latents without their channels."""
        return z.shape[:-1] if self.channels_last else z.shape[:1] + z.shape[2:]

    def _from_rows(self, rows: Tensor, z: Tensor) -> Tensor:
        """Return rows (M, D) in the shape of the latents z, with contiguous channels; or (M,) as (B, *)."""
        values = rows.unflatten(0, self._positions(z))
        return values if rows.ndim == 1 else self._channels(values)

    def _channels(self, values: Tensor) -> Tensor:
        """Move the channels of (B, *, D) to the module's dimension."""
        return values if self.channels_last else values.movedim(-1, 1)

    def _deterministic(
        self,
        z: Tensor,
        quantized: Tensor,
        indices: Tensor,
        loss: Tensor,
        metrics: dict[str, Tensor],
        padding: Padding | None = None,
    ) -> QuantizerOutput:
        """Return the output of a selection without noise, given for rows, in the shape of ``z``."""
        padding = padding or Padding()
        tokens = self._from_rows(padding.clear(indices, -1), z)
        return QuantizerOutput(
            self._from_rows(padding.clear(quantized), z),
            tokens,
            loss,
            metrics,
            torch.zeros_like(tokens, dtype=quantized.dtype),
            torch.zeros_like(tokens, dtype=torch.bool),
        )


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes are rows of ``embedding``.

    On a GPU, products of latents and codes use the type of the latents, 16 bits under autocast, with fp32 sums; with
    ``fp32_scores`` they use fp32. Parameters, losses, averages and statistics are always fp32, and so is everything on
    a CPU.
    """

    def __init__(self, num_codes: int, code_dim: int, **settings: Any) -> None:
        super().__init__(num_codes, code_dim, **settings)
        self.embedding = nn.Embedding(num_codes, code_dim)

    def codes(self) -> Tensor:
        """Return the codes (N, D) that indices stand for."""
        return self.embedding.weight

    def nearest_codes(self) -> NearestCodes | None:
        codes = self.codes().detach()
        return NearestCodes(codes, torch.zeros_like(codes[0]), torch.ones_like(codes[0]))

    @torch.no_grad()
    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        self.embedding.weight.copy_(codes)
        return None

    def codes_of(self, indices: Tensor) -> Tensor:
        codes = self.codes()[indices.clamp(min=0)].masked_fill((indices < 0).unsqueeze(-1), 0)
        return self._channels(codes).to(self.embedding.weight.dtype)

    def logits(self, z: Tensor) -> Tensor:
        weight, bias = self._linear_form()
        return F.linear(self._standardized(self._wide_rows(z)), weight, bias).unflatten(0, self._positions(z))

    def _standardized(self, rows: Tensor) -> Tensor:
        """Return rows (M, D) as the logits take them."""
        return rows

    def _linear_form(self) -> tuple[Tensor, Tensor]:
        """Return weight (N, D) and bias (N,) of the logits, up to a constant of each row; no gradient."""
        codes = wide(self.codes().detach())
        return codes, -0.5 * codes.square().sum(1)

    def _score_dtype(self, z: Tensor) -> torch.dtype:
        """Return the type of the products of rows of z with codes."""
        return score_dtype(z, self.embedding.weight, self.fp32_scores)

    def _wide_rows(self, z: Tensor) -> Tensor:
        """Return latents as rows (M, D) of the type of :func:`wide`."""
        return self._to_rows(z, compute_dtype(self.embedding.weight))


def wide(parameter: Tensor) -> Tensor:
    """Return a parameter in the type that quantizers compute in: float64 if it is that, else float32."""
    return parameter.to(compute_dtype(parameter))


def straight_through(rows: Tensor, codes: Tensor, *, rotation_trick: bool = False) -> Tensor:
    """Return ``codes``, with the identity as gradient to ``rows``, or the transposed map of :func:`rotated`.

    Call it before the losses of the rows: backward then accumulates into the losses' gradients and need not copy that
    of the decoder.
    """
    moved = rotated(rows, codes) if rotation_trick else rows
    return moved + (codes - moved).detach()


def rotated(rows: Tensor, codes: Tensor) -> Tensor:
    """Return rows (M, D), each rotated and scaled to its code by a linear map without a gradient (Fifty et al., 2024).

    The map of their section 4.2 for a row e and its code q is ``|q| / |e| (I - 2 w w^T + 2 q' e'^T)``: e' and q' are e
    and q at length 1, and w is the direction of their sum.
    """
    with torch.no_grad():
        lengths, code_lengths = (vectors.norm(dim=1, keepdim=True) for vectors in (rows, codes))
        scale = code_lengths / lengths.clamp(min=1e-6)
        turned, target = rows / lengths.clamp(min=1e-6), codes / code_lengths.clamp(min=1e-6)
        middle = F.normalize(turned + target, dim=1)
    reflected = rows - 2 * (rows * middle).sum(1, keepdim=True) * middle
    return scale * (reflected + 2 * (rows * turned).sum(1, keepdim=True) * target)


def random_rows(rows: Tensor, count: int) -> Tensor:
    """Return ``count`` random rows of (M, D), repeated if M is less, from PyTorch's global generator of the CPU."""
    order = torch.randperm(len(rows)).repeat(-(-count // len(rows)))[:count]
    return rows[order.to(rows.device)]


def sample_seed(device: torch.device) -> Tensor:
    """Sample a 0-dim int64 seed from PyTorch's global generator of the device."""
    return torch.randint(torch.iinfo(torch.int64).max, (), device=device)
