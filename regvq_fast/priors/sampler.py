"""Base of the samplers, one a prior, and their tools: progress, tokens to keep, a step that a GPU repeats by itself."""

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

Progress = Callable[[int, int], object]  # steps done, steps in all


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(CompileConfig, SeedConfig):
    """Settings that the samplers of all priors have; each adds its own."""

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
    """Settings of samplers that take a number of steps, each over all tokens."""

    steps: int | None = None
    """diffusion, maskgit: sampling steps. Default: the diffusion's training steps; 12 for maskgit."""


class PriorSampler(ABC):
    """Sampler of the tokens of images from a trained prior under its conditions.

    Args:
        prior: in evaluation mode, on the device it is to compute on.
        settings: of `settings_type`, or with its fields.

    Raises:
        ValueError: a setting that is out of range, or that this prior can't take.
    """

    title: ClassVar[str]
    """Name of the prior in messages and protocols."""
    conditions: ClassVar[tuple[Condition, ...]]
    """Kinds of conditions that the prior takes, the preferred first."""
    settings_type: ClassVar[type[SamplingSettings]]
    """Settings that this sampler takes."""
    preview_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of images that are good enough to look at."""
    has_states: ClassVar[bool] = False
    """True if `sample` records states: the tokens after each step, `num_codes` where there is none yet."""

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
        """Largest setting "steps", of a prior that has it."""
        return self.prior.num_steps

    @classmethod
    def preview(cls, prior: Any, seed: int) -> Self:
        """Return a sampler of images that are good enough to look at."""
        return cls(prior, cls.settings_type(seed=seed, **cls.preview_settings))

    def check(self, run: Path | None = None) -> None:
        """Raise ValueError for settings that this prior can't take, as it was trained in the folder ``run``."""
        self.settings.check()
        check_choice(self.settings.temperature)
        check_guidance(self.settings.guidance)
        if self.settings.guidance != 1.0 and self.condition == "none":
            raise ValueError(f"--guidance {self.settings.guidance:g} needs a condition, and this prior has none")

    def prepare(self, conditions: Any, source: str, *, strict: bool = False) -> Any:
        """Check conditions and bring them to the size that the prior takes.

        Args:
            conditions: semantic maps (B, H, W) uint8; B captions; labels, by name or id.
            source: of them, for messages.
            strict: refuse captions that are too long, which are cut otherwise.

        Raises:
            ValueError: conditions that the prior can't take.
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
            conditions: as `regvq_fast.priors.conditions.Conditions`, of the kind that `condition` says.
            first_image: global number of the first image.
            keep: for editing: tokens, and where to keep them, (B, h, w) int64 and bool on the prior's device.
            states: a list that gets the tokens after each step; None where `has_states` is false.
            progress: called after each step with the steps done and their number.

        Raises:
            ValueError: as :meth:`prepare`.
        """

    def describe(self) -> dict[str, Any]:
        """Return the settings by name, as plain values."""
        return {name: getattr(self.settings, name) for name in self.settings_type.names()}


@torch.no_grad()
def decode_tokens(tokenizer: VQGAN, tokens: Tensor, precision: Precision) -> Tensor:
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
        """Return prepared conditions as the network takes them; None without."""


@functools.cache
def compiled(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a network's step by `torch.compile`, once for all calls.

    Only the network: what follows it is small, and would be recompiled for each of the settings that users sweep.
    """
    return torch.compile(network, fullgraph=True)


def capture(step: Callable[[], None], *state: Tensor) -> Callable[[], None]:
    """Capture the step in a CUDA graph; each call of the result is one step.

    Args:
        step: reads and writes tensors in place, with static shapes and addresses, and without synchronization.
        state: tensors on one device that it changes and reads again: it runs once to warm up, and these are restored
            then. A tensor that the next step overwrites before it reads it may be left out.
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
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may pin memory meanwhile
            step()  # runs nothing

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def check_keep(
    keep: tuple[Tensor, Tensor] | None, batch: int, prior: TokenPrior, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return tokens and mask (B, h, w) or (B, L) as (B, L); None, None if nothing is to be kept.

    Raises:
        ValueError: other shapes, another device than the prior's `device`; on a CPU, tokens to keep that are not codes.
        TypeError: tokens that are not int64, a mask that is not bool.
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
