"""From a configuration to its parts."""

import warnings
from pathlib import Path

from torch import nn

from regvq_fast.config import LossConfig, QuantizerConfig, VQGANConfig
from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.losses.reconstruction import ReconstructionLoss
from regvq_fast.models.discriminator import PatchDiscriminator
from regvq_fast.models.features import VGGFeatures, VGGName, load_vgg_features
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.quantizers import EMAQuantizer, GumbelQuantizer, NearestQuantizer, Quantizer, RegularizedQuantizer


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of that name; the reg-vq settings concern reg-vq alone."""
    if config.quantizer == "vq-gan":
        return NearestQuantizer(config.num_codes, config.code_dim)
    if config.quantizer == "vq-vae":
        return EMAQuantizer(config.num_codes, config.code_dim)
    if config.quantizer == "gumbel-vq":
        return GumbelQuantizer(config.num_codes, config.code_dim)
    return RegularizedQuantizer(
        config.num_codes,
        config.code_dim,
        logits=config.logits,
        perturbed=config.perturbed,
        mask_ratio=config.mask_ratio,
        mask_mode=config.mask_mode,
        tau=config.tau,
        prior_weight=config.prior_weight,
        prior_scope=config.prior_scope,
        codebook_grad=config.codebook_grad,
    )


def build_model(config: VQGANConfig) -> VQGAN:
    """The autoencoder with its quantizer."""
    model = config.model
    return VQGAN(
        build_quantizer(config.quantizer),
        image_size=config.data.image_size,
        ch=model.ch,
        ch_mult=model.ch_mult,
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=model.attn_resolutions,
        z_channels=model.z_channels,
        dropout=model.dropout,
    )


def build_discriminator(config: VQGANConfig) -> PatchDiscriminator:
    """The patch discriminator."""
    model = config.model
    return PatchDiscriminator(filters=model.disc_filters, num_layers=model.disc_layers, norm=model.disc_norm)


def build_reconstruction_loss(config: LossConfig) -> tuple[ReconstructionLoss, dict[str, str]]:
    """The losses that need no discriminator, and what to tell about the feature networks behind them."""
    facts: dict[str, str] = {}
    features: nn.Module = nn.Identity()
    perceptual: nn.Module = nn.Identity()
    if config.perceptual_weight > 0 or (config.has_contrastive and not config.has_own_contrastive_net):
        features = _load(config.perceptual_net, config.perceptual_weights, "perceptual", facts)
        perceptual = LPIPS(features)
        facts["perceptual"] = f"{perceptual.name}, weights: {features.source}"
    contrastive = None
    contrastive_features = None
    if config.has_contrastive:
        contrastive = ProbabilisticContrastiveLoss(
            weighted=config.contrastive == "pcl",
            num_patches=config.contrastive_patches if config.contrastive_sampling == "sampled" else None,
            max_places=config.contrastive_max_places,
            region=config.contrastive_region,
            layer_weights=config.contrastive_layer_weights or None,
        )
        if config.has_own_contrastive_net:
            net: VGGName = "vgg19" if config.contrastive_net == "vgg19" else "vgg16"
            contrastive_features = _load(net, config.contrastive_weights, "contrastive", facts)
    loss = ReconstructionLoss(
        features,
        perceptual,
        contrastive,
        contrastive_features,
        l1_weight=config.l1_weight,
        perceptual_weight=config.perceptual_weight,
        contrastive_weight=config.contrastive_weight,
    )
    return loss, facts


def _load(net: VGGName, weights: Path | None, role: str, facts: dict[str, str]) -> VGGFeatures:
    """A feature network; the warning about random weights becomes a fact that the run shows and keeps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = load_vgg_features(net, weights)
    facts[role] = f"{features.label}, weights: {features.source}"
    if not features.pretrained:
        facts[f"{role} warning"] = " ".join(str(w.message) for w in caught)
    return features
