"""Base class of the samplers of priors, and their helpers: tokens to keep, compilation, CUDA graphs."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from regvq_fast.config.runtime import CompileConfig, SeedConfig
from regvq_fast.data.transforms import to_uint8
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import Precision
from regvq_fast.priors.choosing import check_choice, check_guidance
from regvq_fast.priors.conditions import Condition, label_ids

Progress = Callable[[int, int], object]  # called with steps done and in total


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(CompileConfig, SeedConfig):
    """Settings of the samplers of all priors; each adds its own."""

    temperature: float = 1.0
    """Temperature of the choice of a token; 0 takes the most likely one."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1: none."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the fields."""
        return tuple(item.name for item in fields(cls))


@dataclass(frozen=True, kw_only=True)
class SteppedSettings(SamplingSettings):
    """Settings of samplers with a number of steps, each over all tokens."""

    steps: int | None = None
    """diffusion, maskgit: steps to take. Not given: as many as a diffusion was trained with; 12."""


class PriorSampler(ABC):
    """Sampler of the tokens of images from a trained prior under its conditions.

    Args:
        prior: in evaluation mode, on its final device.
        settings: of `settings_type`, or with its fields.

    Raises:
        ValueError: a setting out of range, or that this prior does not support.
    """

    title: ClassVar[str]
    """Name of the prior in messages and protocols."""
    conditions: ClassVar[tuple[Condition, ...]]
    """Kinds of conditions that the prior supports, by preference."""
    settings_type: ClassVar[type[SamplingSettings]]
    """Class of the settings."""
    preview_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings for fast previews."""
    has_states: ClassVar[bool] = False
    """True if `sample` records states: the tokens after each step, with masked ones `num_codes`."""

    prior: Any
    settings: Any

    def __init__(self, prior: Any, settings: SamplingSettings) -> None:
        self.prior, self.settings = prior, settings
        self.check()

    @property
    def condition(self) -> Condition:
        """Kind of condition that the prior was built for."""
        return self.prior.conditioned_on

    @property
    def most_steps(self) -> int:
        """Largest value of the setting "steps", if the prior has it."""
        return self.prior.num_steps

    @classmethod
    def preview(cls, prior: Any, seed: int) -> Self:
        """Return a sampler with settings for fast previews."""
        return cls(prior, cls.settings_type(seed=seed, **cls.preview_settings))

    def check(self, run: Path | None = None) -> None:
        """Raise ValueError for settings that this prior, trained in the folder ``run``, does not support."""
        self.settings.check()
        check_choice(self.settings.temperature)
        check_guidance(self.settings.guidance)
        if self.settings.guidance != 1.0 and self.condition == "none":
            raise ValueError(f"--guidance {self.settings.guidance:g} needs a condition, and this prior has none")

    def prepare(self, conditions: Any, source: str, *, strict: bool = False) -> Any:
        """Check conditions and resize maps to the prior's grid.

        Args:
            conditions: semantic maps (B, H, W) uint8; B captions; labels, by name or id.
            source: of the conditions, for messages.
            strict: refuse long captions instead of truncating them.

        Raises:
            ValueError: invalid conditions.
        """
        if self.condition == "label":
            return label_ids(conditions, self.prior.label_names, source)
        return conditions

    @abstractmethod
    def sample(
        self,
        conditions: Any,
        first_image: int = 0,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample the tokens (B, h, w) int64 of one image under each condition.

        Args:
            conditions: as `regvq_fast.priors.conditions.Conditions`, of the kind `condition`.
            first_image: global number of the first image.
            keep: for editing: tokens, and a mask of those to keep, (B, h, w) int64 and bool on the prior's device.
            states: a list to which the tokens after each step are appended; None if `has_states` is False.
            progress: called after each step with the steps done and in total.

        Raises:
            ValueError: as :meth:`prepare`.
        """

    def describe(self) -> dict[str, Any]:
        """Return the settings by name, as plain values."""
        return {name: getattr(self.settings, name) for name in self.settings_type.names()}


@torch.no_grad()
def decode_images(tokenizer: VQGAN, tokens: Tensor, precision: Precision) -> Tensor:
    """Decode tokens (B, h, w) int64 on the tokenizer's device to images (B, 3, H, W) uint8."""
    with precision.autocast():
        return to_uint8(tokenizer.decode_indices(tokens).float())


class TokenPrior(Protocol):
    """Attributes of every prior."""

    token_shape: tuple[int, int]
    num_tokens: int
    num_codes: int

    @property
    def conditioned_on(self) -> Condition:
        """Kind of condition."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels by id; empty unless images are conditioned on them."""

    def condition_ids(self, conditions: Any) -> Tensor | None:
        """Return prepared conditions as inputs of the network; None without a condition."""


@functools.cache
def compiled(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a network's step by `torch.compile`, once for all calls.

    The rest of the sampler is not compiled: it is small, and would be recompiled for every setting.
    """
    return torch.compile(network, fullgraph=True)


def capture(step: Callable[[], None], *state: Tensor) -> Callable[[], None]:
    """Capture a step in a CUDA graph; each call of the result runs one step.

    Args:
        step: reads and writes tensors in place, with static shapes and addresses and without synchronization.
        state: tensors on one device that a step changes and the next one reads: they are restored after a warm-up step.
            Tensors that a step overwrites before reading may be left out.
    """
    device = state[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = [tensor.clone() for tensor in state]
            step()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may pin memory
            step()  # recorded, not run

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def check_keep(
    keep: tuple[Tensor, Tensor] | None, batch: int, prior: TokenPrior, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return tokens and mask, given as (B, h, w) or (B, L), as (B, L); None, None without tokens to keep.

    Raises:
        ValueError: other shapes, another device than the prior's `device`; on a CPU, kept tokens that are not codes.
        TypeError: tokens that are not int64, or a mask that is not bool.
    """
    if keep is None:
        return None, None
    (height, width), length = prior.token_shape, prior.num_tokens
    flat = []
    for name, tensor, dtype in zip(("tokens", "mask"), keep, (torch.int64, torch.bool), strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"the {name} to keep must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        if tensor.shape not in ((batch, height, width), (batch, length)):
            wanted = f"({batch}, {height}, {width}) or ({batch}, {length})"
            raise ValueError(f"the {name} to keep must be {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"the {name} to keep is on {tensor.device} but the prior on {device}")
        flat.append(tensor.reshape(batch, length))
    given, kept = flat
    if device.type == "cpu" and bool(kept.any()):  # on a GPU it would force a synchronization
        smallest, largest = (int(bound) for bound in given[kept].aminmax())
        if smallest < 0 or largest >= prior.num_codes:
            wanted = f"[0, {prior.num_codes})"
            raise ValueError(f"the tokens to keep must lie in {wanted}, got ids from {smallest} to {largest}")
    return given, kept
