"""Replacement of the quantizers in a model of another library."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from regvq_fast.integrations import codecs, ibq, image_tokenizers, taming, vector_quantize_pytorch
from regvq_fast.integrations.adapter import Adapter

INTERFACES: dict[str, tuple[type[Adapter], ...]] = {
    "nearest": (taming.VectorQuantizer2, taming.DiffusersVectorQuantizer),
    "one-hot": (taming.VectorQuantizer,),
    "gumbel": (taming.GumbelQuantize,),
    "ibq": (ibq.IndexPropagationQuantize,),
    "llamagen": (image_tokenizers.LlamaGenQuantizer,),
    "titok": (image_tokenizers.TiTokQuantizer,),
    "lucidrains": (vector_quantize_pytorch.VectorQuantize,),
    "encodec": (codecs.EnCodecCodebook, codecs.TransformersCodebook),
    "dac": (codecs.DacQuantize, codecs.TransformersDacQuantize),
}
"""Adapters by the name of an interface; the first one that fits a module is used."""

KNOWN: dict[str, str] = {
    "taming.modules.vqvae.quantize.VectorQuantizer": "one-hot",
    "taming.modules.vqvae.quantize.VectorQuantizer2": "nearest",
    "taming.modules.vqvae.quantize.GumbelQuantize": "gumbel",
    "diffusers.models.autoencoders.vae.VectorQuantizer": "nearest",
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": "lucidrains",
    "src.IBQ.modules.vqvae.quantize.IndexPropagationQuantize": "ibq",
    "tokenizer.tokenizer_image.vq_model.VectorQuantizer": "llamagen",
    "modeling.quantizer.quantizer.VectorQuantizer": "titok",
    "encodec.quantization.core_vq.EuclideanCodebook": "encodec",
    "transformers.models.encodec.modeling_encodec.EncodecEuclideanCodebook": "encodec",
    "dac.nn.quantize.VectorQuantize": "dac",
    "transformers.models.dac.modeling_dac.DacVectorQuantize": "dac",
}
"""Interface by "module.Class". Copies elsewhere may compute something else under the same class names."""

_ADAPTERS = tuple(adapter for fitting in INTERFACES.values() for adapter in fitting)


class Acceleration(NamedTuple):
    """Result of :func:`swap_quantizers`, by name in ``model.named_modules()`` ("" is the model itself)."""

    swapped: dict[str, str]
    """Class by module."""
    left_alone: dict[str, str]
    """Class and reason by module."""


def swap_quantizers(
    model: nn.Module, *, also: Mapping[str, str] | None = None, fp32_scores: bool = False
) -> Acceleration:
    """Swap the look-up of known quantizers in place, so that no M x N matrix of distances or one-hot rows is made.

    Known are the quantizers of taming-transformers, diffusers, vector-quantize-pytorch (also inside its residual
    quantizers), SEED-Voken's IBQ, LlamaGen, TiTok (1d-tokenizer), and EnCodec and DAC, also those of transformers. They
    keep their class names, parameters, ``state_dict``, options, outputs and gradients. A module with an option that
    isn't covered is left alone. A second call changes nothing. Call it before ``torch.compile``, which would not notice
    the change. ``accelerate`` is the same function.

    Args:
        model: a model with such quantizers, or a quantizer.
        also: classes of forks, by "module.Class", with their interface: a key of ``INTERFACES``, such as "nearest" for
            a copy of taming's ``VectorQuantizer2``. You must know that they compute the same.
        fp32_scores: multiply rows and codes in fp32 even under autocast on a GPU. By default they are multiplied in the
            16 bits of autocast, with fp32 sums, as by the libraries (vector-quantize-pytorch always uses fp32).

    Returns:
        The modules swapped, and those left alone with the reasons.

    Raises:
        TypeError: ``model`` isn't a module.
        ValueError: nothing could be swapped; or ``also`` has an unknown interface, a class without a module in the
            model, or a class without that interface. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    also = {} if also is None else dict(also)
    _check_also(model, also)
    interfaces = KNOWN | also
    chosen: list[tuple[nn.Module, type[Adapter]]] = []
    swapped: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        class_name, interface = type(module).__name__, interfaces.get(_path(type(module)))
        if isinstance(module, _ADAPTERS):
            swapped[name] = class_name
        elif interface is None:
            if known := next((base for base in type(module).__mro__ if _path(base) in KNOWN), None):
                left_alone[name] = f"{class_name}: a subclass of {known.__name__}, which may compute something else"
        else:
            adapter, reason = _fitting(interface, module)
            if reason := reason or adapter.uncovered(module):
                left_alone[name] = f"{class_name}: {reason}"
            else:
                swapped[name] = class_name
                chosen.append((module, adapter))
    if not swapped:
        reasons = "; ".join(f"{name or '(the model)'} is a {reason}" for name, reason in left_alone.items())
        raise ValueError(
            f"no look-up to swap in this {type(model).__name__}: {reasons or 'no module of it is a known quantizer'} "
            f"(known: {', '.join(KNOWN)}; name the class of a fork with also=)"
        )
    for module, adapter in chosen:
        adapter.swap(module)
        if fp32_scores:
            module.fp32_scores = True  # type: ignore[assignment]
    return Acceleration(swapped, left_alone)


accelerate = swap_quantizers


def _path(module_class: type) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"


def _fitting(interface: str, module: nn.Module) -> tuple[type[Adapter], str | None]:
    """Return the adapter of an interface that fits a module; if none does, the first one and the reason."""
    reasons = {adapter: adapter.unlike(module) for adapter in INTERFACES[interface]}
    return next(((adapter, None) for adapter, reason in reasons.items() if reason is None), next(iter(reasons.items())))


def _check_also(model: nn.Module, also: Mapping[str, str]) -> None:
    modules = {_path(type(module)): module for module in model.modules()}
    for path, interface in also.items():
        if interface not in INTERFACES:
            raise ValueError(f"also[{path!r}] is {interface!r}: it must be one of {', '.join(map(repr, INTERFACES))}")
        if path not in modules:
            last = path.rsplit(".", 1)[-1]
            alike = [found for found in modules if found.endswith(f".{last}")]
            advice = f"did you mean {', '.join(alike)}?" if alike else "print type(module).__module__ of its quantizer"
            raise ValueError(f"also names {path}, of which this {type(model).__name__} has no module: {advice}")
        if not isinstance(modules[path], _ADAPTERS) and (reason := _fitting(interface, modules[path])[1]):
            raise ValueError(f"also names {path} as {interface!r}, but {reason}")
