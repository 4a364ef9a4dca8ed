"""The training loop: steps, records, pictures, evaluations, checkpoints."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regvq_fast.config import Config, override, parse_config
from regvq_fast.precision import choose_device
from regvq_fast.ranks import (
    is_torchrun,
    local_rank,
    local_ranks,
    num_ranks,
    process_group,
    rank,
    texts_of_ranks,
    together,
)
from regvq_fast.training.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from regvq_fast.training.memory import find_batch_size, is_out_of_memory, out_of_memory_advice
from regvq_fast.training.recorder import Recorder, new_run_folder, reason
from regvq_fast.training.signals import Interrupted, StopSignals
from regvq_fast.training.task import Metrics, Task
from regvq_fast.training.throughput import Utilization
from regvq_fast.training.trace import WARM, StepTrace


class RunStopped(Exception):
    """The run ended before its last step, or could not save its results; the message says why and what to do.

    Args:
        message: see above.
        exit_code: of the process.
        shared: whether all ranks stop with this message; otherwise it is that of one, which ends the others.
    """

    def __init__(self, message: str, exit_code: int = 1, *, shared: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.shared = exit_code, shared


def run(task: type[Task[Config]], presets: Mapping[str, Config], description: str) -> None:
    """A training script: parse its command line, train, and leave with a message and a status where that failed."""
    try:
        _run(task, presets, description)
    except KeyboardInterrupt:  # while a run trains, `StopSignals` takes it
        if local_rank() == 0:
            print("stopped before the first step", file=sys.stderr)
        sys.exit(130)


def _run(task: type[Task[Config]], presets: Mapping[str, Config], description: str) -> None:
    try:
        config = parse_config(presets, sys.argv[1:], description)
    except (ValueError, OSError) as error:  # each process of a machine finds the same
        sys.exit(f"error: {error}" if local_rank() == 0 else 1)
    try:
        device = choose_device(config.run.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with process_group(device):
        try:
            if config.run.find_batch_size:
                find_batch_size(task, config)
                return
            prepared = prepare(task, config)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}" if rank() == 0 else 1)
        _, recorder, _ = prepared
        try:
            with recorder:
                fit(*prepared)
        except RunStopped as stop:
            if rank() == 0 or not stop.shared:
                print(stop, file=sys.stderr)
            sys.exit(stop.exit_code)


def prepare(kind: type[Task[Config]], config: Config) -> tuple[Task[Config], Recorder, Checkpoints]:
    """The parts of a run: new, or with ``--resume`` as they were at its newest checkpoint. Makes the run's folder.

    A finished run that goes on has no final model any more: its newest checkpoint serves until the new end.

    Raises:
        ValueError, OSError: what is wrong, in one sentence, and on all ranks; nothing has been written.
    """
    start: Checkpoint | None = None
    out = ""
    with together():
        if config.run.resume:
            start = find_checkpoint(config)
        elif rank() == 0:
            out = str(new_run_folder(config))
    out = texts_of_ranks(out)[0]
    found = texts_of_ranks("" if start is None else str(start.step))
    if len(set(found)) > 1:
        raise ValueError(f"the processes see checkpoints of different steps ({', '.join(found)}): is --out shared?")
    task = kind(config if start else override(config, out=Path(out)))
    with together():
        if start is not None:
            task.load(start)
    with together():
        recorder = Recorder(task.config, task.facts, task.model.architecture(), start)
        if rank() == 0:
            task.begin(recorder.folder)
        checkpoints = Checkpoints(recorder.folder, config.run.keep_checkpoints, start)
        if checkpoints.newest and task.start < task.steps:
            recorder.remove_results()
    return task, recorder, checkpoints


def fit(task: Task[Any], recorder: Recorder, checkpoints: Checkpoints) -> None:
    """Run the steps of a task that are left, recording as its configuration says, then evaluate and finish it.

    Raises:
        RunStopped: by a signal, by numbers that are not finite, by data that can't be read, for want of memory, or
            because the results could not be written.
    """
    loop = _Loop(task, recorder, checkpoints)
    with StopSignals(lambda: loop.remedy) as stop:
        try:
            loop.run(stop)
        except Interrupted as signal:
            loop.save()
            during = "" if loop.training else ", during an evaluation"
            raise RunStopped(
                f"stopped by {signal} after step {loop.done} of {task.steps}{during}; {loop.remedy}", signal.exit_code
            ) from None
        except FloatingPointError as error:
            raise RunStopped(
                f"stopped after step {loop.done}: {error}; to continue from {loop.newest}, add a lower --lr, a lower "
                f"--clip-grad or --no-amp to: {loop.command}",
                shared=not isinstance(error, ValueError),  # an op's, which is of its rank alone, is both
            ) from None
        except (RuntimeError, MemoryError, ValueError, OSError) as error:
            if is_out_of_memory(error):
                why = out_of_memory_advice(task.config, task.device, task.rank_batch, training=loop.training)
            elif isinstance(error, (ValueError, OSError)):
                why = _last_line(error)
            else:
                raise
            raise RunStopped(f"stopped after step {loop.done}: {why}; {loop.remedy}", shared=False) from error


def _last_line(error: Exception) -> str:
    """What an error says; one of a process that loads data has the traceback there before it."""
    return str(error).strip().rpartition("\n")[2].removeprefix(f"{type(error).__name__}: ")


class _Loop:
    def __init__(self, task: Task[Any], recorder: Recorder, checkpoints: Checkpoints) -> None:
        self.task, self.recorder, self.checkpoints = task, recorder, checkpoints
        self.config = task.config.run
        self.done = task.start
        self.training = True  # rather than evaluating
        self._utilization = Utilization(task)
        launcher = f"torchrun --nproc-per-node {local_ranks()}" if is_torchrun() else "python"
        self.command = f"{launcher} {task.script} --resume --out {shlex.quote(str(recorder.folder))}"
        self._not_saved: int | None = None  # the last step of which a checkpoint could not be written
        self._position = recorder.metrics_bytes  # of the records of the steps done, but not of their evaluation

    @property
    def newest(self) -> str:
        path = self.checkpoints.newest
        return "the beginning" if path is None else path.name

    @property
    def remedy(self) -> str:
        return f"to continue from {self.newest}: {self.command}"

    def run(self, stop: StopSignals) -> None:
        task, recorder, run = self.task, self.recorder, self.config
        recorder.status("starting")
        milestones = task.compiles_at() if task.compiles else {0: "starting"}
        trace = StepTrace(recorder.folder / "trace.json", task.start, run.trace_steps, task.device)
        if run.trace_steps and (left := task.steps - task.start) <= WARM:
            recorder.warn(
                f"--trace-steps {run.trace_steps} leaves no trace: the first {WARM} steps are not traced, and the run "
                f"has {left} to do"
            )
        owes_checkpoint = False
        clock = _Clock(task.waited)
        for step in range(task.start, task.steps):
            # Before the step, not after the one before it: what continues from a checkpoint here evaluates (again).
            if step and run.eval_every and step % run.eval_every == 0:
                self._evaluate(stop)
                clock.restart()
            if task.compiles and (step in milestones or step == task.start):
                recorder.status(milestones[step if step in milestones else 0])
            self.training = True
            with trace:
                task.step(step)
            self.done = done = step + 1
            clock.images += task.batch_size
            recorder.advance(done)
            if step in milestones or done % run.log_every == 0 or done == task.steps:
                values = task.record()  # waits for the device, so that the clock is honest
                compiled = step in milestones or step == task.start
                seconds, images, waited = clock.read(counts=not compiled)
                values["images_per_second"] = images / seconds
                if not compiled:
                    values |= {"data_wait": waited / seconds, **self._utilization.read(step, images / seconds)}
                recorder.record(done, values)
                for warning in task.review():
                    recorder.warn(warning)
                clock.restart()
            elif step == task.start:
                clock.restart()
            with recorder.surviving_a_full_disk("trace.json"):
                if trace.write(last=done == task.steps):
                    recorder.status(f"traced {trace.steps} steps: {trace.path}")
                    clock.restart()
            if done % run.image_every == 0 and done < task.steps:
                with recorder.surviving_a_full_disk("pictures/"):
                    if rank() == 0:
                        with stop.abandonable():
                            path = recorder.picture(task.picture, done)
                            task.save_pictures(path)
                            recorder.show_picture(path, done)
                clock.restart()
            self._position = recorder.metrics_bytes
            owes_checkpoint |= run.checkpoint_every > 0 and done % run.checkpoint_every == 0
            # Not while steps are skipped: the checkpoints kept must not all be of a run that is being lost.
            if owes_checkpoint and not task.update.watch.last_step_was_skipped():
                self.save()
                owes_checkpoint = False
                clock.restart()
            stop.check()
        self.save()
        metrics = self._evaluate(stop)
        stop.check()
        try:
            task.conclude(recorder, metrics, clock.average, stop.abandonable())
        except OSError as error:
            raise RunStopped(
                f"all steps are done, but the results could not be written ({reason(error)}); make room, then: "
                f"{self.command}"
            ) from None
        stop.check()

    def save(self) -> bool:
        """Save a checkpoint of the steps done, unless there is one; a disk that won't take it is a warning."""
        if self.checkpoints.has(self.done):
            return True
        state = {**self.task.state(), "metrics_bytes": self._position}
        try:
            with together():
                self.recorder.sync()
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

    def _evaluate(self, stop: StopSignals) -> Metrics:
        self.training = False
        self.recorder.status("evaluating")
        images = len(self.task.val_set)
        with self.recorder.stage("evaluating, images") as show:

            def progress(done: int) -> None:
                show(min(done * num_ranks(), images), images)
                if num_ranks() == 1:  # ranks may have different numbers of batches: they agree on signals afterwards
                    stop.check()

            metrics = self.task.evaluate(progress=progress)
        values = metrics.scalars()
        self.recorder.record_evaluation(self.done, values)
        if self.config.checkpoint_every and self.checkpoints.is_best(values) and self.save():
            with self.recorder.surviving_a_full_disk("best.json"):
                self.checkpoints.mark_best(values)
        return metrics


class _Clock:
    """Images a second and waits for data, of windows that end with a reading or a restart.

    Args:
        waited: seconds of waiting since it was called last.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        self._waited = waited
        self._seconds, self._images = 0.0, 0  # of the windows that count
        self.restart()

    def restart(self) -> None:
        self._waited()
        self._begin, self.images = time.perf_counter(), 0

    def read(self, *, counts: bool) -> tuple[float, int, float]:
        """Seconds, images and seconds of waiting of the window."""
        elapsed, images, waited = time.perf_counter() - self._begin, self.images, self._waited()
        if counts:
            self._seconds, self._images = self._seconds + elapsed, self._images + images
        self.restart()
        return elapsed, images, waited

    @property
    def average(self) -> float:
        return self._images / self._seconds if self._images else float("nan")
