"""The update of a step, skipped if a loss or gradient is non-finite, and averaged weights.

The decision to skip stays on the device, without synchronization: a skipped step runs the same code and changes
nothing. Only `Watch.read`, called once per record, waits for the device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regvq_fast.config import OptimizerConfig
from regvq_fast.precision import Precision
from regvq_fast.ranks import rank, sum_over_ranks, world_size
from regvq_fast.training.optimizers import build_optimizers
from regvq_fast.training.recipe import Networks
from regvq_fast.training.sharding import copied, full, load, local, placed

# These become non-finite as a consequence of another term, or because scaled gradients overflow: named as a cause only
# if nothing else is non-finite.
_DERIVED = ("quantizer", "loss", "lambda")
# Arguments of the ops -> their names in training.
_INPUTS = {"x": "latents", "query": "contrastive", "key": "contrastive"}
OVERFLOWING = frozenset({"lambda", "grad_norm", "grad_norm_discriminator"})
"""Numbers that overflow while fp16 loss scaling searches for a scale."""


def micro_batch_size(config: OptimizerConfig) -> int:
    """Return the number of images of a micro-batch on each rank.

    Raises:
        ValueError: the batch size is not a multiple of ranks times micro-batches.
    """
    size, rest = divmod(config.batch_size, world_size() * config.accumulate)
    if rest:
        by = f" and --grad-accum-steps {config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {config.batch_size} can't be divided among {world_size()} processes{by}: "
            f"use a multiple of {world_size() * config.accumulate}"
        )
    return size


class Optimization:
    """Optimizers, loss scaling, skipping of non-finite steps and averaged weights.

    A step calls :meth:`begin`, scales the gradients of its losses by :meth:`loss_scale`, adds their values to `watch`,
    and calls :meth:`step`.

    Args:
        networks: to train.
        config: settings.
        precision: decides whether losses are scaled.
        device: of the networks.
    """

    def __init__(self, networks: Networks, config: OptimizerConfig, precision: Precision, device: torch.device) -> None:
        self.trained, self.model, self.config, self.device = networks.trained, networks.model, config, device
        self.optimizers = {
            name: build_optimizers(module, networks.optimizers.get(name, config), networks.matrices)
            for name, module in networks.trained.items()
        }
        self.scaler = precision.scaler()
        self.watch = Watch(device)
        skip, skeleton = self.watch.skip, networks.skeleton
        self.average = AveragedWeights(self.model, config.ema, skip, skeleton) if config.ema else None
        self.judged: Any = self.model if self.average is None else self.average.module
        """The module with the weights to evaluate and save; sharded if the model is."""
        for optimizer in self._all():
            optimizer.found_inf = self.watch.skip  # type: ignore[attr-defined]  # where it is 1, the fused kernel does nothing
        self._rollback = Rollback(*networks.trained.values(), *networks.auxiliary.values())
        self._reading = Reading({}, 0, [], 0)

    def _all(self) -> list[torch.optim.Optimizer]:
        return [optimizer for own in self.optimizers.values() for optimizer in own]

    def begin(self) -> None:
        """Save what forward passes change in place, for :meth:`step` and :meth:`undo`."""
        self._rollback.save()

    def loss_scale(self, micro_batches: int) -> Tensor:
        """Return the factor (0-dim) of the gradients of each micro-batch."""
        return self.scaler.scale(torch.ones((), device=self.device)) / micro_batches

    def step(self, rates: Mapping[str, float]) -> None:
        """Update networks with learning rates by name, if all numbers of the step are finite.

        All ranks take the same decision. The host does not wait for the device.
        """
        norms = {}
        for name in rates:
            for optimizer in self.optimizers[name]:
                self.scaler.unscale_(optimizer)
            gradients = [p.grad for p in self.trained[name].parameters() if p.grad is not None]
            norms[name] = full(nn.utils.get_total_norm(gradients))
        self.watch.judge(norms)
        for name, norm in norms.items():
            if self.config.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(self.trained[name].parameters(), self.config.clip_grad, norm)
            for optimizer in self.optimizers[name]:
                for group in optimizer.param_groups:
                    group["lr"] = rates[name]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self._rollback.restore(self.watch.skip)
        if self.average is not None:
            self.average.update(self.model)

    def undo(self) -> None:
        """Undo the passes since :meth:`begin`: restore buffers and drop all gradients."""
        self._rollback.restore(torch.ones((), device=self.device))
        for module in self.trained.values():
            module.zero_grad(set_to_none=True)

    def read(self) -> dict[str, float | str]:
        """Return means of the training numbers since the last call, and skipped steps; waits for the device."""
        self._reading = reading = self.watch.read()
        values: dict[str, float | str] = {**reading.means, "skipped": reading.skipped}
        if reading.causes:
            values["not_finite"] = ", ".join(reading.causes)
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        return values

    def warnings(self, max_skipped: int) -> list[str]:
        """Return warnings about the last :meth:`read`.

        Raises:
            FloatingPointError: more than ``max_skipped`` steps in a row were skipped.
        """
        _, skipped, causes, longest = self._reading
        if longest > max_skipped:
            raise FloatingPointError(
                f"{longest} steps in a row were skipped (--max-skipped {max_skipped}), non-finite: {', '.join(causes)}"
            )
        # Loss scaling skips overflowing steps while it searches for a scale: no warning.
        if not skipped or (self.scaler.is_enabled() and OVERFLOWING.issuperset(causes)):
            return []
        steps = "a step was" if skipped == 1 else f"{skipped} steps were"
        return [f"{steps} skipped since the last record, non-finite: {', '.join(causes)}"]

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next update depends on, except the evaluated weights: tensors and plain values.

        All ranks must call it. The result differs between them only in the rows of sharded tensors.
        """
        return {
            "model": None if self.average is None else self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._all()],
            "scaler": self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and the evaluated weights: averaged ones if there are any."""
        load(self.judged, weights)
        if self.average is not None:
            load(self.model, state["model"])
        for optimizer, saved in zip(self._all(), state["optimizers"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                k: {name: placed(value, parameters[k]) for name, value in of_one.items()}
                for k, of_one in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": moments})
        if self.scaler.is_enabled() and state["scaler"]:  # empty if it was not enabled
            self.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])


class AveragedWeights:
    """Exponential moving average of a module's parameters and buffers, starting from their current values.

    PyTorch's AveragedModel counts updates in a tensor, which makes the host wait for the device at each of them.

    Args:
        module: copied as `self.module`, which holds the averages.
        decay: fraction of the averages that an update keeps, 0..1.
        skip: 0-dim on the module's device; an update while it is 1 changes nothing.
        skeleton: of the module, if it is sharded; the averages are sharded alike.
    """

    def __init__(
        self, module: nn.Module, decay: float, skip: Tensor | None = None, skeleton: nn.Module | None = None
    ) -> None:
        self.module = copied(module, skeleton).requires_grad_(False)
        self.decay, self.skip = decay, skip

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the averages with the current values of ``module``, without waiting for the device."""
        averages, values = _values(self.module), _values(module)
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, (1 - self.decay) * (1 if self.skip is None else 1 - self.skip))
        torch._foreach_add_(averages, change)


