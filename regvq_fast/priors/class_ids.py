"""Base classes of priors conditioned on class ids: model, settings, recipe and sampler.

A semantic map is K = h' * w' class ids and a label is one id. Without a condition there is one id, always that of the
null condition of classifier-free guidance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regvq_fast.config import read_config
from regvq_fast.config.sections import OptionalInt
from regvq_fast.data.tokens import TokenDataset, majority_vote
from regvq_fast.models.model import Model
from regvq_fast.models.transformer import flat_ids, grid_shape
from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.priors.conditions import Condition
from regvq_fast.priors.config import PriorConfig, TransformerConfig
from regvq_fast.priors.prior_recipe import PriorRecipe
from regvq_fast.priors.sampler import PriorSampler
from regvq_fast.settings import check_probabilities

_MAX_CLASSES = 256
_LOSS_ELEMENTS = 1 << 24  # logits of a chunk of the loss; 64 MiB in fp32


@dataclass(frozen=True)
class ClassIdModelConfig(TransformerConfig):
    """Transformer under class ids."""

    num_classes: OptionalInt = None
    """Class ids of the maps. Default: those of the cache or data set."""


class ClassIdModel(Model):
    """A model of L tokens under K ids.

    Args:
        num_codes: N, the codes that tokens name.
        num_classes: ids of the condition; the id `num_classes` is the null condition. 0: unconditional.
        token_shape: (h, w) of an image's tokens.
        condition_shape: (h', w') of a map; None: `token_shape`.
        label_names: names of the `num_classes` labels; empty: the condition is a map.

    Raises:
        ValueError: a shape or number out of range.
    """

    def __init__(
        self,
        num_codes: int,
        num_classes: int,
        token_shape: Sequence[int],
        condition_shape: Sequence[int] | None,
        label_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.token_shape = grid_shape("token_shape", token_shape)
        self.label_names = tuple(label_names)
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative (0: unconditional), got {num_classes}")
        if self.label_names and len(self.label_names) != num_classes:
            raise ValueError(f"there are {len(self.label_names)} label_names, but num_classes is {num_classes}")
        self.conditioned_on: Condition = "none" if num_classes == 0 else "label" if label_names else "segmentation"
        whole = self.token_shape if condition_shape is None else grid_shape("condition_shape", condition_shape)
        self.condition_shape = whole if self.conditioned_on == "segmentation" else (1, 1)
        self.num_codes, self.num_classes = num_codes, num_classes
        self.num_tokens, self.condition_length = math.prod(self.token_shape), math.prod(self.condition_shape)

    def condition_ids(self, conditions: Tensor) -> Tensor:
        """Return conditions as ids (B, K) int64.

        Args:
            conditions: maps (B, h', w') of any integer type, labels (B,), or (B, 0) of an unconditional prior.
        """
        if self.conditioned_on == "none":
            return torch.zeros(len(conditions), 1, dtype=torch.int64, device=conditions.device)
        return conditions.long().view(len(conditions), -1)

    def with_null(self, condition: Tensor) -> Tensor:
        """Return the ids of B conditions followed by B null conditions."""
        return torch.cat([condition, torch.full_like(condition, self.num_classes)])

    def drop_condition(
        self, condition: Tensor, probability: float, *, seed: Tensor, first_image: int | Tensor
    ) -> Tensor:
        """Replace the conditions of some images by the null condition, which trains it for guidance.

        Args:
            condition: (B, h', w') or (B, K) int64.
            probability: of an image losing its condition.
            seed, first_image: the choice is a function of (seed, global number of the image).

        Returns:
            (B, K) int64.

        Raises:
            ValueError: a probability outside [0, 1].
        """
        check_probabilities({"condition_dropout": probability})
        condition = self._flat_condition(condition)
        if probability == 0.0:
            return condition
        images = torch.arange(len(condition), device=condition.device) + first_image
        dropped = row_words(seed, images, Stream.DROPPED_CONDITIONS) < int(probability * 2**32)
        return condition.masked_fill(dropped[:, None], self.num_classes)

    def _flat_tokens(self, tokens: Tensor) -> Tensor:
        return flat_ids("tokens", tokens, self.token_shape, self.num_codes)

    def _flat_condition(self, condition: Tensor) -> Tensor:
        return flat_ids("condition", condition, self.condition_shape, self.num_classes + 1)

    def _by_chunks(self, loss: Callable[..., Tensor], hidden: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the loss of hidden rows (M, C) and targets (M,) for each chunk of rows.

        Only the logits of one chunk are in memory at a time; with several chunks, backward recomputes them.
        """
        rows = max(1, _LOSS_ELEMENTS // self.num_codes)
        if len(targets) <= rows:
            return [loss(hidden, targets)]
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return [checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]


def check_conditions(ids: Tensor, device: torch.device) -> None:
    """Raise ValueError for conditions (B, ...) on another device than the prior's, or if there are none."""
    if ids.device != device:
        raise ValueError(f"the condition is on {ids.device} but the prior on {device}; move them to one device")
    if not len(ids):
        raise ValueError(f"there must be at least one condition, got {tuple(ids.shape)}")


Config = TypeVar("Config", bound=PriorConfig)


class ClassIdRecipe(PriorRecipe[Config]):
    """Training of a `ClassIdModel`."""

    def arguments(self) -> dict[str, Any]:
        """Return the model's arguments: tokens and condition from the data, sizes from the configuration."""
        model: Any = self.config.model  # type: ignore[attr-defined]
        return {
            "num_codes": self.tokenizer.quantize.num_codes,
            "num_classes": self._num_classes() if self.conditioned_on == "segmentation" else len(self.label_names),
            "label_names": self.label_names,
            "token_shape": self.tokenizer.token_shape,
            "width": model.width,
            "depth": model.depth,
            "heads": model.heads,
            "dropout": model.dropout,
        }

    def _num_classes(self) -> int:
        """Return the number of class ids in maps."""
        train = self.data.train
        cached = isinstance(train, TokenDataset)
        found = (train.info if cached else train).num_classes
        given = self.config.model.num_classes  # type: ignore[attr-defined]
        if given is None and found is None:
            raise ValueError("--on-the-fly does not know the classes of these images: give --num-classes")
        if given is not None and not (found or 1) <= given <= _MAX_CLASSES:
            source = self.config.tokens.cache if cached else train.title
            there = f" ({source} has {found} classes)" if found else ""
            raise ValueError(
                f"--num-classes must be at least {found or 1} and at most {_MAX_CLASSES}, got {given}{there}"
            )
        if found is None:  # images whose maps have other ids count as unreadable
            train.num_classes = self.data.val.num_classes = given
        return given or found or 0


class ClassIdSampler(PriorSampler):
    """Sampler of a `ClassIdModel`."""

    conditions = ("segmentation", "label", "none")
    config_type: ClassVar[type[PriorConfig]]
    """Class of the prior's configuration."""

    prior: ClassIdModel

    def check(self, run: Path | None = None) -> None:
        super().check(run)
        if run is not None and self.settings.guidance != 1.0 and self._null_is_untrained(run):
            raise ValueError(
                f"--guidance {self.settings.guidance:g} needs the null condition, which {run} was trained without "
                "(--condition-dropout 0): leave it out, or train one with --condition-dropout 0.1"
            )

    def _null_is_untrained(self, run: Path) -> bool:
        """Return whether a prior was trained without its null condition; False if its folder does not say."""
        try:
            config: Any = read_config(run, self.config_type)
        except ValueError:
            return False
        return config.model.condition_dropout == 0

    def prepare(self, conditions: Any, source: str, *, strict: bool = False) -> Tensor:
        """Reduce semantic maps (B, H, W) uint8 to the prior's grid (B, h', w') by majority vote; look up labels.

        Raises:
            ValueError: an unknown id or label, or maps smaller than the grid.
        """
        if self.condition != "segmentation":
            return super().prepare(conditions, source)
        shape, least = conditions.shape[1:], self.prior.condition_shape
        if any(side < cells for side, cells in zip(shape, least, strict=False)):
            given, needed = (" x ".join(map(str, sides)) for sides in (shape, least))
            raise ValueError(f"{source} gives {given} pixels; the prior needs at least {needed}: take a larger map")
        maps = conditions if shape == least else majority_vote(conditions, least)
        if (largest := int(maps.max())) >= self.prior.num_classes:
            raise ValueError(
                f"{source} holds the class id {largest}; the prior knows ids below {self.prior.num_classes}"
            )
        return maps

    def ids(self, conditions: Any) -> Tensor:
        """Return conditions as ids (B, K) int64 on the prior's device."""
        device = next(self.prior.parameters()).device
        return self.prior.condition_ids(self.prepare(conditions, "a condition").to(device))
