"""Images larger than a prior's grid of tokens: out-painting, window by window.

A canvas grows by half a grid in one direction at a time. Windows of the prior's size cover the new part from the top or
left on, each overlapping known tokens by half: these are kept, and the others are sampled around them. An
autoregressive prior samples in raster order, given only earlier tokens, so extending to the right and down works better
than the other directions.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regvq_fast.priors.conditions import Condition
from regvq_fast.priors.sampler import PriorSampler

Direction = Literal["left", "right", "up", "down"]


class Window(NamedTuple):
    """Position of a prior's grid on a canvas, in tokens."""

    top: int
    left: int


class Plan(NamedTuple):
    """Size of a canvas, and its windows in order of sampling; the first is the original grid."""

    height: int
    width: int
    windows: list[Window]
    shape: tuple[int, int]
    """(h, w) of a window."""

    def part(self, conditions: Any, condition: Condition, window: Window) -> Any:
        """Return the conditions of a window: maps (B, height, width) are cropped, others unchanged."""
        if condition != "segmentation":
            return conditions
        (top, left), (h, w) = window, self.shape
        return conditions[:, top : top + h, left : left + w]


def plan(shape: tuple[int, int], directions: Sequence[Direction]) -> Plan:
    """Plan a canvas that begins with one grid and grows by half of it in each direction in turn.

    Args:
        shape: (h, w) of the grid.
        directions: see above.

    Raises:
        ValueError: a grid whose side in a direction is a single token.
    """
    h, w = shape
    top, left, bottom, right = 0, 0, h, w
    windows = [Window(0, 0)]
    for direction in directions:
        sideways = direction in ("left", "right")
        if (w if sideways else h) < 2:
            raise ValueError(f"a grid of {h} x {w} tokens can't be extended {direction}: it needs at least two there")
        if sideways:
            start = right - (w - w // 2) if direction == "right" else left - w // 2
            windows += [Window(row, start) for row in _starts(top, bottom, h)]
            left, right = min(left, start), max(right, start + w)
        else:
            start = bottom - (h - h // 2) if direction == "down" else top - h // 2
            windows += [Window(start, column) for column in _starts(left, right, w)]
            top, bottom = min(top, start), max(bottom, start + h)
    return Plan(bottom - top, right - left, [Window(row - top, column - left) for row, column in windows], shape)


def sample_canvas(
    sampler: PriorSampler,
    plan: Plan,
    conditions: Callable[[Window], Any],
    first_image: int,
    num_images: int,
    *,
    keep: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Sample the tokens (B, H, W) int64 of a canvas.

    Args:
        sampler: of the prior.
        plan: of the canvas.
        conditions: returns the prepared conditions of B images in a window.
        first_image: global number of the first image.
        num_images: number of all images with this seed, so that each window has its own noise.
        keep: tokens of the first window and a mask of those to keep, as in `PriorSampler.sample`.
        progress: called with the steps done and in total.

    Raises:
        ValueError: as `PriorSampler.sample`.
    """
    h, w = plan.shape
    batch = len(conditions(plan.windows[0]))
    device = next(sampler.prior.parameters()).device
    tokens = torch.zeros(batch, plan.height, plan.width, dtype=torch.int64, device=device)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    for number, (top, left) in enumerate(plan.windows):
        here = (slice(None), slice(top, top + h), slice(left, left + w))
        if number == 0 and keep is not None:
            tokens[here], known[here] = keep

        def advance(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(plan.windows) * total)

        tokens[here] = sampler.sample(
            conditions(plan.windows[number]),
            first_image + number * num_images,
            keep=(tokens[here].contiguous(), known[here].contiguous()),
            progress=advance,
        )
        known[here] = True
    return tokens


def _starts(first: int, last: int, size: int) -> list[int]:
    """Return the starts of windows that cover [first, last), each overlapping the last one by half."""
    step = max(1, size - size // 2)
    return [*range(first, last - size, step), last - size]
