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
from regvq_fast.config.script import run_script
from regvq_fast.config.vqgan import VQGAN_PRESETS, LossConfig, QuantizerConfig, VQGANConfig, check_vqgan_config

__all__ = [
    "VQGAN_PRESETS",
    "Config",
    "LossConfig",
    "OptimizerConfig",
    "QuantizerConfig",
    "RunConfig",
    "TrainConfig",
    "VQGANConfig",
    "check_vqgan_config",
    "config_from_dict",
    "override",
    "parse_config",
    "read_config",
    "run_script",
]
