"""Quantizers of this package with the interfaces of other libraries' quantizers, to replace them in a model."""

import itertools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regvq_fast.integrations.adapter import Adapter
from regvq_fast.ops.segment_sum import segment_counts
from regvq_fast.quantizers import Quantizer, QuantizerOutput
from regvq_fast.ranks import gather_rows, rank, world_size

AnyQuantizer = TypeVar("AnyQuantizer", bound=Quantizer)


def as_taming(quantizer: AnyQuantizer) -> AnyQuantizer:
    """Give a quantizer the interface of taming-transformers' ``VectorQuantizer2``: ``model.quantize = as_taming(...)``.

    ``quantizer(z)`` of maps (B, D, H, W) returns ``(quantized, loss, (perplexity, None, indices))``, with indices
    (B * H * W,) and the perplexity of the batch's codes. The loss has all terms of the quantizer, such as Reg-VQ's KL.
    The quantizer also has ``get_codebook_entry(indices, shape)``, ``embed_code(indices)``, ``n_e``, ``e_dim`` and
    ``codebook``. ``embedding.weight`` of Reg-VQ has the directions of the codes; it is not the codebook.

    A new quantizer that needs it, such as Reg-VQ, is initialized by the first batch in training, with several ranks by
    that of rank 0: codes, scale and statistics of the latents. The buffer ``initialized`` in ``state_dict`` records
    this. A quantizer that was initialized, trained or loaded stays the same.

    Args:
        quantizer: a quantizer of this package, changed in place: the same object, parameters and ``state_dict`` names.

    Returns:
        The quantizer.

    Raises:
        TypeError: not a quantizer of this package.
        ValueError: it already has such an interface.
    """
    return _with_form(TamingForm, quantizer)


def as_diffusers(quantizer: AnyQuantizer) -> AnyQuantizer:
    """Give a quantizer the interface of the ``VectorQuantizer`` in diffusers' ``VQModel``, as :func:`as_taming`.

    The model's ``save_pretrained`` saves it, but ``from_pretrained`` builds diffusers' own quantizer: instead build the
    model, set the quantizer, and load the ``state_dict``.
    """
    return _with_form(TamingForm, quantizer)


def as_lucidrains(
    quantizer: AnyQuantizer, *, channel_last: bool = True, accept_image_fmap: bool = False
) -> AnyQuantizer:
    """Give a quantizer the interface of vector-quantize-pytorch's ``VectorQuantize``; otherwise as :func:`as_taming`.

    ``quantizer(x)`` returns ``(quantized, indices, loss)``; in evaluation the loss is 0, as in the library. It has
    ``codebook`` (N, D), ``codebook_size``, ``get_codes_from_indices`` and ``get_output_from_indices``.

    Args:
        quantizer: a quantizer of this package, changed in place.
        channel_last: x is (B, L, D) or (B, D), and indices (B, L) or (B,); otherwise (B, D, L) and (B, L). A stochastic
            mask selects its fraction of the L positions of each sequence, or of all B.
        accept_image_fmap: x is (B, D, H, W), and indices (B, H, W).
    """
    _with_form(LucidrainsForm, quantizer)
    quantizer.channel_last = channel_last and not accept_image_fmap  # type: ignore[assignment]
    return quantizer


def _with_form(form: type["Form"], quantizer: AnyQuantizer) -> AnyQuantizer:
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"quantizer must be one of regvq_fast.quantizers, got {type(quantizer).__name__}")
    if isinstance(quantizer, Form):
        raise ValueError(f"this {type(quantizer).__name__} already has another library's interface: make a new one")
    needs_start = type(quantizer).initialize is not Quantizer.initialize
    is_new = needs_start and _is_as_built(quantizer)
    form.swap(quantizer)
    quantizer.is_new = is_new  # type: ignore[assignment]
    if needs_start:
        quantizer.register_buffer("initialized", torch.tensor(not is_new, device=_first_tensor(quantizer).device))
    return quantizer


def _first_tensor(quantizer: nn.Module) -> Tensor:
    return next(itertools.chain(quantizer.parameters(), quantizer.buffers()), torch.empty(0))


def _is_as_built(quantizer: Quantizer) -> bool:
    """Return whether all buffers have their first values, which initializing, training and loading change."""
    with torch.random.fork_rng(devices=[]):
        fresh = dict(type(quantizer)(**quantizer.arguments()).named_buffers())
    return all(torch.equal(buffer.cpu(), fresh[name].to(buffer.dtype)) for name, buffer in quantizer.named_buffers())


