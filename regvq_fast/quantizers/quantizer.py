"""The interface of quantizers, and what those with a codebook of embeddings share."""

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
    """(B, D, *), with ``channels_last`` (B, *, D), with the quantizer's gradient to its input: float32 (float64 from a
    float64 module); of reg-vq and gumbel-vq on a GPU in the type of the scores' products. 0 where latents are
    padding."""
    indices: Tensor
    """(B, *) int64, the selected codes; -1 where latents are padding."""
    loss: Tensor
    """0-dim float32 or float64: weighted sum of the quantizer's own losses."""
    metrics: dict[str, Tensor]
    """0-dim, detached, for logging."""
    perturbation: Tensor
    """(B, *), of that type: |z[index] - z[best_index]|^2; 0 where the selection is deterministic."""
    mask: Tensor
    """(B, *) bool, the stochastic positions."""


class NearestCodes(NamedTuple):
    """Codes of which the best one for a latent z is the nearest to ``(z - shift) * gain``."""

    codes: Tensor
    """(N, D), as the decoder gets them."""
    shift: Tensor
    """(D,)."""
    gain: Tensor
    """(D,)."""


class CodeMap(NamedTuple):
    """A map of a quantizer's codes to those that a decoder knows: ``scale * code + shift``."""

    scale: Tensor
    """(D,)."""
    shift: Tensor
    """(D,)."""


@dataclass(frozen=True)
class QuantizerSettings(Section):
    """Settings of a quantizer beside its codebook's size; subclasses add fields, which are flags."""

    def check_mask(self, positions: int) -> None:
        """Raise ValueError unless a stochastic mask, of fewer positions than all, selects some of an image's."""
        raise ValueError("there are none: choose another")

    def sizes(self, num_codes: int, code_dim: int) -> tuple[int, int]:
        """Return N and D of the quantizer for those that a run asks for, which some quantizers' codes decide.

        Raises:
            ValueError: there are no such codes.
        """
        return num_codes, code_dim


