"""AdamW as the paper uses it, the learning-rate schedule, and averaged weights."""

import copy
import math

import torch
from torch import Tensor, nn

from regvq_fast.config import OptimizerConfig

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


class AveragedWeights:
    """Exponential moving average of a module's parameters and buffers, from those that it has now on.

    (PyTorch's AveragedModel keeps count of its updates in a tensor, for which the host waits at each of them.)

    Args:
        module: copied as `module`, the one with the averages.
        decay: share of the averages that an update keeps, 0..1.
        skip: 0-dim on the module's device, read at each update: where it is 1 the averages stay as they are.
    """

    def __init__(self, module: nn.Module, decay: float, skip: Tensor | None = None) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.skip = decay, skip

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present values of the module that was copied. Doesn't wait for the device."""
        averages, values = _values(self.module), _values(module)
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, (1 - self.decay) * (1 if self.skip is None else 1 - self.skip))
        torch._foreach_add_(averages, change)


def _values(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of the networks here, all of them are floating-point numbers."""
    return [*module.parameters(), *module.buffers()]
