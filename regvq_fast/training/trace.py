"""A Chrome trace of a few steps."""

from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from regvq_fast.files import atomic_path
from regvq_fast.ranks import rank
from regvq_fast.training.recorder import Recorder

WARM = 3
"""Steps before the first traced one, which compile, choose algorithms and fill caches."""


class StepTrace:
    """Profile some steps into trace.json, for chrome://tracing or Perfetto; a context manager entered for each step.

    On ranks other than 0 it does nothing.

    Args:
        recorder: of the run.
        steps: of this process.
        count: steps to profile; 0: none.
        device: of the run.
    """

    def __init__(self, recorder: Recorder, steps: range, count: int, device: torch.device) -> None:
        self._recorder, self.path = recorder, recorder.folder / "trace.json"
        self._step, self._begin = steps.start, steps.start + WARM
        self._end = min(self._begin + count, steps.stop)
        if count and self._end <= self._begin:
            recorder.warn(
                f"--trace-steps {count} leaves no trace: the first {WARM} steps are not traced and only "
                f"{len(steps)} steps are left; give more --steps"
            )
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities) if self._end > self._begin and rank() == 0 else None

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

    def write(self) -> bool:
        """Write the trace after its last step; return whether it was written. A full disk only causes a warning."""
        if self._profile is None or self._step < self._end:
            return False
        finished, self._profile = self._profile, None
        finished.stop()
        with self._recorder.surviving_a_full_disk(self.path.name):
            with atomic_path(self.path) as temporary:
                finished.export_chrome_trace(str(temporary))
            self._recorder.status(f"traced {self._end - self._begin} steps: {self.path}")
        return True
