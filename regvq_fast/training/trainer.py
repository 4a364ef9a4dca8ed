"""One training run, from building to the summary.

A step of any recipe: each micro-batch goes forward and backward, then the optimizers take the gradients unless a loss
or gradient is non-finite. All randomness of a step is a function of one seed and of global sample numbers, so a run
depends neither on the number of processes nor on where it was interrupted.
"""

import math
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

import torch

from regvq_fast import ranks
from regvq_fast.config import Config, override
from regvq_fast.data.loading import TimedBatches, read_samples, split_batch, training_batches
from regvq_fast.data.workers import WorkersFailed
from regvq_fast.evaluation.shares import rank_batches, unreadable_images
from regvq_fast.files import atomic_path
from regvq_fast.invocation import command, launched
from regvq_fast.models.hub import PICTURES
from regvq_fast.models.pretrained import WEIGHTS, weights_to_bytes
from regvq_fast.precision import choose_device, choose_precision, configure_backends
from regvq_fast.training.checkpoint import Checkpoint, Checkpoints
from regvq_fast.training.compilation import worth_compiling
from regvq_fast.training.memory import peak_memory
from regvq_fast.training.optimization import Optimization, micro_batch_size
from regvq_fast.training.optimizers import learning_rate
from regvq_fast.training.recipe import Metrics, Recipe, Step
from regvq_fast.training.recorder import Recorder, reason
from regvq_fast.training.sharding import gathered, whole
from regvq_fast.training.stopping import Interrupted, RunStopped, StopSignals, explained, remedy
from regvq_fast.training.throughput import Clock, DeviceMonitor, Utilization, count_flops
from regvq_fast.training.trace import StepTrace
from regvq_fast.training.trackers import check_trackers


