"""The contract between the trainer and what it trains: a tokenizer, or a prior over its tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from regvq_fast.config import Config, OptimizerConfig
from regvq_fast.precision import Precision
from regvq_fast.training.recorder import Recorder

ImagesDone = Callable[[int], None]
"""Called with the number of images that this rank has evaluated so far."""


class Metrics(Protocol):
    """The result of an evaluation."""

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name, with "perceptual", "psnr" or "loss", which decides on the best checkpoint."""


class Meter(Protocol):
    """Numbers collected over the steps between two records."""

    def read(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return numbers and warnings of the window, and begin a new one. All ranks must call it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the unfinished window; its keys become top-level keys of a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the checkpoint's state."""


class Data(NamedTuple):
    """Training and validation split."""

    train: Any
    val: Any
    images_per_epoch: int
    workers: int
    """Loading processes of this rank unless ``--workers`` is given."""


@dataclass
class Networks:
    """The result of `Recipe.build`."""

    model: Any
    """The network to evaluate and save; a :class:`regvq_fast.models.model.Model`."""
    trained: dict[str, nn.Module]
    """Networks with an optimizer, the model first; the keys are the names of their gradient norms in the records."""
    first_step: dict[str, int] = field(default_factory=dict)
    """First step of each trained network; default: 0."""
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    """Optimizer settings of each trained network; default: those of the run."""
    matrices: Sequence[Tensor] = ()
    """Parameters that Muon updates instead of AdamW."""
    auxiliary: dict[str, nn.Module] = field(default_factory=dict)
    """Modules without an optimizer whose buffers a step changes."""
    saved_beside: dict[str, Any] = field(default_factory=dict)
    """Frozen models to save into the run's folder before the first step, by the name of their subfolder."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Lines printed at the start and saved in config.json."""
    identity: dict[str, str] = field(default_factory=dict)
    """Values that all ranks and a resumed run must share and that the configuration does not record."""
    fingerprint: str = ""
    """Hash of the first training samples: resuming warns if it differs."""
    scheduled: tuple[str, ...] = ()
    """Quantities, other than the learning rate, that follow a schedule over all steps of the run."""
    meter: Meter | None = None
    skeleton: nn.Module | None = None
    """See `regvq_fast.training.sharding`; given if `Recipe.distribute` will shard the model."""

    def active(self, step: int) -> tuple[str, ...]:
        """Return the names of the trained networks that take part in a step."""
        return tuple(name for name in self.trained if self.first_step.get(name, 0) <= step)

    def state_dict(self) -> dict[str, Any]:
        """Return their part of a checkpoint, without the model's weights; all ranks must call it."""
        return {
            "fingerprint": self.fingerprint,
            "others": [module.state_dict() for module in list(self.trained.values())[1:]],
            "companions": {name: module.state_dict() for name, module in self.auxiliary.items()},
            **(self.meter.state_dict() if self.meter else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for module, saved in zip(list(self.trained.values())[1:], state["others"], strict=True):
            module.load_state_dict(saved)
        for name, module in self.auxiliary.items():
            module.load_state_dict(state["companions"][name])
        if self.meter:
            self.meter.load_state_dict(state)


class Step(NamedTuple):
    """Arguments of one micro-batch's forward and backward pass."""

    number: int
    """Optimizer steps done before this one."""
    seed: Tensor
    """0-dim int64 on the device; all randomness of the step is a function of it and of global sample numbers."""
    first_image: Tensor
    """0-dim int64 on the device: index of the micro-batch's first image in the batch of all ranks."""
    loss_scale: Tensor
    """0-dim factor of all gradients: loss scaling and gradient accumulation."""
    synchronize: bool = True
    """Average the gradients over the ranks; False for all but the last micro-batch."""
    plain: bool = False
    """Use the networks as they are, neither compiled nor distributed."""


class Recipe(ABC, Generic[Config]):
    """A kind of training run. The trainer calls `open_data`, `build` and `distribute` once each, in this order.

    Args:
        device: of the networks.
        precision: of the networks.
        micro_batch: images per forward pass, in training and in evaluation.
    """

    command: ClassVar[str]
    """The command of `regvq` that starts such a run."""
    usage: ClassVar[str] = ""
    """Text at the top of its help."""
    image_name: ClassVar[str] = "reconstructions"
    """File name, without suffix, of the images that `save_images` saves."""

    def __init__(self, device: torch.device, precision: Precision, micro_batch: int) -> None:
        self.device, self.precision, self.micro_batch = device, precision, micro_batch

    @classmethod
    def begin(cls, config: Config, source: str, quantizer: str | None) -> tuple[Config, Callable[[Config], Config]]:
        """Start a run from weights, if the command has ``--init-from``. Called before its flags are parsed.

        Args:
            config: a preset.
            source: value of ``--init-from``.
            quantizer: value of ``--quantizer``; None if it is not given.

        Returns:
            The defaults of the flags, and a function that completes the parsed configuration.

        Raises:
            OSError, ValueError: the weights can't be used; from the function: flags contradict them.
        """
        return config, lambda given: given

    @abstractmethod
    def open_data(self, config: Config) -> Data:
        """Open both splits. Rank 0 runs it first, so it must not call collective operations.

        Raises:
            ValueError, OSError: the data can't be used; the message is one sentence.
        """

    @abstractmethod
    def build(self, config: Config) -> tuple[Config, Networks]:
        """Build all networks on the device. Rank 0 runs it first, as `open_data`.

        Returns:
            The configuration with open values resolved, and the networks.
        """

    @abstractmethod
    def distribute(self, compile: bool) -> None:
        """Compile the networks if ``compile``, and set up gradient averaging over the ranks, or shard the model."""

    @abstractmethod
    def step(self, batch: Any, now: Step) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to the parameters.

        Returns:
            Losses and other numbers of this rank by name (0-dim, unscaled), with the same names for each micro-batch.

        Raises:
            FloatingPointError: an op got a non-finite value (CPU only).
        """

    @abstractmethod
    def evaluate(self, model: Any, batches: Any, progress: ImagesDone | None = None) -> Metrics:
        """Evaluate the model on this rank's batches of the validation split; return the result over all ranks."""

    @abstractmethod
    def save_images(self, model: Any, path: Path) -> None:
        """Save a grid of the model's images for validation samples."""

    @abstractmethod
    def summarize(self, model: Any, metrics: Any, recorder: Recorder) -> tuple[dict[str, object], dict[str, Path]]:
        """Save the images of a finished run.

        Args:
            model: the evaluated model.
            metrics: of the last evaluation.
            recorder: gives the images' paths, and shows the progress of long work.

        Returns:
            Numbers and images of the summary by name.
        """
