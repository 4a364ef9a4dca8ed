"""The optimizers of a network, and their learning rate.

AdamW, or for the matrices of a prior's blocks Muon.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) moves a matrix W (n, m) along

    W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(n, m)) U V^T        U S V^T = gradient averaged with momentum

so that each singular direction of a step has the same size. The factor gives the elements of a step the mean square
that AdamW's usually have: both take one learning rate and weight decay (Liu et al., "Muon is scalable for LLM
training", 2025). U V^T is approximated by Newton-Schulz iterations, which need only products.

`torch.optim.Muon` computes them in bfloat16 wherever it runs, one matrix after the other, and cannot skip a step
without waiting for the device.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regvq_fast.config import OptimizerConfig
from regvq_fast.models.model import Checkpointed

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values end between 0.7 and 1.2 after 5 iterations
_ITERATIONS = 5
_ELEMENTS = 2**24  # of a batch of matrices: bounds temporary memory, some 8 such tensors, to half a GiB
_MOMENTUM = 0.95
_SIZE_OF_ADAMW = 0.2  # root mean square of the elements of an update of AdamW, without its learning rate


def build_optimizers(
    module: nn.Module, config: OptimizerConfig, matrices: Sequence[Tensor] = ()
) -> list[torch.optim.Optimizer]:
    """Return AdamW with weight decay on the weights of linear layers and convolutions only, and Muon if it has any.

    Decay would pull codes, embeddings, positions and null conditions to the origin. minGPT and taming-transformers
    select the decayed parameters in the same way.

    Args:
        module: to train.
        config: settings.
        matrices: those that Muon updates instead of AdamW; others than the module's are ignored.
    """
    weights = {id(m.weight) for m in module.modules() if isinstance(m, _DECAYED)}
    of_muon = {id(p) for p in matrices}
    parameters = [p for p in module.parameters() if p.requires_grad]
    muon = [p for p in parameters if id(p) in of_muon]
    rest = [p for p in parameters if id(p) not in of_muon]
    decayed = [p for p in rest if id(p) in weights]
    others = [p for p in rest if id(p) not in weights]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    return [adamw, Muon(muon, lr=config.lr, weight_decay=config.weight_decay)] if muon else [adamw]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate at a step of a run: linear warm-up, then a schedule down to ``final_lr_fraction``.

    "cosine" and "linear" decay after the warm-up. "wsd" (warm-up, stable, decay: Hu et al., MiniCPM, 2024) decays
    linearly in the last ``decay_fraction`` of all steps. "constant" does not decay.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    above = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": min(1.0, max(0, steps - step) / (config.decay_fraction * steps)),
        "constant": 1.0,
    }[config.schedule]
    return config.lr * warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * above)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95.

    As in PyTorch's fused optimizers, a step changes nothing where the attribute `found_inf` is 1.

    Args:
        matrices: to optimize.
        lr: learning rate.
        weight_decay: of all matrices.

    Raises:
        ValueError: a parameter that is not a matrix.
    """

    found_inf: Tensor | None = None

    def __init__(self, matrices: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        if wrong := [tuple(matrix.shape) for matrix in matrices if matrix.ndim != 2]:
            raise ValueError(f"Muon is for matrices, got a parameter of shape {wrong[0]}")
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient; a closure is not supported."""
        for group in self.param_groups:
            self._move(**group)

    def _move(self, params: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in params:
            if matrix.grad is not None:
                of_shape[matrix.shape].append(matrix)
        for shape, matrices in of_shape.items():
            count = max(1, _ELEMENTS // shape.numel())
            for first in range(0, len(matrices), count):
                self._move_batch(matrices[first : first + count], lr, weight_decay)

    def _move_batch(self, matrices: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape, by batched products."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        old, momentum = torch.stack(tuple(matrices)), torch.stack(momenta)
        gradient = torch.stack([m.grad for m in matrices if m.grad is not None])
        changed = momentum.lerp(gradient, 1 - _MOMENTUM)
        step = orthogonalized(gradient.lerp(changed, _MOMENTUM))
        new = old * (1 - lr * weight_decay) - step * (lr * _SIZE_OF_ADAMW * math.sqrt(max(old.shape[1:])))
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            new, changed = torch.where(skip, old, new), torch.where(skip, momentum, changed)
        torch._foreach_copy_([*matrices, *momenta], [*new.unbind(), *changed.unbind()])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return about U V^T of matrices U S V^T (B, n, m): singular values of 0.7 to 1.2 where they are not almost 0.

    The products are in bfloat16 on GPUs that have it, which Muon's authors found sufficient; few CPUs multiply it fast.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def block_matrices(module: nn.Module) -> list[Tensor]:
    """Return the trained weights of linear layers in the `Checkpointed` blocks of a module.

    Embeddings and heads are left to AdamW, as by Muon's authors.
    """
    blocks = (block for block in module.modules() if isinstance(block, Checkpointed))
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    return [layer.weight for layer in layers if layer.weight.requires_grad]
