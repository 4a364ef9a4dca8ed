"""Configurations of the training scripts, from which their command lines are generated."""

from regvq_fast.config.common import (
    Config,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    override,
    parse_config,
    read_config,
)
from regvq_fast.config.prior import (
    AR_PRESETS,
    DIFFUSION_PRESETS,
    ARConfig,
    DiffusionConfig,
    PriorConfig,
    TokensConfig,
    check_ar_config,
    check_diffusion_config,
)
from regvq_fast.config.script import run_script
from regvq_fast.config.vqgan import VQGAN_PRESETS, LossConfig, QuantizerConfig, VQGANConfig, check_vqgan_config

__all__ = [
    "AR_PRESETS",
    "DIFFUSION_PRESETS",
    "VQGAN_PRESETS",
    "ARConfig",
    "Config",
    "DiffusionConfig",
    "LossConfig",
    "OptimizerConfig",
    "PriorConfig",
    "QuantizerConfig",
    "RunConfig",
    "TokensConfig",
    "TrainConfig",
    "VQGANConfig",
    "check_ar_config",
    "check_diffusion_config",
    "check_vqgan_config",
    "config_from_dict",
    "override",
    "parse_config",
    "read_config",
    "run_script",
]
