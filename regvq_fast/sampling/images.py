"""Images that a trained prior draws under its conditions, semantic maps or captions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from regvq_fast.config import ARConfig, read_config
from regvq_fast.config.runtime import CompileConfig, SeedConfig
from regvq_fast.data.pictures import Field
from regvq_fast.data.samples import Batch
from regvq_fast.data.tokens import majority_vote
from regvq_fast.data.transforms import to_uint8
from regvq_fast.models.model import read_model
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.token_transformer import TokenTransformer
from regvq_fast.models.vq_diffusion import VQDiffusion
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.precision import Precision
from regvq_fast.sampling.autoregressive import sample_autoregressive
from regvq_fast.sampling.choosing import check_choice, check_guidance
from regvq_fast.sampling.common import Progress
from regvq_fast.sampling.diffusion import check_settings, sample_diffusion

Prior = TokenTransformer | VQDiffusion
"""What draws tokens."""

_OF_ONE_KIND = {"top_k": "autoregressive", "top_p": "autoregressive", "steps": "diffusion", "truncation": "diffusion"}


@dataclass(frozen=True, kw_only=True)
class DrawConfig(CompileConfig, SeedConfig):
    """How a prior draws."""

    temperature: float = 1.0
    """Temperature of the choice of a token; 0 takes the most likely one."""
    top_k: int | None = None
    """ar: choose among so many most likely codes."""
    top_p: float | None = None
    """ar: choose among the fewest codes whose probabilities sum to this."""
    truncation: float = 0.86
    """diffusion: share of p(x_0 | x_t) to choose from, the most likely codes first."""
    steps: int | None = None
    """diffusion: steps to take. Not given: all that the prior was trained with."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1: none."""


DRAW_SETTINGS = tuple(item.name for item in fields(DrawConfig) if item.name != "compile")
"""Fields that decide what is drawn: speed is none of them."""


