"""Configurations of the commands; their command lines are generated from them."""

from regvq_fast.config.command_line import parse_config, run_command, typed_command
from regvq_fast.config.saved import config_from_dict, override, read_config
from regvq_fast.config.sections import Config, OptimizerConfig, PresetName, RunConfig, TrainConfig
from regvq_fast.config.tokenizer import VQGAN_PRESETS, LossConfig, QuantizerConfig, VQGANConfig, quantizer_section

__all__ = [
    "VQGAN_PRESETS",
    "Config",
    "LossConfig",
    "OptimizerConfig",
    "PresetName",
    "QuantizerConfig",
    "RunConfig",
    "TrainConfig",
    "VQGANConfig",
    "config_from_dict",
    "override",
    "parse_config",
    "quantizer_section",
    "read_config",
    "run_command",
    "typed_command",
]