class Form(Adapter):
    """Initialization by the first batch, and methods of all interfaces."""

    num_codes: int
    code_dim: int
    is_new: bool
    """True until it is initialized or loaded: not ``initialized``, without a synchronization."""

    def _select(self, z: Tensor) -> QuantizerOutput:
        if self.training and self.is_new:
            self.initialize(z)
        positions = z.shape[0] * z.shape[2:].numel()
        return super().forward(z, row_offset=rank() * positions)  # other noise on each rank, even with equal seeds

    @torch.compiler.disable
    def initialize(self, z: Tensor) -> None:
        """Fit the quantizer to latents (B, D, H, W) of rank 0; called by the first batch in training."""
        with torch.autocast(z.device.type, enabled=False):
            super().initialize(z)  # type: ignore[misc]
        if "initialized" in self._buffers:
            self.get_buffer("initialized").fill_(True)
        self.is_new = False
        if world_size() > 1:
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    tensor.copy_(gather_rows(tensor[None])[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        has_flag = "initialized" in self._buffers
        if has_flag and any(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters()):
            state_dict.setdefault(f"{prefix}initialized", torch.tensor(True))  # saved without this interface
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_new = has_flag and not bool(self.get_buffer("initialized"))

    def _codes_of(self, indices: Tensor) -> Tensor:
        """Return the codes (..., D) of indices (...) in the module's type."""
        codes = self.codes_of(indices.reshape(1, 1, -1))  # type: ignore[operator]
        return codes[0, :, 0].t().reshape(*indices.shape, self.code_dim)

    @property
    def codebook(self) -> Tensor:
        """Codes (N, D) in the order of their indices."""
        return self._codes_of(torch.arange(self.num_codes, device=_first_tensor(self).device))

    @property
    def codebook_size(self) -> int:
        """N."""
        return self.num_codes


class TamingForm(Form):
    """Interface of ``VectorQuantizer2``: taming's and diffusers'."""

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """z (B, D, H, W) -> codes, loss, (perplexity, None, indices (B * H * W,))."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                f"temp={temp}, rescale_logits={rescale_logits}, return_logits={return_logits} are GumbelQuantize's: "
                "leave them out"
            )
        out = self._select(z)
        indices = out.indices.flatten()
        fractions = segment_counts(indices, self.num_codes).to(out.loss.dtype) / len(indices)
        perplexity = (-(fractions * (fractions + 1e-10).log()).sum()).exp()
        dtype = torch.promote_types(z.dtype, _first_tensor(self).dtype)  # as of the library's z + (codes - z)
        return out.quantized.to(dtype), out.loss, (perplexity, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Indices (...) -> codes (..., D); of a shape (B, H, W, D), maps (B, D, H, W)."""
        codes = self._codes_of(indices)
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()

    def embed_code(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W) -> codes (B, D, H, W)."""
        return self.codes_of(indices)  # type: ignore[operator]

    @property
    def n_e(self) -> int:
        """N."""
        return self.num_codes

    @property
    def e_dim(self) -> int:
        """D."""
        return self.code_dim


class LucidrainsForm(Form):
    """Interface of ``VectorQuantize``."""

    channel_last: bool

    def forward(
        self, x: Tensor, indices: None = None, mask: None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x -> codes, indices, loss; the library's other arguments must be None or False, or left out."""
        options = {"indices": indices, "mask": mask, **options}
        if given := [name for name, value in options.items() if value is not None and value is not False]:
            raise ValueError(f"{type(self).__name__} does not take {', '.join(given)}: leave it out")
        is_last = self.channel_last or x.ndim == 2
        axis = -1 if is_last else 1
        if x.ndim < 2 or x.shape[axis] != self.code_dim:
            wanted = f"(..., {self.code_dim})" if is_last else f"(B, {self.code_dim}, ...)"
            raise ValueError(f"with channel_last={self.channel_last} x must be {wanted}, got {tuple(x.shape)}")
        rows = x.movedim(axis, -1)
        maps = rows.reshape(len(x) if x.ndim > 2 else 1, 1, -1, self.code_dim).permute(0, 3, 1, 2)
        out = self._select(maps)
        quantized = out.quantized.permute(0, 2, 3, 1).reshape(rows.shape).to(x.dtype).movedim(-1, axis)
        loss = out.loss if self.training else torch.zeros_like(out.loss)
        return quantized, out.indices.reshape(rows.shape[:-1]), loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices as `forward` returns them -> codes of the shape of its x."""
        codes = self._codes_of(indices)
        return codes if self.channel_last or indices.ndim == 1 else codes.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices -> codes, as :meth:`get_codes_from_indices`: there is no projection."""
        return self.get_codes_from_indices(indices)