class ImageSampler:
    """A prior and its tokenizer, which draw images.

    Args:
        prior: in evaluation mode, on the device it is to compute on; cast to the precision's type.
        tokenizer: its own, on the same device.
        config: how to draw.
        precision: of both.

    Attributes:
        kind: "autoregressive" or "diffusion".
        field: what of a data set's sample an image is conditioned on.
        hash: the first 12 digits of the prior's `weights_hash`, before the cast.

    Raises:
        ValueError: a setting out of range, or of another kind of prior; a tokenizer of another shape.
    """

    def __init__(self, prior: Prior, tokenizer: VQGAN, config: DrawConfig, precision: Precision) -> None:
        self.kind = "autoregressive" if isinstance(prior, TokenTransformer) else "diffusion"
        for name, kind in _OF_ONE_KIND.items():
            if getattr(config, name) != getattr(DrawConfig, name) and kind != self.kind:
                raise ValueError(f"--{name.replace('_', '-')} is for {kind} priors; this one is {self.kind}")
        config.check()
        check_choice(config.temperature, config.top_k, config.top_p)
        check_guidance(config.guidance)
        if isinstance(prior, VQDiffusion):
            check_settings(prior, config.steps, config.truncation, config.guidance, "captions")
        if tokenizer.token_shape != prior.token_shape or tokenizer.quantize.num_codes != prior.num_codes:
            raise ValueError(
                f"the tokenizer has {tokenizer.token_shape} tokens of {tokenizer.quantize.num_codes} codes, the prior "
                f"{prior.token_shape} of {prior.num_codes}: they don't belong together"
            )
        self.prior: Any = prior
        self.hash = weights_hash(prior)[:12]
        if precision.dtype is not None:
            self.prior.to(precision.dtype)
        self.tokenizer, self.config, self.precision = tokenizer, config, precision
        self.field: Field = "segmentation" if isinstance(prior, TokenTransformer) else "caption"

    @classmethod
    def from_run(cls, run: Path, config: DrawConfig, precision: Precision, kind: type[Prior] | None = None) -> Self:
        """The prior in the folder of a run of train/ar.py or train/diffusion.py, with the tokenizer that lies in it.

        Args:
            run: the folder.
            config, precision: as of the class itself.
            kind: what the prior has to be; None: what it says it is.

        Raises:
            FileNotFoundError, ValueError: it isn't there, is no such prior, or is damaged; or as the class itself.
        """
        kinds: tuple[type[Prior], ...] = (TokenTransformer, VQDiffusion) if kind is None else (kind,)
        prior = read_model(run, *kinds).to(precision.device)
        if isinstance(prior, TokenTransformer) and config.guidance != 1.0 and _null_is_fresh(run):
            raise ValueError(
                f"--guidance {config.guidance:g} needs the null condition, which {run} was trained without "
                "(--condition-dropout 0): leave it out, or train one with --condition-dropout 0.1"
            )
        tokenizer = VQGAN.from_pretrained(run / TOKENIZER).to(precision.device)
        return cls(prior, tokenizer, config, precision)

    def draw(self, batch: Batch, first_image: int) -> Tensor:
        """One image for each sample of a batch, (B, 3, H, W) uint8 on the prior's device.

        Args:
            batch: with ``segmentation`` or ``caption``, as :attr:`field` says.
            first_image: number of its first sample among all that are drawn, by all ranks.

        Raises:
            ValueError: as :meth:`draw_under`.
        """
        return self.draw_under(batch[self.field], first_image)

    def draw_under(
        self,
        conditions: Tensor | Sequence[str],
        first_image: int,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One image under each condition, (B, 3, H, W) uint8 on the prior's device.

        Args:
            conditions: maps (B, H, W) uint8, as in :meth:`reduce`, or B captions, as :attr:`field` says.
            first_image: number of the first among all that are drawn.
            keep: tokens, and where to keep them, as in the samplers; on the prior's device.
            states: for a diffusion prior: a list that gets the tokens after each step.
            progress: as in the samplers.

        Raises:
            ValueError: as :meth:`reduce` or the samplers; states of a prior that has none.
            TypeError: conditions of the other kind of prior.
        """
        if isinstance(conditions, Tensor) == (self.kind == "diffusion"):
            wanted = "captions" if self.kind == "diffusion" else "a tensor of maps"
            raise TypeError(f"conditions of this {self.kind} prior must be {wanted}, got {type(conditions).__name__}")
        config = self.config
        shared: dict[str, Any] = {
            "seed": config.seed,
            "temperature": config.temperature,
            "guidance": config.guidance,
            "keep": keep,
            "first_image": first_image,
            "compile": config.compile,
            "progress": progress,
        }
        if not isinstance(conditions, Tensor):
            settings: dict[str, Any] = {"steps": config.steps, "truncation": config.truncation, "states": states}
            return self.decode(sample_diffusion(self.prior, conditions, **settings, **shared))
        if states is not None:
            raise ValueError(f"states are of diffusion priors; this one is {self.kind}: leave them out")
        maps = self.reduce(conditions).to(self.precision.device).long()
        return self.decode(sample_autoregressive(self.prior, maps, top_k=config.top_k, top_p=config.top_p, **shared))

    def reduce(self, maps: Tensor, source: str = "a map") -> Tensor:
        """Semantic maps (B, H, W) uint8 by majority vote at the prior's grid, (B, h, w) uint8.

        Raises:
            ValueError: a class id that the prior doesn't know, which ``source`` holds; maps that are too small.
        """
        shape, least = maps.shape[1:], self.prior.condition_shape
        if any(side < cells for side, cells in zip(shape, least, strict=False)):
            given, needed = (" x ".join(map(str, sides)) for sides in (shape, least))
            raise ValueError(f"{source} gives {given} pixels; the prior needs at least {needed}: take a larger map")
        if shape != least:
            maps = majority_vote(maps, least)
        if int(maps.max()) >= self.prior.num_classes:
            raise ValueError(
                f"{source} holds the class id {int(maps.max())}; the prior knows ids below {self.prior.num_classes}"
            )
        return maps

    def decode(self, tokens: Tensor) -> Tensor:
        """The images (B, 3, H, W) uint8 of tokens (B, h, w) on the prior's device."""
        return decode_tokens(self.tokenizer, tokens, self.precision)

    def describe(self) -> dict[str, Any]:
        """How images are drawn, as plain values."""
        said = {item.name: getattr(self.config, item.name) for item in fields(DrawConfig)}
        chosen = {name: value for name, value in said.items() if _OF_ONE_KIND.get(name, self.kind) == self.kind}
        if self.kind == "diffusion":
            chosen["steps"] = chosen["steps"] or self.prior.num_steps
        return {"prior": f"{self.kind}, {self.hash}", **chosen}


@torch.no_grad()
def decode_tokens(tokenizer: VQGAN, tokens: Tensor, precision: Precision) -> Tensor:
    """The images (B, 3, H, W) uint8 of tokens (B, h, w) int64 on the tokenizer's device."""
    with precision.autocast():
        return to_uint8(tokenizer.decode_indices(tokens).float())


def _null_is_fresh(run: Path) -> bool:
    """Whether an autoregressive prior never saw its null condition; False where its folder doesn't say."""
    try:
        return read_config(run, ARConfig).model.condition_dropout == 0
    except ValueError:
        return False
