"""What every training task has in common: its batches, optimizers, numerical watch, records and state.

A step of any task is this: the parts of its batch go forward and backward, the watch looks at their numbers, and the
optimizers take the gradients. All that is random in it is a function of one seed a step and of global sample numbers,
so that it depends neither on how many processes share it nor on where it was interrupted.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

import torch
from torch import Tensor, nn

from regvq_fast.config import Config, override
from regvq_fast.data.loading import TimedBatches, collate, default_workers, training_batches
from regvq_fast.evaluation.shares import rank_batches, unreadable_images
from regvq_fast.files import atomic_path
from regvq_fast.models.pretrained import WEIGHTS, weights_to_bytes
from regvq_fast.precision import choose_device, choose_precision, configure_backends
from regvq_fast.ranks import is_torchrun, local_ranks, num_ranks, rank, rank_0_first, texts_of_ranks, together
from regvq_fast.training.checkpoint import Checkpoint, random_state, set_random_state
from regvq_fast.training.compilation import worth_compiling
from regvq_fast.training.memory import peak_memory
from regvq_fast.training.optimization import learning_rate
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.throughput import DeviceMonitor
from regvq_fast.training.update import Update
from regvq_fast.training.watch import OVERFLOWING, Reading

_FIRST_SAMPLES = 16


class Metrics(Protocol):
    """What an evaluation found."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name; one of them decides on the best checkpoint."""