class Trainer(Generic[Config]):
    """A run of a recipe, built and checked. :func:`regvq_fast.training.opening.open_run` gives it a folder.

    Args:
        kind: the recipe.
        config: of the run; `self.config` is the same with open values resolved.

    Raises:
        ValueError, OSError: the configuration, the data or the weights can't be used. On all ranks, even if only one
            meets the error.
    """

    recorder: Recorder
    """Set by `open_run`, as are the checkpoints."""
    checkpoints: Checkpoints

    def __init__(self, kind: type[Recipe[Config]], config: Config) -> None:
        config.check()
        run, optimizer = config.run, config.optimizer
        check_trackers(run.trackers)
        self.device = choose_device(run.device)
        self.batch_size = optimizer.batch_size
        self.micro_batch = micro_batch_size(optimizer)
        self.rank_batch = self.micro_batch * optimizer.accumulate
        configure_backends(self.device, run.deterministic)
        self.precision = choose_precision(run.amp, self.device)
        self.recipe = kind(self.device, self.precision, self.micro_batch)
        with ranks.raise_on_all_ranks(), ranks.rank_0_first():  # which may index the data
            self.data = self.recipe.open_data(config)
        self.steps = optimizer.steps or math.ceil(optimizer.epochs * self.data.images_per_epoch / self.batch_size)
        self.workers = self.data.workers if run.workers is None else run.workers
        self.compiles, why_not = worth_compiling(run.compile, self.device, self.steps)

        torch.manual_seed(run.seed)
        # Under torchrun each process has its own GPU number, which is not part of the run.
        device = self.device.type if ranks.is_torchrun() else str(self.device)
        with ranks.raise_on_all_ranks(), ranks.rank_0_first():  # which may download weights
            self.config, self.networks = self.recipe.build(override(config, device=device, steps=self.steps))
        self.networks.model.checkpoint_activations(run.activation_checkpointing)
        self.identity = {"training images": str(len(self.data.train)), **self.networks.identity}
        ranks.check_agreement(self.identity)
        self.recipe.distribute(self.compiles)
        torch.manual_seed(run.seed + ranks.rank())  # dropout differs between ranks
        self.optimization = Optimization(self.networks, optimizer, self.precision, self.device)

        self._monitor = DeviceMonitor(self.device)
        self.utilization = Utilization(self.device, self.precision.dtype, self._flops_per_image, self.networks.active)
        self.metadata = self._describe() | ({"compilation": why_not} if why_not else {})
        # One seed a step, counted on the device.
        self.seed = torch.tensor((run.seed & 0x7FFFFFFF) << 32, device=self.device)
        self.start = self.done = 0
        """Steps done before this process started, and so far."""
        self.lr, self.evaluating = 0.0, False
        self._batches: TimedBatches | None = None
        self._stop: StopSignals | None = None
        self._metrics_bytes = 0  # size of metrics.jsonl after the last step, before any evaluation there
        self._unsaved: int | None = None  # last step whose checkpoint could not be written

    def _describe(self) -> dict[str, str]:
        device, driver = self._monitor.describe()
        if ranks.world_size() > 1:
            device += f", {ranks.world_size()} processes with {self.rank_batch} images each"
        model = f"{sum(p.numel() for p in self.networks.model.parameters()) / 1e6:.1f} M parameters"
        found = {"device": device, "precision": self.precision.reason, "model": model}
        return found | self.networks.metadata | driver

    def fit(self) -> None:
        """Take the remaining steps, then evaluate, save the model and print the summary.

        Raises:
            RunStopped: the run ended early; the message says why, and how to continue.
        """
        with self.recorder, StopSignals(lambda: remedy(self)) as stop:
            self._stop = stop
            try:
                self._loop(stop)
            except RunStopped:
                raise
            except Exception as error:
                self._end_workers()
                # Both happen between steps, so the state can be saved; other ranks don't see a worker's failure.
                if isinstance(error, Interrupted) or (isinstance(error, WorkersFailed) and ranks.world_size() == 1):
                    self.save()
                raise explained(error, self) from error
            finally:
                self._end_workers()

    def _end_workers(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _loop(self, stop: StopSignals) -> None:
        run, recorder = self.config.run, self.recorder
        compiling = {0: "compiling, one to three minutes"}
        if self.compiles:
            joins = self.networks.first_step.items()
            compiling |= {step: f"compiling the {name.removeprefix('grad_norm_')}" for name, step in joins if step}
        recorder.status("starting")
        trace = StepTrace(recorder, range(self.start, self.steps), run.trace_steps, self.device)
        checkpoint_due, self._metrics_bytes = False, recorder.metrics_bytes
        clock = Clock(lambda: self._batches.waited() if self._batches else 0.0)
        for step in range(self.start, self.steps):
            # Before the step, not after the last one: a run resumed at this step evaluates, too.
            if step and run.eval_every and step % run.eval_every == 0:
                self.evaluate(stop)
                clock.restart()
            first_of_kind = step in compiling or step == self.start
            if first_of_kind and self.compiles:
                recorder.status(compiling.get(step, compiling[0]))
            with trace:
                self.step(step)
            self.done = done = step + 1
            clock.images += self.batch_size
            recorder.advance(done)
            if step in compiling or done % run.log_every == 0 or done == self.steps:
                values, warnings = self.record()  # waits for the device, so the clock below is right
                values["images_per_second"], waiting = clock.read(representative=not first_of_kind)
                if not first_of_kind:
                    values |= {"data_wait": waiting, **self.utilization(step, float(values["images_per_second"]))}
                recorder.record(done, values)
                for warning in warnings + self.optimization.warnings(run.max_skipped):
                    recorder.warn(warning)
                clock.restart()
            elif step == self.start:
                clock.restart()
            if trace.write():
                clock.restart()
            if done % run.image_every == 0 and done < self.steps:
                self.save_images(stop)
                clock.restart()
            self._metrics_bytes = recorder.metrics_bytes
            checkpoint_due |= run.checkpoint_every > 0 and done % run.checkpoint_every == 0
            # Not after a skipped step: if a run diverges, the last good checkpoints must stay.
            if checkpoint_due and not self.optimization.watch.last_step_was_skipped():
                self.save()
                checkpoint_due = False
                clock.restart()
            stop.check()
        self.save()
        metrics = self.evaluate(stop)
        stop.check()
        try:
            self.conclude(metrics, clock.average, stop)
        except OSError as error:
            raise RunStopped(
                f"all steps are done, but the results could not be written ({reason(error)}); make room, then: "
                f"{self.command}"
            ) from None
        if recorder.removed is not None:
            raise RunStopped(
                f"all steps are done and {recorder.folder} has the model, but the folder was removed before step "
                f"{recorder.removed}: its earlier checkpoints and images are lost"
            )
        stop.check()

    def step(self, number: int) -> None:
        """Take one optimizer step; skipped on the device if a loss or gradient is non-finite."""
        if self._batches is None:
            self._batches = training_batches(
                self.data.train,
                self.rank_batch,
                start=number * self.batch_size + ranks.rank() * self.rank_batch,
                stride=self.batch_size,
                workers=self.workers,
                pin_memory=self.device.type == "cuda",
            )
        with self._leaving_at_once():
            batch = next(self._batches)  # first: if it fails, the step has changed nothing
        if self._stop is not None and ranks.world_size() == 1:
            self._stop.check()
        self.evaluating = False
        micro_batches = self.config.optimizer.accumulate
        for module in self.networks.trained.values():
            module.train()
        self.seed += 1

        self.optimization.begin()
        loss_scale = self.optimization.loss_scale(micro_batches)
        for k, micro_batch in enumerate(split_batch(batch, micro_batches)):
            first_image = torch.full((), ranks.rank() * self.rank_batch + k * self.micro_batch, device=self.device)
            now = Step(number, self.seed, first_image, loss_scale, synchronize=k == micro_batches - 1)
            try:
                metrics = self.recipe.step(micro_batch, now)
            except FloatingPointError as error:
                if ranks.world_size() > 1:  # the others wait for this rank's gradients
                    raise
                self.optimization.watch.abort(error)
                break
            self.optimization.watch.add(metrics)
        run, own = self.config.optimizer, self.networks.optimizers
        self.lr = learning_rate(run, number, self.steps)
        active = self.networks.active(number)
        self.optimization.step({name: learning_rate(own.get(name, run), number, self.steps) for name in active})

    def _leaving_at_once(self) -> AbstractContextManager[None]:
        """Leave the block at a signal, even while it waits; with several ranks don't, since the others wait."""
        return nullcontext() if self._stop is None or ranks.world_size() > 1 else self._stop.abandonable()

    def record(self) -> tuple[dict[str, float | str], list[str]]:
        """Return means of the numbers since the last call, and warnings about them; waits for the device."""
        values, warnings = self.optimization.read(), list[str]()
        if self.networks.meter is not None:
            numbers, warnings = self.networks.meter.read(self.done)
            values |= numbers
        return values | {"lr": self.lr} | self._monitor.read(), warnings

    def _flops_per_image(self, number: int) -> float:
        """Count a step's operations in an extra pass, and undo its effects."""
        batch, device = read_samples(self.data.train, range(2)), self.device  # batch norm needs two
        zero, one = torch.zeros((), dtype=torch.int64, device=device), torch.ones((), device=device)
        self.optimization.begin()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            now = Step(number, self.seed, zero, one, synchronize=False, plain=True)
            flops = count_flops(lambda: self.recipe.step(batch, now))
        self.optimization.undo()
        return flops / 2

    @property
    def eval_model(self) -> Any:
        """The model to evaluate and save: the averaged weights if there are any.

        All ranks must access it. A sharded model is gathered into a copy: release it soon.
        """
        return whole(self.optimization.judged, self.networks.skeleton).eval()

    def save_images(self, stop: StopSignals) -> None:
        """Save images that the model makes of validation samples; on rank 0."""
        model, recorder = self.eval_model, self.recorder
        if ranks.rank() == 0:
            with recorder.surviving_a_full_disk(f"{PICTURES}/"), stop.abandonable():
                path = recorder.image_path(self.recipe.image_name, self.done)
                self.recipe.save_images(model, path)
                recorder.show_image(path, self.done)

    def evaluate(self, stop: StopSignals) -> Metrics:
        """Evaluate on the validation split, record the result, and mark the checkpoint if it is the best one."""
        self.evaluating = True
        self.recorder.status("evaluating")
        images = len(self.data.val)
        with self.recorder.stage("evaluating, images") as show:

            def progress(done: int) -> None:
                show(min(done * ranks.world_size(), images), images)
                if ranks.world_size() == 1:  # a collective: ranks with fewer batches would not call it
                    stop.check()

            batches = rank_batches(self.data.val, self.micro_batch, self.workers, self.device)
            with self._leaving_at_once():
                metrics = self.recipe.evaluate(self.eval_model, batches, progress)
        stop.check()
        values = metrics.scalars()
        self.recorder.record_evaluation(self.done, values)
        if self.config.run.checkpoint_every and self.checkpoints.is_best(values) and self.save():
            with self.recorder.surviving_a_full_disk("best.json"):
                self.checkpoints.mark_best(values)
        return metrics

    def conclude(self, metrics: Metrics, images_per_second: float, stop: StopSignals) -> None:
        """Save the model and the images of a finished run, and print the summary; on rank 0."""
        unreadable, model = sum(map(unreadable_images, self.data[:2])), self.eval_model
        with ranks.raise_on_all_ranks(), stop.abandonable():
            if ranks.rank() > 0:
                return
            recorder = self.recorder
            with atomic_path(recorder.folder / WEIGHTS) as temporary:
                temporary.write_bytes(weights_to_bytes(model.state_dict()))
            numbers, images = self.recipe.summarize(model, metrics, recorder)
            for path in images.values():
                recorder.show_image(path, self.steps)
            since = f"minutes since step {self.start}" if self.start else "minutes"
            rows: dict[str, object] = {
                **numbers,
                **({"unreadable images": unreadable} if unreadable else {}),
                "images/s": images_per_second,
                "peak memory (GiB)": peak_memory(self.device) / 2**30,
                since: (time.monotonic() - recorder.begun) / 60,
                "model": recorder.folder / WEIGHTS,
            }
            recorder.summarize(f"{recorder.folder}", rows | images)
            recorder.check_folder(self.done)
            recorder.sync()
            if not (recorder.folder / WEIGHTS).exists():
                raise FileNotFoundError(f"{recorder.folder} was removed meanwhile")

    def save(self) -> bool:
        """Save a checkpoint of the steps done, if there is none; return False, after a warning, on a full disk."""
        if self.checkpoints.has(self.done):
            return True
        self.recorder.check_folder(self.done)
        state = {**self.state(), "metrics_bytes": self._metrics_bytes}
        try:
            with ranks.raise_on_all_ranks():
                self.recorder.sync()
            weights = gathered(self.optimization.judged.state_dict())
            self.checkpoints.save(self.done, self.recorder.description, weights, state)
        except OSError as error:
            if self._unsaved != self.done:
                self.recorder.warn(
                    f"the checkpoint of step {self.done} could not be saved ({reason(error)}); the run can be resumed "
                    f"from {self.checkpoints.newest_name}"
                )
            self._unsaved = self.done
            return False
        return True

    def state(self) -> dict[str, Any]:
        """Return everything the next step depends on, except the weights of `eval_model`; a collective call."""
        found = {"identity": self.identity, "seed": self.seed, "random": ranks.random_state(self.device)}
        return found | self.networks.state_dict() | self.optimization.state_dict()

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint as if the run had not stopped, and release the checkpoint's tensors.

        Raises:
            ValueError: as :meth:`Checkpoint.check`.
        """
        if checkpoint.folder is None:
            return
        lr = ("the learning rate",) if self.config.optimizer.decays else ()
        checkpoint.check(self.identity, self.networks.fingerprint, self.steps, (*lr, *self.networks.scheduled))
        self.start = self.done = checkpoint.step
        self.optimization.load_state_dict(checkpoint.state, checkpoint.weights)
        self.networks.load_state_dict(checkpoint.state)
        self.seed.copy_(checkpoint.state["seed"])
        ranks.set_random_state(checkpoint.state["random"], self.device)
        checkpoint.release()

    @property
    def command(self) -> str:
        """The command that continues the run."""
        name = self.recipe.command
        typed = launched(name, ranks.local_world_size()) if ranks.is_torchrun() else command(name)
        return f"{typed} --resume --out {shlex.quote(str(self.recorder.folder))}"
