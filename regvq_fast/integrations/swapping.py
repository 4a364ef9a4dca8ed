"""Replacement of a model's quantizers, and warnings about those that stay."""

from typing import NamedTuple

from torch import nn

from regvq_fast.integrations import diffusers, ibq, taming, vector_quantize_pytorch
from regvq_fast.integrations.adapter import Adapter

# By "module.Class". Copies of these files in other packages may compute something else under the same names.
ADAPTERS: dict[str, type[Adapter]] = {
    "taming.modules.vqvae.quantize.VectorQuantizer": taming.VectorQuantizer,
    "taming.modules.vqvae.quantize.VectorQuantizer2": taming.VectorQuantizer2,
    "taming.modules.vqvae.quantize.GumbelQuantize": taming.GumbelQuantize,
    "diffusers.models.autoencoders.vae.VectorQuantizer": diffusers.VectorQuantizer,
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": vector_quantize_pytorch.VectorQuantize,
    "src.IBQ.modules.vqvae.quantize.IndexPropagationQuantize": ibq.IndexPropagationQuantize,
}


class Acceleration(NamedTuple):
    """Result of :func:`accelerate`, by the names that ``model.named_modules()`` gives ("" is the model itself)."""

    swapped: dict[str, str]
    """Class, by module."""
    left_alone: dict[str, str]
    """Class and the reason, by module."""


def accelerate(model: nn.Module, *, fp32_scores: bool = False) -> Acceleration:
    """Swap the look-up of the quantizers that are known, in place: no M x N matrix of distances or one-hot rows.

    Known are taming-transformers' ``VectorQuantizer2``, ``VectorQuantizer`` and ``GumbelQuantize``, diffusers'
    ``VectorQuantizer`` (that of its ``VQModel``), vector-quantize-pytorch's ``VectorQuantize`` (also those inside its
    residual quantizers) and SEED-Voken's ``IndexPropagationQuantize`` (IBQ). They keep their class names, parameters,
    ``state_dict``, options and outputs; gradients are those of the library. A module with an option that isn't covered
    is left as it is. Calling it again changes nothing. Call it before ``torch.compile``, which wouldn't look again.

    Args:
        model: a model with such quantizers in it, or a quantizer.
        fp32_scores: multiply rows and codes in fp32 under autocast on a GPU, too; by default that is done in autocast's
            16 bits, summed in fp32, as the libraries' own products are (vector-quantize-pytorch's are in fp32 always).

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        TypeError: ``model`` isn't a module.
        ValueError: nothing in it could be swapped; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen: list[tuple[nn.Module, type[Adapter]]] = []
    swapped: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        class_name, adapter = type(module).__name__, _adapter_of(type(module))
        if adapter is None:
            if known := next((base for base in type(module).__mro__ if _adapter_of(base)), None):
                left_alone[name] = f"{class_name}: a subclass of {known.__name__}, which may compute something else"
        elif isinstance(module, Adapter):
            swapped[name] = class_name
        elif reason := adapter.why_not(module):
            left_alone[name] = f"{class_name}: {reason}"
        else:
            swapped[name] = class_name
            chosen.append((module, adapter))
    if not swapped:
        reasons = "; ".join(f"{name or '(the model)'} is a {reason}" for name, reason in left_alone.items())
        raise ValueError(
            f"no look-up to swap in this {type(model).__name__}: {reasons or 'no module of it is a known quantizer'} "
            f"(known: {', '.join(ADAPTERS)})"
        )
    for module, adapter in chosen:
        adapter.swap(module)
        if fp32_scores:
            module.fp32_scores = True  # type: ignore[assignment]
    return Acceleration(swapped, left_alone)


def _adapter_of(module_class: type) -> type[Adapter] | None:
    return ADAPTERS.get(f"{module_class.__module__}.{module_class.__qualname__}")
