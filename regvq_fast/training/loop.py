"""The training loop: steps, records, pictures, evaluations, checkpoints."""

import time

from regvq_fast.config import TrainConfig, override
from regvq_fast.evaluation.reconstruction import ReconstructionMetrics
from regvq_fast.training.checkpoint import Checkpoints, find_checkpoint
from regvq_fast.training.recorder import Recorder, new_run_folder, reason
from regvq_fast.training.signals import Interrupted, StopSignals
from regvq_fast.training.vqgan import VQGANTask


class RunStopped(Exception):
    """The run ended before its last step, or could not save its results; the message says why and what to do."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def prepare(config: TrainConfig) -> tuple[VQGANTask, Recorder, Checkpoints]:
    """The parts of a run: new, or with ``--resume`` as they were at its newest checkpoint. Makes the run's folder.

    Raises:
        ValueError, OSError: what is wrong, in one sentence; nothing has been written.
    """
    start = find_checkpoint(config) if config.run.resume else None
    task = VQGANTask(override(config, out=new_run_folder(config) if start is None else config.run.out))
    if start is not None:
        task.load(start)
    recorder = Recorder(task.config, task.facts, task.model.architecture(), start)
    return task, recorder, Checkpoints(recorder.folder, config.run.keep_checkpoints, start)


def fit(task: VQGANTask, recorder: Recorder, checkpoints: Checkpoints) -> None:
    """Run the steps of a task that are left, recording as its configuration says, then evaluate and finish it.

    Raises:
        RunStopped: by a signal, by numbers that are not finite, or because the results could not be written.
    """
    loop = _Loop(task, recorder, checkpoints)
    with StopSignals() as stop:
        try:
            loop.run(stop)
        except Interrupted as signal:
            loop.save()
            raise RunStopped(
                f"stopped by {signal} after step {loop.done} of {task.steps}; to continue from {loop.newest}: "
                f"{loop.command}",
                signal.exit_code,
            ) from None
        except FloatingPointError as error:
            raise RunStopped(
                f"stopped after step {loop.done}: {error}; to continue from {loop.newest}, add a lower --lr, a lower "
                f"--clip-grad or --no-amp to: {loop.command}"
            ) from None


class _Loop:
    def __init__(self, task: VQGANTask, recorder: Recorder, checkpoints: Checkpoints) -> None:
        self.task, self.recorder, self.checkpoints = task, recorder, checkpoints
        self.config = task.config.run
        self.done = task.start
        self.command = f"python train/vq.py --resume --out {recorder.folder}"
        self._not_saved: int | None = None  # the last step of which a checkpoint could not be written
        self._position = recorder.metrics_bytes  # of the records of the steps done, but not of their evaluation

    @property
    def newest(self) -> str:
        path = self.checkpoints.newest
        return "the beginning" if path is None else path.name

    def run(self, stop: StopSignals) -> None:
        task, recorder, run = self.task, self.recorder, self.config
        recorder.status("compiling, one to three minutes" if run.compile else "starting")
        milestones = {0, task.disc_start} if run.compile else {0}  # recorded by themselves: they hold compilation
        owes_checkpoint = False
        clock = _Clock()
        for step in range(task.start, task.steps):
            # Before the step, not after the one before it: what continues from a checkpoint here evaluates (again).
            if step and run.eval_every and step % run.eval_every == 0:
                self._evaluate(stop)
                clock.restart()
            if run.compile and step == task.disc_start != task.start:
                recorder.status("compiling the discriminator")
            task.step(step)
            self.done = done = step + 1
            clock.images += task.batch_size
            recorder.advance(done)
            if step in milestones or done % run.log_every == 0 or done == task.steps:
                values = task.record()  # waits for the device, so that the clock is honest
                values["images_per_second"] = clock.read(counts=step not in milestones | {task.start})
                recorder.record(done, values)
                for warning in task.review():
                    recorder.warn(warning)
            elif step == task.start:
                clock.restart()
            if done % run.image_every == 0 and done < task.steps:
                with recorder.surviving_a_full_disk("pictures/"):
                    path = recorder.picture("reconstructions", done)
                    task.save_reconstructions(path)
                    recorder.show_picture(path, done)
                clock.restart()
            self._position = recorder.metrics_bytes
            owes_checkpoint |= run.checkpoint_every > 0 and done % run.checkpoint_every == 0
            # Not while steps are skipped: the checkpoints kept must not all be of a run that is being lost.
            if owes_checkpoint and not task.watch.last_step_was_skipped():
                self.save()
                owes_checkpoint = False
                clock.restart()
            stop.check()
        self.save()
        recorder.status("evaluating")
        metrics = self._evaluate(stop)
        try:
            task.finish(recorder, metrics, clock.average)
        except OSError as error:
            raise RunStopped(
                f"all steps are done, but the results could not be written ({reason(error)}); make room, then: "
                f"{self.command}"
            ) from None

    def save(self) -> bool:
        """Save a checkpoint of the steps done, unless there is one; a disk that won't take it is a warning."""
        if self.checkpoints.has(self.done):
            return True
        try:
            self.recorder.sync()
            state = {**self.task.state(), "metrics_bytes": self._position}
            self.checkpoints.save(self.done, self.recorder.description, self.task.eval_model.state_dict(), state)
        except OSError as error:
            if self._not_saved != self.done:
                self.recorder.warn(
                    f"the checkpoint of step {self.done} could not be saved ({reason(error)}); the run can be resumed "
                    f"from {self.newest}"
                )
            self._not_saved = self.done
            return False
        return True

    def _evaluate(self, stop: StopSignals) -> ReconstructionMetrics:
        metrics = self.task.evaluate(progress=stop.check)
        values = metrics.scalars()
        self.recorder.record(self.done, values, prefix="val")
        if self.config.checkpoint_every and self.checkpoints.is_best(values) and self.save():
            with self.recorder.surviving_a_full_disk("best.json"):
                self.checkpoints.mark_best(values)
        return metrics


class _Clock:
    """Images a second, of windows that end with a reading or a restart."""

    def __init__(self) -> None:
        self._seconds, self._images = 0.0, 0  # of the windows that count
        self.restart()

    def restart(self) -> None:
        self._begin, self.images = time.perf_counter(), 0

    def read(self, *, counts: bool) -> float:
        elapsed, images = time.perf_counter() - self._begin, self.images
        if counts:
            self._seconds, self._images = self._seconds + elapsed, self._images + images
        self.restart()
        return images / elapsed

    @property
    def average(self) -> float:
        return self._images / self._seconds if self._images else float("nan")
