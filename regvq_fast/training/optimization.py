"""AdamW as the paper uses it, the learning-rate schedule, and averaged weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from regvq_fast.config import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the weights of linear layers and convolutions, and on nothing else.

    Decayed codes, and embeddings of any kind, would all drift to the origin, against the losses that place them; so
    would positions and null conditions, which are embeddings, too, though of no module of their own. (minGPT, and with
    it taming-transformers, decays as this does.)
    """
    weights = {id(m.weight) for m in module.modules() if isinstance(m, _DECAYED)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if id(p) in weights]
    others = [p for p in parameters if id(p) not in weights]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at a step of a run: linear warm-up, then a cosine to ``final_lr_fraction``."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def average_weights(module: nn.Module, decay: float, skip: Tensor | None = None) -> AveragedModel | None:
    """Exponential moving average of parameters and buffers; None where ``decay`` is 0.

    ``skip``, 0-dim on the module's device, is read at each update: where it is 1 the average stays as it is.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        weight = 1 - decay if skip is None else (1 - decay) * (1 - skip)
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averages, change)

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)
