"""Construction of the tokenizer and its losses from a configuration."""

from dataclasses import replace

from torch import nn

from regvq_fast.config import LossConfig, VQGANConfig
from regvq_fast.losses.contrastive import ProbabilisticContrastiveLoss
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.losses.reconstruction import ReconstructionLoss
from regvq_fast.models.features import NoWeightsError, VGGName, load_vgg_features
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.quantizers import QUANTIZERS


def build_model(config: VQGANConfig) -> VQGAN:
    """Build the autoencoder with its quantizer."""
    model = config.model
    return VQGAN(
        QUANTIZERS[config.quantizer.quantizer].from_section(config.quantizer),
        image_size=config.data.image_size,
        ch=model.ch,
        ch_mult=model.ch_mult,
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=model.attn_resolutions,
        z_channels=model.z_channels,
        dropout=model.dropout,
        norm_groups=model.norm_groups,
    )


def build_reconstruction_loss(
    config: LossConfig, *, optional: bool = True
) -> tuple[ReconstructionLoss, LossConfig, dict[str, str]]:
    """Build the losses that need no discriminator.

    Args:
        config: the losses to build.
        optional: leave out losses whose feature network has no weights on this machine.

    Returns:
        The losses, the configuration without those left out, and run metadata of the feature networks.

    Raises:
        NoWeightsError: there are no weights, and ``optional`` is False. Otherwise as :func:`load_vgg_features`.
    """
    metadata: dict[str, str] = {}
    features: nn.Module = nn.Identity()
    perceptual: nn.Module = nn.Identity()
    shared = config.has_contrastive and not config.has_own_contrastive_net
    if config.perceptual_weight > 0 or shared:
        try:
            features = load_vgg_features(config.perceptual_net, config.perceptual_weights)
            perceptual = LPIPS(features)
            metadata["perceptual"] = f"{perceptual.name}, weights: {features.source}"
        except NoWeightsError as error:
            terms = "perceptual and contrastive losses" if shared else "perceptual loss"
            metadata["left out"] = _left_out(error, terms, "--perceptual-weights", optional)
            config = replace(config, perceptual_weight=0.0, contrastive="none" if shared else config.contrastive)
    contrastive_features = None
    if config.has_own_contrastive_net:
        net: VGGName = "vgg19" if config.contrastive_net == "vgg19" else "vgg16"
        try:
            contrastive_features = load_vgg_features(net, config.contrastive_weights)
            metadata["contrastive"] = f"{contrastive_features.label}, weights: {contrastive_features.source}"
        except NoWeightsError as error:
            metadata["left out, too"] = _left_out(error, "contrastive loss", "--contrastive-weights", optional)
            config = replace(config, contrastive="none")
    contrastive = None
    if config.has_contrastive:
        contrastive = ProbabilisticContrastiveLoss(
            weighted=config.contrastive == "pcl",
            num_patches=config.contrastive_patches if config.contrastive_sampling == "sampled" else None,
            region=config.contrastive_region,
        )
    loss = ReconstructionLoss(
        features,
        perceptual,
        contrastive,
        contrastive_features,
        l1_weight=config.l1_weight,
        l2_weight=config.l2_weight,
        perceptual_weight=config.perceptual_weight,
        contrastive_weight=config.contrastive_weight,
    )
    return loss, config, metadata


def _left_out(error: NoWeightsError, terms: str, flag: str, optional: bool) -> str:
    """Return a report that the terms are left out; raise NoWeightsError if they are not optional."""
    if not optional:
        raise NoWeightsError(
            f"this preset trains with {terms}, but there are {error}: give a file with {flag}, or leave them out with "
            "--perceptual-weight 0 --contrastive none"
        )
    what = str(error).partition(" (")[0]  # one line: without the reason
    return f'{terms}: {what} here; {flag} takes a file, or "random"'
