"""Networks of tokenizers: the VQGAN autoencoder, its discriminator, VGG features."""

from importlib import import_module
from typing import Any

from regvq_fast.invocation import install

try:
    from regvq_fast.models.discriminator import PatchDiscriminator
    from regvq_fast.models.features import VGGFeatures, load_vgg_features
    from regvq_fast.models.vqgan import VQGAN, VQGANOutput
    from regvq_fast.models.weights import weights_hash
except ModuleNotFoundError as error:
    if error.name in ("safetensors", "rich"):
        error.msg = f"regvq_fast.models needs {error.name}: {install('train')}"
    raise

__all__ = [
    "VQGAN",
    "PatchDiscriminator",
    "VGGFeatures",
    "VQGANOutput",
    "load_vgg_features",
    "weights_hash",
]

# To regvq_fast.priors, which imports this package.
_MOVED = {"TokenTransformer": "autoregressive", "VQDiffusion": "diffusion"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"regvq_fast.priors.{_MOVED[name]}"), name)