def _values(module: nn.Module) -> list[Tensor]:
    """Return the floating-point parameters and buffers."""
    values = (local(value) for value in (*module.parameters(), *module.buffers()))
    return [value for value in values if value.is_floating_point()]


class Rollback:
    """Copy of what forward passes change in place: EMA codebooks, running statistics.

    Args:
        modules: their buffers and their parameters without a gradient are saved and restored.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._live = [buffer for module in modules for buffer in module.buffers()]
        self._live += [p.detach() for module in modules for p in module.parameters() if not p.requires_grad]
        self._saved = [value.clone() for value in self._live]

    @torch.no_grad()
    def save(self) -> None:
        """Save the values; called before the forward passes of a step."""
        for saved, live in zip(self._saved, self._live, strict=True):
            saved.copy_(live)

    @torch.no_grad()
    def restore(self, skip: Tensor) -> None:
        """Restore the values where ``skip`` (0-dim, on their device) is 1."""
        for saved, live in zip(self._saved, self._live, strict=True):
            live.copy_(torch.where(skip.bool(), saved, live))


class Reading(NamedTuple):
    """Summary of a window of steps."""

    means: dict[str, float]  # by name, over the finite values; names without any are left out
    skipped: int  # skipped steps in the window
    causes: list[str]  # the first non-finite number of each skipped step
    longest: int  # longest run of skipped steps, which may have begun before the window


class Watch:
    """Means of the numbers of training, and the decision whether to skip a step.

    A step calls :meth:`add` for each micro-batch, then :meth:`judge` with its gradient norms, which sets `skip` to the
    same value on all ranks.

    Args:
        device: of the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self.skip = torch.zeros((), device=device)
        """0-dim float32: 1 if the last judged step must be skipped, else 0. Always the same tensor."""
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, in a row, longest row
        self._windows: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (3, K) sums, finite values, first causes
        self._names: tuple[str, ...] = ()
        self._micro_batches: list[Tensor] = []

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add the numbers (0-dim) of a micro-batch; all micro-batches of a step have the same names."""
        self._names = tuple(sorted(numbers, key=lambda name: name in _DERIVED))
        self._micro_batches.append(torch.stack([numbers[name].detach().float() for name in self._names]))

    def abort(self, error: FloatingPointError) -> None:
        """Handle a step aborted by an op, which on a CPU checks that its arguments are finite."""
        argument = str(error).split(" ", 1)[0]
        self._names = (_INPUTS.get(argument, argument),)
        self._micro_batches = [torch.full((1,), torch.nan, device=self.skip.device)]

    def judge(self, norms: Mapping[str, Tensor]) -> None:
        """Decide whether to skip the step, from the numbers added and its gradient norms (0-dim)."""
        gradients = torch.stack([norm.detach().float() for norm in norms.values()])
        values = torch.stack([torch.cat([numbers, gradients]) for numbers in self._micro_batches])  # (micro-batches, K)
        finite = values.isfinite()
        bad = sum_over_ranks((~finite).any(dim=0).float()) > 0
        first = bad & (bad.cumsum(0) == 1)
        update = torch.stack([values.where(finite, 0).sum(0), finite.float().sum(0), first.float()])
        names = (*self._names, *norms)
        self._windows[names] = self._windows[names] + update if names in self._windows else update
        self._micro_batches = []

        skip = bad.any()
        self.skip.copy_(skip)
        skipped, in_a_row, longest = self._counters.unbind()
        in_a_row = (in_a_row + 1) * skip
        self._counters.copy_(torch.stack([skipped + skip, in_a_row, longest.maximum(in_a_row)]))

    def last_step_was_skipped(self) -> bool:
        """Return whether the last judged step was skipped; waits for the device."""
        return bool(self._counters[1])

    def read(self) -> Reading:
        """Return the window since the last call and begin a new one. Waits for the device."""
        totals = [sum_over_ranks(window) for window in self._windows.values()]
        numbers = torch.cat([self._counters.double(), *(window.double().flatten() for window in totals)]).tolist()
        skipped, in_a_row, longest = (int(number) for number in numbers[:3])
        sums: dict[str, list[float]] = {}
        start = 3
        for names in self._windows:
            columns = zip(*(numbers[start + k * len(names) :][: len(names)] for k in range(3)), strict=True)
            for name, column in zip(names, columns, strict=True):
                sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0, 0.0)), column, strict=True)]
            start += 3 * len(names)
        self._windows = {}
        self._counters.copy_(torch.tensor([0, in_a_row, in_a_row]))
        means = {name: total / count for name, (total, count, _) in sums.items() if count}
        return Reading(means, skipped, [name for name, (_, _, first) in sums.items() if first], longest)

    def state_dict(self) -> dict[str, Any]:
        """Return the unfinished window and the counters; plain values and tensors."""
        return {
            "counters": self._counters,
            "windows": [[list(names), sum_over_ranks(window)] for names, window in self._windows.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._counters.copy_(state["counters"])
        windows = {tuple(names): window.to(self.skip.device) for names, window in state["windows"]}
        # Sums over the ranks, which `read` adds up again.
        self._windows = {names: window * (rank() == 0) for names, window in windows.items()}