class QuantizerSection(Protocol):
    """The settings of a run that all quantizers share; its other fields are those of `QuantizerSettings`."""

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
        channels_last: latents are (B, *, D), and so are their codes; else (B, D, *).
        settings: fields of `Settings`, kept as `settings`.

    Raises:
        ValueError: a size or a setting that is out of range.
    """

    Settings: ClassVar[type[QuantizerSettings]] = QuantizerSettings
    """Settings of a run, besides the size of the codebook."""
    scheduled: ClassVar[tuple[str, ...]] = ()
    """Names of what :meth:`set_progress` changes, for messages."""
    fp32_scores = False
    """Multiply latents and codes in fp32 on a GPU under autocast, too."""

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
        """Return this quantizer's settings among the fields of a run's section."""
        return cls.Settings(**{item.name: getattr(section, item.name) for item in fields(cls.Settings)})

    @classmethod
    def from_section(cls, section: QuantizerSection) -> Self:
        """Build the quantizer that a run's section describes."""
        settings = cls.settings_of(section)
        quantizer = cls(*settings.sizes(section.num_codes, section.code_dim), **asdict(settings))
        quantizer.fp32_scores = section.fp32_scores
        return quantizer

    def arguments(self) -> dict[str, Any]:
        """Arguments of the constructor, as plain values."""
        named = {name: getattr(self, name) for name in ("num_codes", "code_dim", "channels_last")}
        return named | asdict(self.settings)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        """Select a code for each position of z, (B, D, *) or with ``channels_last`` (B, *, D).

        In evaluation that is the best code everywhere. In training, quantizers that sample take the ``seed`` (0-dim
        int64), or one of PyTorch's global generator where none is given; ``row_offset`` is the number of z's first
        position among those of all ranks and micro-batches. In a distributed run give all ranks the same seed.

        Args:
            valid: (B, *) bool, False for padding, which may hold anything; None: there is none. Padding counts in no
                loss, statistic or average and gets no gradient; row numbers count it. Ranks may have different numbers
                of valid positions, of as many in all: the mean over the ranks of a loss is then that of the whole
                batch. Give ``valid`` on all ranks or on none.

        Raises:
            ValueError: latents of another shape, or none; on a CPU nan or inf in them; ``valid`` of another shape.
            TypeError: ``valid`` is not bool.
        """
        raise NotImplementedError

    def codes_of(self, indices: Tensor) -> Tensor:
        """Return the codes of tokens in the module's type: (B, *) int64 -> (B, D, *), or (B, *, D); 0 for -1."""
        raise NotImplementedError

    def logits(self, z: Tensor) -> Tensor:
        """Return the logits of all codes, (B, *, N), of latents z, up to a constant of each position.

        Their argmax is the code that evaluation selects, ties aside. Plain PyTorch, which can be exported, with the N
        logits of all positions in memory.
        """
        raise NotImplementedError(f"{type(self).__name__} has no logits(z)")

    def best_codes(self, z: Tensor) -> Tensor:
        """Return the indices, (B, *), that evaluation selects for latents z, in plain PyTorch that can be exported."""
        return self.logits(z).argmax(-1)

    def initialize(self, z: Tensor) -> None:
        """Fit a new quantizer to the first latents of a new encoder; some need no such start."""

    def nearest_codes(self) -> NearestCodes | None:
        """Return the codes, detached, if the best one is the nearest; None if latents select them in another way."""
        return None

    def adopt(self, codes: Tensor, z: Tensor) -> CodeMap | None:
        """Start from codes (N, D) that a decoder knows, each the best one of the latents that it is nearest to.

        Args:
            codes: of a trained model, or as many latents.
            z: latents of the encoder, to which the quantizer's scales are fitted.

        Returns:
            The map of the quantizer's codes to those given; None where they are these.

        Raises:
            ValueError: the quantizer has no use for codes.
        """
        raise ValueError(f"{type(self).__name__} does not accept given codes")

    def freeze(self) -> None:
        """Keep the codes, and the weights that select them, as they are from now on, in training, too."""
        self.requires_grad_(False)

    def hold(self) -> None:
        """Keep the codes as they are during several calls of a training step; :meth:`release` then moves them."""

    def release(self) -> None:
        """Move codes that follow averages to where the calls since :meth:`hold` have taken them."""

    def set_progress(self, fraction: float) -> None:
        """Follow a schedule: called before each step with the fraction of training done, 0 to 1."""

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}"

    def _padding(self, valid: Tensor | None, z: Tensor) -> Padding:
        """Check ``valid``, (B, *), and return the padding of the rows of z."""
        if valid is None:
            return Padding()
        check_rows("valid", valid, self._positions(z), z)
        return Padding(valid.reshape(-1), over_ranks=self.training)  # ranks run this together in training only

    def _to_rows(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return latents as rows (M, D) of this type; no copy where the channels lie together in memory."""
        if z.ndim < 2 or z.shape[-1 if self.channels_last else 1] != self.code_dim:
            expected = f"(B, *, {self.code_dim})" if self.channels_last else f"(B, {self.code_dim}, *)"
            raise ValueError(f"the quantizer takes latents {expected}, got {tuple(z.shape)}")
        if z.numel() == 0:
            raise ValueError(f"the quantizer needs at least one position, got latents {tuple(z.shape)}")
        z = z.to(dtype)
        return (z if self.channels_last else z.movedim(1, -1)).reshape(-1, self.code_dim)

    def _finite(self, rows: Tensor) -> Tensor:
        """Return rows; of a CPU, where nothing is compiled, raise as the ops do if nan or inf is among them."""
        if not torch.compiler.is_compiling():
            check_finite("x", rows)
        return rows

    def _positions(self, z: Tensor) -> torch.Size:
        """Return the sizes (B, *) of latents without their channels."""
        return z.shape[:-1] if self.channels_last else z.shape[:1] + z.shape[2:]

    def _from_rows(self, rows: Tensor, z: Tensor) -> Tensor:
        """Return rows (M, D) in the shape of the latents z, channels together in memory; or (M,) as (B, *)."""
        values = rows.unflatten(0, self._positions(z))
        return values if rows.ndim == 1 else self._channels(values)

    def _channels(self, values: Tensor) -> Tensor:
        """Move the channels of (B, *, D) to where the module has them."""
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
        """Output of a selection without noise, of rows, in the shape of ``z``."""
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

    On a GPU rows and codes are multiplied in the type of the latents, 16 bits under autocast, and summed in fp32. Set
    ``fp32_scores`` to multiply them in fp32. Parameters, losses, averages and statistics are in fp32 in any case, and
    so is everything on a CPU.
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
        """Return rows (M, D) in the form that the logits take."""
        return rows

    def _linear_form(self) -> tuple[Tensor, Tensor]:
        """Weight (N, D) and bias (N,) of the logits as a linear map, up to a constant of each row; no gradient."""
        codes = wide(self.codes().detach())
        return codes, -0.5 * codes.square().sum(1)

    def _score_dtype(self, z: Tensor) -> torch.dtype:
        """Return the type in which rows of z are multiplied with codes."""
        return score_dtype(z, self.embedding.weight, self.fp32_scores)

    def _wide_rows(self, z: Tensor) -> Tensor:
        """Return latents as rows (M, D) of the type of :func:`wide`."""
        return self._to_rows(z, compute_dtype(self.embedding.weight))


def wide(parameter: Tensor) -> Tensor:
    """Return a parameter in the type that quantizers compute in: float32, or float64 if that is its own."""
    return parameter.to(compute_dtype(parameter))


def straight_through(rows: Tensor, codes: Tensor, *, rotation_trick: bool = False) -> Tensor:
    """``codes`` forward; backward the identity to ``rows``, or the transposed map of :func:`rotated`.

    Called before the losses of the rows it saves a copy of them: backward comes to it last, and adds its gradient to
    the losses' instead of adding theirs to its own, which belongs to the decoder.
    """
    moved = rotated(rows, codes) if rotation_trick else rows
    return moved + (codes - moved).detach()


def rotated(rows: Tensor, codes: Tensor) -> Tensor:
    """Rows (M, D), each turned and scaled to its code by a linear map that gets no gradient (Fifty et al., 2024).

    The map of section 4.2 there, ``|q| / |e| (I - 2 w w^T + 2 q' e'^T)`` of a row e and its code q: e' and q' have
    length 1, and w is the direction of their sum.
    """
    with torch.no_grad():
        lengths, code_lengths = (vectors.norm(dim=1, keepdim=True) for vectors in (rows, codes))
        scale = code_lengths / lengths.clamp(min=1e-6)
        turned, target = rows / lengths.clamp(min=1e-6), codes / code_lengths.clamp(min=1e-6)
        middle = F.normalize(turned + target, dim=1)
    reflected = rows - 2 * (rows * middle).sum(1, keepdim=True) * middle
    return scale * (reflected + 2 * (rows * turned).sum(1, keepdim=True) * target)


def random_rows(rows: Tensor, count: int) -> Tensor:
    """Return ``count`` random rows of (M, D), repeated if M is less; by PyTorch's global generator of the CPU."""
    order = torch.randperm(len(rows)).repeat(-(-count // len(rows)))[:count]
    return rows[order.to(rows.device)]


def sample_seed(device: torch.device) -> Tensor:
    """Sample a 0-dim int64 seed from PyTorch's global generator of the device."""
    return torch.randint(torch.iinfo(torch.int64).max, (), device=device)
