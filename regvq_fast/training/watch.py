"""The numerical watch: numbers that are not finite stay out of the weights, and are told of.

Nothing here waits for the device but `Watch.read`, which the loop calls when it records: a step is judged and skipped
on the device, and heard of at the next record.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regvq_fast.evaluation.codebook import utilization
from regvq_fast.ranks import rank, sum_over_ranks

# Not finite because another term is not, or because scaled gradients overflowed: looked at after the losses themselves.
_DERIVED = ("quantizer", "loss", "lambda")
# The ops' arguments, by what they are here.
_INPUTS = {"x": "latents", "query": "contrastive", "key": "contrastive"}
OVERFLOWING = frozenset({"lambda", "grad_norm", "grad_norm_discriminator"})
"""Numbers that fp16 loss scaling makes overflow, as part of its search for a scale."""


class Reading(NamedTuple):
    """What a window of steps was like."""

    means: dict[str, float]  # by name, over the finite values; no entry where there is none
    skipped: int  # steps of the window that were not taken
    causes: list[str]  # what was not finite, the first number of each skipped step
    longest: int  # most steps in a row that were not taken; a row may have begun before the window


class Watch:
    """Means of the numbers of training, and the verdict on each step.

    A step gives its numbers to :meth:`add`, once for each part of its batch, and its gradient norms to :meth:`judge`.
    Then ``skip`` says whether it may be taken; on several ranks, all of them say the same.

    Args:
        device: where the numbers are.
    """

    def __init__(self, device: torch.device) -> None:
        self.skip = torch.zeros((), device=device)
        """0-dim float32: 1 where the judged step must not be taken, else 0. Always the same tensor."""
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, in a row, longest row
        self._windows: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (3, K) sums, finite values, first causes
        self._names: tuple[str, ...] = ()
        self._parts: list[Tensor] = []

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Take the numbers (0-dim) of a part of a step's batch; each part has the same names."""
        self._names = tuple(sorted(numbers, key=lambda name: name in _DERIVED))
        self._parts.append(torch.stack([numbers[name].detach().float() for name in self._names]))

    def break_off(self, error: FloatingPointError) -> None:
        """The step came to no numbers: on a CPU the ops look at what they are given, and raise."""
        argument = str(error).split(" ", 1)[0]
        self._names = (_INPUTS.get(argument, argument),)
        self._parts = [torch.full((1,), torch.nan, device=self.skip.device)]

    def judge(self, norms: Mapping[str, Tensor]) -> None:
        """Decide on the step whose numbers were added, by them and its gradient norms (0-dim)."""
        gradients = torch.stack([norm.detach().float() for norm in norms.values()])
        values = torch.stack([torch.cat([part, gradients]) for part in self._parts])  # (parts, K)
        finite = values.isfinite()
        bad = sum_over_ranks((~finite).any(dim=0).float()) > 0
        first = bad & (bad.cumsum(0) == 1)
        update = torch.stack([values.where(finite, 0).sum(0), finite.float().sum(0), first.float()])
        names = (*self._names, *norms)
        self._windows[names] = self._windows[names] + update if names in self._windows else update
        self._parts = []

        skip = bad.any()
        self.skip.copy_(skip)
        skipped, in_a_row, longest = self._counters.unbind()
        in_a_row = (in_a_row + 1) * skip
        self._counters.copy_(torch.stack([skipped + skip, in_a_row, longest.maximum(in_a_row)]))

    def last_step_was_skipped(self) -> bool:
        """Waits for the device."""
        return bool(self._counters[1])

    def read(self) -> Reading:
        """The window since the last call, which ends it. Waits for the device."""
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
        """The unfinished window and the count of steps in a row; plain values and tensors."""
        return {
            "counters": self._counters,
            "windows": [[list(names), sum_over_ranks(window)] for names, window in self._windows.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._counters.copy_(state["counters"])
        windows = {tuple(names): window.to(self.skip.device) for names, window in state["windows"]}
        # They are sums over the ranks, and will be added up again.
        self._windows = {names: window * (rank() == 0) for names, window in windows.items()}


class Rollback:
    """What a forward pass changes in place, so that it can be undone: EMA codebooks, running statistics.

    Args:
        modules: those that train. Covered are their buffers, and the parameters that have no gradient.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._live = [buffer for module in modules for buffer in module.buffers()]
        self._live += [p.detach() for module in modules for p in module.parameters() if not p.requires_grad]
        self._saved = [value.clone() for value in self._live]

    @torch.no_grad()
    def save(self) -> None:
        """Remember the values; called before the forward passes of a step."""
        for saved, live in zip(self._saved, self._live, strict=True):
            saved.copy_(live)

    @torch.no_grad()
    def restore(self, skip: Tensor) -> None:
        """Bring the values back where ``skip`` (0-dim, on their device) is 1."""
        for saved, live in zip(self._saved, self._live, strict=True):
            live.copy_(torch.where(skip.bool(), saved, live))


class CollapseAlarm:
    """One warning when the codebook collapses.

    Args:
        threshold: share of the codes that a window should use, of those that as many uniform draws would; 0: no alarm.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._silent = threshold == 0

    def check(self, counts: Tensor) -> str | None:
        """The warning about a window in which the codes were selected so many times, (N,); None where there is none."""
        used = float(utilization(counts))
        attainable = 1 - (1 - 1 / len(counts)) ** int(counts.sum())
        if self._silent or used >= self.threshold * attainable:
            return None
        self._silent = True
        return (
            f"the codebook is collapsing: {used:.1%} of {len(counts)} codes were used since the last record "
            f"(--collapse-threshold {self.threshold:g}); docs/troubleshooting.md says what helps"
        )
