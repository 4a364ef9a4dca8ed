"""Configurations of the training scripts, from which their command lines are generated."""

from regvq_fast.config.command_line import parse_config, run_script
from regvq_fast.config.prior import (
    AR_PRESETS,
    DIFFUSION_PRESETS,
    ARConfig,
    DiffusionConfig,
    PriorConfig,
    TokensConfig,
)
from regvq_fast.config.saved import config_from_dict, override, read_config
from regvq_fast.config.sections import Config, OptimizerConfig, PresetName, RunConfig, TrainConfig
from regvq_fast.config.tokenizer import VQGAN_PRESETS, LossConfig, QuantizerConfig, VQGANConfig

__all__ = [
    "AR_PRESETS",
    "DIFFUSION_PRESETS",
    "VQGAN_PRESETS",
    "ARConfig",
    "Config",
    "DiffusionConfig",
    "LossConfig",
    "OptimizerConfig",
    "PresetName",
    "PriorConfig",
    "QuantizerConfig",
    "RunConfig",
    "TokensConfig",
    "TrainConfig",
    "VQGANConfig",
    "config_from_dict",
    "override",
    "parse_config",
    "read_config",
    "run_script",
]
