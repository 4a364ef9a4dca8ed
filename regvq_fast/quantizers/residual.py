"""Residual vector quantization: each quantizer quantizes the residual of those before it (Zeghidour et al., 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regvq_fast.matmul import compute_dtype
from regvq_fast.ops.noise import Stream, philox4x32
from regvq_fast.quantizers.quantizer import CodebookQuantizer, Quantizer, QuantizerOutput, random_rows, sample_seed


class ResidualQuantizer(nn.Module):
    """Q quantizers in sequence: latents become a sum of Q codes, each selected by the residual of the codes before it.

    The first q quantizers alone give a coarser result with fewer bits. With ``dropout`` a training step samples q from
    its seed and uses the first q quantizers, so that the model works with any q. All Q are computed, which avoids a
    synchronization; in the unused ones every position counts as padding.

    Residuals shrink if codes are close to the latents that select them: those of vq-gan, vq-vae, and reg-vq with
    "distance" logits. If codes are directions, or selected by a predicted distribution, residuals may grow.

    Args:
        quantizers: Q quantizers of any kind, with codebooks of any size. A quantizer given several times is a shared
            codebook, ``[EMAQuantizer(1024, 128)] * 8``; a shared EMA codebook moves after its last call.
        dropout: numbers q to sample from in a training step, such as ``range(1, Q + 1)``, ``(2, 4, 8)`` or, with
            weights, ``(2, 8, 8)``. Empty: always Q.
        chain_rule: False: a quantizer treats the codes before it as constants. All losses then reach the latents, and
            with straight-through quantizers the decoder's gradient reaches them Q times (vector-quantize-pytorch).
            True: the codes before it depend on the latents. The decoder's gradient then reaches them once, and of
            straight-through quantizers only the first one's loss does (Descript's codec).

    Raises:
        ValueError: no quantizer; different code_dim or channels_last; a number in ``dropout`` not in 1, ..., Q.
    """

    choices: Tensor

    def __init__(
        self, quantizers: Sequence[Quantizer], *, dropout: Sequence[int] = (), chain_rule: bool = False
    ) -> None:
        super().__init__()
        forms = {(quantizer.code_dim, quantizer.channels_last) for quantizer in quantizers}
        if len(forms) != 1:
            raise ValueError(f"quantizers must be at least one, of one code_dim and channels_last, got {sorted(forms)}")
        self.num_quantizers, self.dropout, self.chain_rule = len(quantizers), tuple(dropout), chain_rule
        if not all(1 <= number <= self.num_quantizers for number in self.dropout):
            raise ValueError(f"dropout must have numbers in 1, ..., {self.num_quantizers}, got {self.dropout}")
        different = list(dict.fromkeys(quantizers))
        self.quantizers = nn.ModuleList(different)
        self.order = [different.index(quantizer) for quantizer in quantizers]
        self.register_buffer("choices", torch.tensor(self.dropout, dtype=torch.int64), persistent=False)

    def forward(
        self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0, valid: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents (B, D, *), with the arguments of :meth:`Quantizer.forward`.

        In a distributed run give all ranks the same seed, so that they use the same q.

        Returns:
            :class:`QuantizerOutput`: ``quantized`` (B, D, *), the sum of the codes in float32 (float64); ``indices``,
            ``perturbation`` and ``mask`` (B, Q, *), with indices -1 for unused quantizers; the sum of the losses; and
            metrics ``NAME/0`` to ``NAME/Q-1`` of the quantizers, and with ``dropout`` ``num_used``.
        """
        stages, shared = self._stages(), [] if len(self.quantizers) == self.num_quantizers else self._different()
        seeds: list[Tensor | None] = [None] * len(stages)
        used = None
        if self.training:
            seeds, used = self._sample(sample_seed(z.device) if seed is None else seed)
            for quantizer in shared:
                quantizer.hold()
        outputs: list[QuantizerOutput] = []
        residual = z.to(compute_dtype(z))
        total = torch.zeros_like(residual)
        for number, quantizer in enumerate(stages):
            if used is not None and number >= min(self.dropout):
                valid = (outputs[0].indices >= 0) & (number < used)
            out = quantizer(residual.to(z.dtype), seeds[number], row_offset, valid)
            residual = residual - (out.quantized if self.chain_rule else out.quantized.detach())
            total = total + out.quantized
            outputs.append(out)
        if self.training:
            for quantizer in shared:
                quantizer.release()
        metrics = {
            f"{name}/{number}": value for number, out in enumerate(outputs) for name, value in out.metrics.items()
        }
        if used is not None:
            metrics["num_used"] = used.float()
        return QuantizerOutput(
            total,
            torch.stack([out.indices for out in outputs], 1),
            torch.stack([out.loss for out in outputs]).sum(),
            metrics,
            torch.stack([out.perturbation for out in outputs], 1),
            torch.stack([out.mask for out in outputs], 1),
        )

    def _different(self) -> list[Quantizer]:
        """Return the quantizers without repetition."""
        return list(self.quantizers)  # type: ignore[arg-type]

    def _stages(self) -> list[Quantizer]:
        """Return the Q quantizers in their order."""
        return [self._different()[number] for number in self.order]

    def _sample(self, seed: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
        """Return a seed for each quantizer, with the last byte of the step's seed, and the number used; None: all."""
        numbers = torch.arange(self.num_quantizers + 1, device=seed.device)
        zero = torch.zeros_like(numbers)
        high, low, *_ = philox4x32(zero, zero, numbers, zero + Stream.RESIDUAL_QUANTIZERS, seed)
        seeds = (high >> 9 << 40) | (low << 8) | (seed & 0xFF)  # of 63 bits
        used = self.choices[high[-1:] * len(self.dropout) >> 32].squeeze(0) if self.dropout else None
        return list(seeds[:-1]), used

    def codes_of(self, indices: Tensor) -> Tensor:
        """Return the sum of the codes of tokens (B, q, *) of the first q quantizers; -1 adds nothing."""
        if not 1 <= indices.shape[1] <= self.num_quantizers:
            raise ValueError(f"indices must be (B, 1 to {self.num_quantizers}, *), got {tuple(indices.shape)}")
        tokens = indices.unbind(1)
        codes = [quantizer.codes_of(some) for quantizer, some in zip(self._stages(), tokens, strict=False)]
        return torch.stack(codes).sum(0)

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Fit new quantizers to the first latents of a new encoder, each to the residual of those before it.

        Codebooks start from randomly chosen residuals (PyTorch's global generator of the CPU), a shared one from those
        of its first use.
        """
        new = set(self._different())
        for quantizer in self._stages():
            if quantizer in new and isinstance(quantizer, CodebookQuantizer):
                quantizer.adopt(random_rows(quantizer._to_rows(z), quantizer.num_codes), z)
            elif quantizer in new:
                quantizer.initialize(z)
            new.discard(quantizer)
            trains = quantizer.training
            z = z - quantizer.eval()(z).quantized
            quantizer.train(trains)

    def freeze(self) -> None:
        """Keep the codes of all quantizers as they are from now on."""
        for quantizer in self._different():
            quantizer.freeze()

    def set_progress(self, fraction: float) -> None:
        """Update the schedules of all quantizers for the fraction of training done, 0 to 1."""
        for quantizer in self._different():
            quantizer.set_progress(fraction)

    def extra_repr(self) -> str:
        return f"order={self.order}, dropout={self.dropout}, chain_rule={self.chain_rule}"
