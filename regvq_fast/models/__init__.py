"""Networks: the VQGAN autoencoder and its discriminator, the priors over its tokens, text encoders, VGG features."""

from regvq_fast.models.discriminator import PatchDiscriminator
from regvq_fast.models.features import VGGFeatures, load_vgg_features
from regvq_fast.models.text import PretrainedTextEncoder, TextEncoder, WordEncoder
from regvq_fast.models.token_transformer import TokenTransformer
from regvq_fast.models.vq_diffusion import VQDiffusion
from regvq_fast.models.vqgan import VQGAN, VQGANOutput
from regvq_fast.models.weights import weights_hash

__all__ = [
    "VQGAN",
    "PatchDiscriminator",
    "PretrainedTextEncoder",
    "TextEncoder",
    "TokenTransformer",
    "VGGFeatures",
    "VQDiffusion",
    "VQGANOutput",
    "WordEncoder",
    "load_vgg_features",
    "weights_hash",
]
