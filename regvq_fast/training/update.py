"""The update of a step: the optimizers take its gradients, if all of its numbers are finite.

Whether they are is decided and acted on without waiting for the device: a step that must not be taken runs through the
same code, and leaves everything as it was.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.config import OptimizerConfig
from regvq_fast.precision import Precision
from regvq_fast.training.optimization import AveragedWeights, build_optimizer
from regvq_fast.training.watch import Rollback, Watch


class Update:
    """Optimizers, loss scaling, numerical watch and averaged weights of the networks in training.

    A step calls :meth:`begin`, multiplies the gradients of its losses by :meth:`loss_scale`, tells `watch` their
    numbers, and calls :meth:`take`.

    Args:
        trained: the networks, by the name of their gradient norm.
        companions: modules that no optimizer trains, but whose buffers a step changes.
        model: the one of the networks whose weights are averaged.
        config: optimization.
        precision: says whether losses are scaled.
        device: where the networks are.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        companions: Iterable[nn.Module],
        model: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.trained, self.model, self.config, self.device = trained, model, config, device
        self.optimizers = {name: build_optimizer(module, config) for name, module in trained.items()}
        self.scaler = precision.scaler()
        self.watch = Watch(device)
        self.average = AveragedWeights(model, config.ema, self.watch.skip) if config.ema else None
        for adamw in self.optimizers.values():
            adamw.found_inf = self.watch.skip  # type: ignore[attr-defined]  # its fused kernel does nothing where it is 1
        self._rollback = Rollback(*trained.values(), *companions)

    def begin(self) -> None:
        """Remember what forward passes change in place, for :meth:`take` and :meth:`undo`."""
        self._rollback.save()

    def loss_scale(self, parts: int) -> Tensor:
        """Factor (0-dim) of the gradients of a batch that is cut into so many parts."""
        return self.scaler.scale(torch.ones((), device=self.device)) / parts

    def take(self, names: Iterable[str], lr: float) -> None:
        """Let the optimizers of the networks of these names take the gradients, if all numbers of the step are finite.

        Waits for the ranks, which all decide the same, but not for the device.
        """
        norms = {}
        for name in names:
            self.scaler.unscale_(self.optimizers[name])
            gradients = [p.grad for p in self.trained[name].parameters() if p.grad is not None]
            norms[name] = nn.utils.get_total_norm(gradients)
        self.watch.judge(norms)
        for name, norm in norms.items():
            if self.config.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(self.trained[name].parameters(), self.config.clip_grad, norm)
            for group in self.optimizers[name].param_groups:
                group["lr"] = lr
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
        self.scaler.update()
        self._rollback.restore(self.watch.skip)
        if self.average is not None:
            self.average.update(self.model)

    def undo(self) -> None:
        """Take back what passes since :meth:`begin` changed: buffers, and all gradients are gone."""
        self._rollback.restore(torch.ones((), device=self.device))
        for module in self.trained.values():
            module.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on, beside the weights that are evaluated: tensors and plain values.

        All ranks must call it; they get the same.
        """
        return {
            "model": None if self.average is None else self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
            "scaler": self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and the weights that were evaluated: averaged ones where there are any."""
        if self.average is None:
            self.model.load_state_dict(weights)
        else:
            self.model.load_state_dict(state["model"])
            self.average.module.load_state_dict(weights)
        for optimizer, saved in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and state["scaler"]:  # empty where it was not enabled: it starts afresh then
            self.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
