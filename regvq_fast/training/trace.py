"""A Chrome trace of a few steps."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from regvq_fast.files import atomic_path
from regvq_fast.ranks import rank

WARM = 3
"""Steps before the first that is traced: they compile, choose algorithms and fill caches."""


class StepTrace:
    """Profiles some steps and writes them as a trace for chrome://tracing or Perfetto; a context manager for each step.

    On ranks other than 0 it does nothing.

    Args:
        path: of the trace.
        first: the first step of this process.
        count: steps to profile; 0: none.
        device: where they compute.
    """

    def __init__(self, path: Path, first: int, count: int, device: torch.device) -> None:
        self.path = path
        self._begin, self._end = first + WARM, first + WARM + count
        self._step = first
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities) if count and rank() == 0 else None

    def __enter__(self) -> Self:
        if self._profile and self._step == self._begin:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile and error is not None and self._step >= self._begin:
            self._profile.stop()
            self._profile = None
        self._step += 1

    @property
    def steps(self) -> int:
        """Steps profiled so far."""
        return max(0, min(self._step, self._end) - self._begin)

    def write(self, last: bool) -> bool:
        """Write the trace if all of its steps are done, or the ``last`` one of the run; whether that was so.

        Raises:
            OSError: it can't be written.
        """
        if self._profile is None or not self.steps or not (last or self._step >= self._end):
            return False
        finished, self._profile = self._profile, None
        finished.stop()
        with atomic_path(self.path) as temporary:
            finished.export_chrome_trace(str(temporary))
        return True
