"""Images that a trained prior draws for the samples of a data set: for metrics over a whole split."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from regvq_fast.data.pictures import Field
from regvq_fast.data.samples import Batch
from regvq_fast.data.tokens import majority_vote, tokenizer_hash
from regvq_fast.data.transforms import to_uint8
from regvq_fast.models.pretrained import TOKENIZER, read_pretrained
from regvq_fast.models.token_transformer import TokenTransformer
from regvq_fast.models.vq_diffusion import VQDiffusion
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import Precision
from regvq_fast.sampling.autoregressive import sample_autoregressive
from regvq_fast.sampling.choosing import check_choice, check_guidance
from regvq_fast.sampling.diffusion import check_settings, sample_diffusion

_OF_ONE_KIND = {"top_k": "autoregressive", "top_p": "autoregressive", "steps": "diffusion", "truncation": "diffusion"}


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How a prior draws."""

    temperature: float = 1.0
    """Of the choice of a token; 0 takes the most likely one."""
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
    seed: int = 0
    """Decides the drawn images: number k of a seed is the same in any batch, and on any number of ranks."""
    compile: bool = False
    """Compile the prior's step with torch.compile: for many images."""


class ImageSampler:
    """A prior and its tokenizer, which draw one image for each sample of a data set.

    Args:
        prior: in evaluation mode, on the device it is to compute on; cast to the precision's type.
        tokenizer: its own, on the same device.
        config: how to draw.
        precision: of both.

    Attributes:
        field: what of a sample the images are conditioned on.

    Raises:
        ValueError: a setting out of range, or of another kind of prior; a tokenizer of another shape.
    """

    def __init__(
        self, prior: TokenTransformer | VQDiffusion, tokenizer: VQGAN, config: DrawConfig, precision: Precision
    ) -> None:
        self.kind = "autoregressive" if isinstance(prior, TokenTransformer) else "diffusion"
        for name, kind in _OF_ONE_KIND.items():
            if getattr(config, name) != getattr(DrawConfig, name) and kind != self.kind:
                raise ValueError(f"--{name.replace('_', '-')} is for {kind} priors; this one is {self.kind}")
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
        self.hash = tokenizer_hash(prior)[:12]
        if precision.dtype is not None:
            self.prior.to(precision.dtype)
        self.tokenizer, self.config, self.precision = tokenizer, config, precision
        self.field: Field = "segmentation" if isinstance(prior, TokenTransformer) else "caption"

    @classmethod
    def from_run(cls, run: Path, config: DrawConfig, precision: Precision) -> Self:
        """The prior in the folder of a run of train/ar.py or train/diffusion.py, with the tokenizer that lies in it.

        Raises:
            FileNotFoundError, ValueError: it isn't there, is no prior, or is damaged; or as the class itself.
        """
        kinds: dict[str, type[TokenTransformer | VQDiffusion]] = {
            "TokenTransformer": TokenTransformer,
            "VQDiffusion": VQDiffusion,
        }
        kind = read_pretrained(run)[0].get("type", "VQGAN")
        if kind not in kinds:
            raise ValueError(f"{run} holds a {kind}, not a prior: give a run of train/ar.py or train/diffusion.py")
        prior = kinds[kind].from_pretrained(run).to(precision.device)
        tokenizer = VQGAN.from_pretrained(run / TOKENIZER).to(precision.device)
        return cls(prior, tokenizer, config, precision)

    def draw(self, batch: Batch, first_image: int) -> Tensor:
        """One image for each sample of a batch, (B, 3, H, W) uint8 on the prior's device.

        Args:
            batch: with ``segmentation`` or ``caption``, as :attr:`field` says.
            first_image: number of its first sample among all that are drawn, by all ranks.

        Raises:
            ValueError: a map holds a class id that the prior doesn't know; or as the samplers.
        """
        config = self.config
        shared: dict[str, Any] = {
            "seed": config.seed,
            "temperature": config.temperature,
            "guidance": config.guidance,
            "first_image": first_image,
            "compile": config.compile,
        }
        if self.field == "caption":
            tokens = sample_diffusion(
                self.prior, batch["caption"], steps=config.steps, truncation=config.truncation, **shared
            )
        else:
            maps = batch["segmentation"]
            if maps.shape[1:] != self.prior.condition_shape:
                maps = majority_vote(maps, self.prior.condition_shape)
            if int(maps.max()) >= self.prior.num_classes:
                raise ValueError(
                    f"a map holds the class id {int(maps.max())}; the prior knows ids below {self.prior.num_classes}"
                )
            condition = maps.to(self.precision.device).long()
            tokens = sample_autoregressive(self.prior, condition, top_k=config.top_k, top_p=config.top_p, **shared)
        with torch.no_grad(), self.precision.autocast():
            return to_uint8(self.tokenizer.decode_indices(tokens).float())

    def describe(self) -> dict[str, Any]:
        """How images are drawn, as plain values."""
        said = {item.name: getattr(self.config, item.name) for item in fields(DrawConfig)}
        chosen = {name: value for name, value in said.items() if _OF_ONE_KIND.get(name, self.kind) == self.kind}
        if self.kind == "diffusion":
            chosen["steps"] = chosen["steps"] or self.prior.num_steps
        return {"prior": f"{self.kind}, {self.hash}", **chosen}