class Task(ABC, Generic[Config]):
    """Everything a run needs, built and checked; writes nothing until it is told to.

    A subclass names its `script` and says how to build data (:meth:`build_data`) and networks (:meth:`build`), how the
    ranks train them together (:meth:`distribute`), what a part of a batch is (:meth:`inputs`) and does
    (:meth:`forward_backward`), and how the model is judged (:meth:`evaluate`), shown (:meth:`save_pictures`) and summed
    up (:meth:`finish`). `build` sets `model`, the network that is judged and saved.

    Args:
        config: the run; kept as `config` with what was left open resolved.

    Raises:
        ValueError, OSError: what is wrong with the configuration, the data or the weights, in one sentence; on all
            ranks, also where only one of them has found it.
    """

    script: ClassVar[str]
    """What a run of this task is started with."""
    picture: ClassVar[str] = "reconstructions"
    """Name of what `save_pictures` shows."""
    model: Any
    """The network that is judged and saved; has ``architecture()``."""

    def __init__(self, config: Config) -> None:
        self.check(config)
        run, optimizer = config.run, config.optimizer
        self.device = choose_device(run.device)
        self.batch_size = optimizer.batch_size
        self.rank_batch, rest = divmod(self.batch_size, num_ranks())
        if rest or self.rank_batch % optimizer.accumulate:
            by = f" and --grad-accum-steps {optimizer.accumulate}" if optimizer.accumulate > 1 else ""
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide among {num_ranks()} processes{by}: "
                f"take a multiple of {num_ranks() * optimizer.accumulate}"
            )
        self.part = self.rank_batch // optimizer.accumulate
        """Samples that go through the networks at once, in training and in evaluation."""
        with together(), rank_0_first():  # which may index the data
            self.train_set, self.val_set = self.build_data(config)
        self.steps = optimizer.steps or math.ceil(optimizer.epochs * self.train_images() / self.batch_size)
        # The GPU of a process is not one of its run.
        device = self.device.type if is_torchrun() else str(self.device)
        self.config = override(config, device=device, steps=self.steps)
        self.workers = self.default_workers() if run.workers is None else run.workers

        self.compiles, compiling = worth_compiling(run.compile, self.device, self.steps)
        configure_backends(self.device, run.deterministic)
        self.precision = choose_precision(run.amp, self.device)
        self.facts: dict[str, str] = {}
        """What is told at the start."""
        self.fingerprint = ""
        """Of the first training samples: other ones under the same name are noticed on resuming."""
        self.companions: dict[str, nn.Module] = {}
        """Modules that no optimizer trains, but whose buffers a step changes: saved, and taken back with it."""
        torch.manual_seed(run.seed)
        with together(), rank_0_first():  # which may download weights
            self.trained = self.build()
        self.model.checkpoint_activations(run.activation_checkpointing)
        self._agree()
        self.distribute()
        torch.manual_seed(run.seed + rank())  # dropout of each rank's own
        companions = self.companions.values()
        self.update = Update(self.trained, companions, self.model, optimizer, self.precision, self.device)
        self._reading = Reading({}, 0, [], 0)
        self._monitor = DeviceMonitor(self.device)

        # One seed a step, counted on the device: all that is random in a step is a function of it.
        self.seed = torch.tensor((run.seed & 0x7FFFFFFF) << 32, device=self.device)
        self._batches: TimedBatches | None = None
        self.start = 0
        """Steps done before this process."""
        self._step = 0
        self.lr = 0.0
        self.facts = self._describe() | ({"compilation": compiling} if compiling else {}) | self.facts

    # ------------------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raise ValueError for what is wrong with the configuration."""

    @abstractmethod
    def build_data(self, config: Config) -> tuple[Any, Any]:
        """Training and validation split; rank 0 before the others, so without collective operations."""

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """Make all networks, on the device; rank 0 before the others, so without collective operations.

        Returns:
            Those that are trained, by the name of their gradient norm.
        """

    @abstractmethod
    def distribute(self) -> None:
        """Make of the networks what a step calls: compiled, and with gradients that the ranks share."""

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """The batch on the device, ready to be cut into parts along its first dimension."""

    @abstractmethod
    def forward_backward(
        self, *inputs: Tensor, first_image: Tensor, loss_scale: Tensor, synchronize: bool, plain: bool = False
    ) -> dict[str, Tensor]:
        """Add the gradients of a part of a batch to the parameters.

        Args:
            inputs: the part.
            first_image: 0-dim int64, number of its first image in the batch of all ranks.
            loss_scale: 0-dim, factor of all gradients.
            synchronize: take the mean of the gradients over the ranks; False for all but the last part.
            plain: for this rank alone, and without compilation.

        Returns:
            Losses and other numbers by name (0-dim, unscaled, this rank's), the same names for each part.
        """

    @abstractmethod
    def evaluate(self, progress: Callable[[int], None] | None = None) -> Metrics:
        """Judge `eval_model` on the validation split, which the ranks share; ``progress`` gets the number done."""

    @abstractmethod
    def save_pictures(self, path: Path) -> None:
        """What `eval_model` makes, as one picture."""

    @abstractmethod
    def finish(self, recorder: Recorder, metrics: Any, rows: Mapping[str, object]) -> None:
        """Save what a finished run leaves besides its weights, and print the summary, which ends in ``rows``."""

    def trained_at(self, step: int) -> tuple[str, ...]:
        """Names in `trained` of what takes part in a step."""
        return tuple(self.trained)

    def compiles_at(self) -> dict[int, str]:
        """Steps that compile, with what to tell; they are recorded by themselves."""
        return {0: "compiling, one to three minutes"}

    def first_samples(self, field: str) -> Tensor:
        """A field of the first training samples, at most 16, of which it takes the fingerprint.

        For `build`: so a folder without a readable image is found out before anything is written.
        """
        first = self.read(self.train_set, range(min(self.batch_size, _FIRST_SAMPLES)))[field]
        self.fingerprint = hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()
        return first

    def read(self, dataset: Any, indices: Iterable[int]) -> Any:
        """Some samples of a split as a batch, as the data set has them."""
        if hasattr(dataset, "__getitems__"):
            return dataset.__getitems__(list(indices))
        return collate([dataset[index] for index in indices])

    def train_images(self) -> int:
        """Images that an epoch passes over."""
        return len(self.train_set)

    def default_workers(self) -> int:
        """Processes that load data, where ``--workers`` doesn't say."""
        return default_workers(local_ranks())

    def begin(self, folder: Path) -> None:
        """Save into the run's folder what the run needs besides its checkpoints; rank 0, before the first step."""

    def before_step(self, step: int) -> None:
        """Set what a step depends on besides weights and data."""

    def scheduled(self) -> list[str]:
        """What changes from step to step by a schedule over all steps of the run."""
        return [] if self.config.optimizer.final_lr_fraction == 1 else ["the learning rate"]

    def identity(self) -> dict[str, str]:
        """What a configuration doesn't tell of data and losses, and a resumed run must have in common."""
        return {"training images": str(len(self.train_set))}

    def describe(self) -> dict[str, str]:
        """Facts about data and model."""
        return {}

    def measure(self) -> dict[str, float]:
        """More numbers of the window that a record ends."""
        return {}

    def warnings(self) -> list[str]:
        """About what was recorded last."""
        return []

    def more_state(self) -> dict[str, Any]:
        """What else the next step depends on."""
        return {}

    def load_more(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`more_state`."""

    # ---------------------------------------------------------------------------------------------------- training

    def step(self, step: int) -> None:
        """One optimizer step on the batch that is this step's; skipped on the device where a number is not finite."""
        if self._batches is None:
            self._batches = training_batches(
                self.train_set,
                self.rank_batch,
                start=step * self.batch_size + rank() * self.rank_batch,
                stride=self.batch_size,
                workers=self.workers,
                pin_memory=self.device.type == "cuda",
            )
        batch = next(self._batches)  # first: should it fail, the task is still as after the step before
        self._step = step
        parts = self.config.optimizer.accumulate
        for module in self.trained.values():
            module.train()
        self.before_step(step)
        self.lr = learning_rate(self.config.optimizer, step, self.steps)
        self.seed += 1

        self.update.begin()
        loss_scale = self.update.loss_scale(parts)
        pieces = zip(*(tensor.chunk(parts) for tensor in self.inputs(batch)), strict=True)
        for k, piece in enumerate(pieces):
            first_image = torch.full((), rank() * self.rank_batch + k * len(piece[0]), device=self.device)
            try:
                metrics = self.forward_backward(
                    *piece, first_image=first_image, loss_scale=loss_scale, synchronize=k == parts - 1
                )
            except FloatingPointError as error:
                if num_ranks() > 1:  # the others are waiting for gradients that will not come
                    raise
                self.update.watch.break_off(error)
                break
            self.update.watch.add(metrics)
        self.update.take(self.trained_at(step), self.lr)

    def record(self) -> dict[str, float | str]:
        """Means of the numbers since the last call; training waits for the device here."""
        self._reading = reading = self.update.watch.read()
        values: dict[str, float | str] = {
            **reading.means,
            **self.measure(),
            "lr": self.lr,
            "skipped": reading.skipped,
        }
        if reading.causes:
            values["not_finite"] = ", ".join(reading.causes)
        if (scaler := self.update.scaler).is_enabled():
            values["loss_scale"] = scaler.get_scale()
        return values | self._monitor.read()

    def review(self) -> list[str]:
        """Warnings about what was recorded last.

        Raises:
            FloatingPointError: more steps in a row were skipped than ``--max-skipped`` allows.
        """
        _, skipped, causes, longest = self._reading
        if longest > (allowed := self.config.run.max_skipped):
            raise FloatingPointError(
                f"{longest} steps in a row were skipped (--max-skipped {allowed}), not finite: {', '.join(causes)}"
            )
        warnings = self.warnings()
        # Loss scaling skips steps whose scaled gradients overflow, as part of its search for a scale.
        if skipped and not (self.update.scaler.is_enabled() and OVERFLOWING.issuperset(causes)):
            steps = "a step was" if skipped == 1 else f"{skipped} steps were"
            warnings.append(f"{steps} skipped since the last record, not finite: {', '.join(causes)}")
        return warnings

    def waited(self) -> float:
        """Seconds that this process waited for data since the last call."""
        return self._batches.waited() if self._batches else 0.0

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside the weights of `eval_model`: tensors and plain values.

        All ranks must call it; they get the same.
        """
        return {
            "identity": self.identity(),
            "fingerprint": self.fingerprint,
            "others": [module.state_dict() for module in self.trained.values() if module is not self.model],
            "companions": {name: module.state_dict() for name, module in self.companions.items()},
            "seed": self.seed,
            "random": random_state(self.device),
            **self.update.state_dict(),
            **self.more_state(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, as if there had been no break; what the checkpoint held is let go.

        Raises:
            ValueError: as :meth:`Checkpoint.check`.
        """
        if checkpoint.folder is None:
            return
        checkpoint.check(self.identity(), self.fingerprint, self.steps, self.scheduled())
        state, weights = checkpoint.state, checkpoint.weights
        self.start = checkpoint.step
        self.update.load_state_dict(state, weights)
        others = [module for module in self.trained.values() if module is not self.model]
        for module, saved in zip(others, state["others"], strict=True):
            module.load_state_dict(saved)
        for name, module in self.companions.items():
            module.load_state_dict(state["companions"][name])
        self.seed.copy_(state["seed"])
        set_random_state(state["random"], self.device)
        self.load_more(state)
        weights.clear()
        del state["model"], state["others"], state["optimizers"]

    # ----------------------------------------------------------------------------------------- evaluation and results

    @property
    def eval_model(self) -> Any:
        """The model that is judged and saved: the averaged weights where there are any."""
        average = self.update.average
        return (self.model if average is None else average.module).eval()

    def validation(self) -> Any:
        """This rank's share of the validation split, in batches."""
        return rank_batches(self.val_set, self.part, self.workers, self.device)

    def conclude(
        self, recorder: Recorder, metrics: Metrics, images_per_second: float, work: AbstractContextManager[object]
    ) -> None:
        """Save the model and what else the run leaves, and print the summary: on rank 0, within ``work``."""
        unreadable = sum(map(unreadable_images, (self.train_set, self.val_set)))
        with together(), work:
            if rank() > 0:
                return
            with atomic_path(recorder.folder / WEIGHTS) as temporary:
                temporary.write_bytes(weights_to_bytes(self.eval_model.state_dict()))
            rows: dict[str, object] = {"unreadable images": unreadable} if unreadable else {}
            rows |= {"images/s": images_per_second, "peak memory (GiB)": peak_memory(self.device) / 2**30}
            since = f"minutes since step {self.start}" if self.start else "minutes"
            rows[since] = (time.monotonic() - recorder.begun) / 60
            rows["model"] = recorder.folder / WEIGHTS
            self.finish(recorder, metrics, rows)

    def _agree(self) -> None:
        """Raise ValueError where the ranks found different data or weights: their losses would differ."""
        for name, value in self.identity().items():
            found = list(dict.fromkeys(texts_of_ranks(value)))
            if len(found) > 1:
                raise ValueError(f"the processes have {' and '.join(found)} {name}: all of them need the same files")

    def _describe(self) -> dict[str, str]:
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        if num_ranks() > 1:
            device += f", {num_ranks()} processes with {self.rank_batch} images each"
        parameters = sum(p.numel() for p in self.model.parameters())
        facts = {"device": device, "precision": self.precision.reason, "model": f"{parameters / 1e6:.1f} M parameters"}
        return facts | self.describe() | self._monitor.facts
