"""Images that a trained prior samples under its conditions."""

from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from regvq_fast.data.image_dataset import ImageDataset
from regvq_fast.data.samples import Batch
from regvq_fast.models.hub import local_folder
from regvq_fast.models.model import Model, read_model
from regvq_fast.models.pretrained import tokenizer_folder
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.precision import Precision
from regvq_fast.priors.conditions import Condition, conditions_of
from regvq_fast.priors.registry import PRIORS, SamplingConfig, prior_of, titles
from regvq_fast.priors.sampler import PriorSampler, Progress, decode_tokens

_CONDITIONS: dict[Condition, str] = {
    "segmentation": "a tensor of maps (B, H, W)",
    "caption": "captions",
    "label": "a tensor of labels (B,)",
    "none": "a tensor (B, 0)",
}


_DIMENSIONS: dict[Condition, int] = {"segmentation": 3, "caption": 0, "label": 1, "none": 2}


class ImageSampler:
    """A prior and its tokenizer, which sample images.

    Args:
        prior: in evaluation mode, on the device it is to compute on; cast to the precision's type.
        tokenizer: its own, on the same device.
        config: how to sample.
        precision: of both.

    Attributes:
        entry: the prior's entry in `PRIORS`.
        token_sampler: the prior's own sampler, of tokens.
        condition: kind of condition.
        hash: the first 12 digits of the prior's `weights_hash`, before the cast.

    Raises:
        ValueError: a setting out of range, or of another prior; a tokenizer of another shape.
    """

    def __init__(self, prior: Model, tokenizer: VQGAN, config: SamplingConfig, precision: Precision) -> None:
        self.entry = prior_of(prior)
        kind = self.entry.sampler
        for name in SamplingConfig.names():
            if name not in kind.settings_type.names() and getattr(config, name) != getattr(SamplingConfig, name):
                flag, owners = name.replace("_", "-"), titles(partial(_takes, name))
                raise ValueError(f"--{flag} is for {owners} priors; this one is {kind.title}")
        self.token_sampler = kind(prior, config)
        self.prior: Any = prior
        if tokenizer.token_shape != self.prior.token_shape or tokenizer.quantize.num_codes != self.prior.num_codes:
            raise ValueError(
                f"the tokenizer has {tokenizer.token_shape} tokens of {tokenizer.quantize.num_codes} codes, the prior "
                f"{self.prior.token_shape} of {self.prior.num_codes}: they do not match"
            )
        self.hash = weights_hash(prior)[:12]
        if precision.dtype is not None:
            prior.to(precision.dtype)
        self.tokenizer, self.precision = tokenizer, precision
        self.condition = self.token_sampler.condition

    @classmethod
    def from_run(cls, run: str | Path, config: SamplingConfig, precision: Precision, name: str | None = None) -> Self:
        """Load the prior in the folder of its run, with the tokenizer that lies in it, else beside it.

        Args:
            run: the folder, or a name on the Hugging Face Hub, as of `Model.from_pretrained`.
            config, precision: as of the class itself.
            name: name of the prior in `PRIORS`; None: any of them.

        Raises:
            OSError, ValueError: it isn't there, is no such prior, or is damaged; or as the class itself.
        """
        run = local_folder(run)
        entries = PRIORS.values() if name is None else [PRIORS[name]]
        prior = read_model(run, *(entry.model for entry in entries)).to(precision.device)
        tokenizer = VQGAN.from_pretrained(tokenizer_folder(run)).to(precision.device)
        sampler = cls(prior, tokenizer, config, precision)
        sampler.token_sampler.check(run)
        return sampler

    def check_labels(self, dataset: ImageDataset) -> None:
        """Raise ValueError if images have other labels than the prior, whose samples they condition."""
        names = self.prior.label_names
        if self.condition == "label" and dataset.label_names != names:
            raise ValueError(
                f"the {len(dataset.label_names)} labels of {dataset.title} are not the prior's {len(names)}: take the "
                "data that it was trained on"
            )

    def sample(self, batch: Batch, first_image: int) -> Tensor:
        """Sample one image for each sample of a batch, (B, 3, H, W) uint8 on the prior's device.

        Args:
            batch: with the field that :attr:`condition` names.
            first_image: number of its first sample among all that are sampled, by all ranks.

        Raises:
            ValueError: as :meth:`sample_under`.
        """
        return self.sample_under(conditions_of(batch, self.condition), first_image)

    def sample_under(
        self,
        conditions: Any,
        first_image: int,
        *,
        keep: tuple[Tensor, Tensor] | None = None,
        states: list[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample one image under each condition, (B, 3, H, W) uint8 on the prior's device.

        Args:
            conditions, first_image, keep, states, progress: as in `PriorSampler.sample`.

        Raises:
            ValueError: conditions that the prior can't take; states of a prior that has none.
            TypeError: conditions of another prior.
        """
        kind = self.entry.sampler
        dimensions = conditions.ndim if isinstance(conditions, Tensor) else 0
        if dimensions != _DIMENSIONS[self.condition]:
            given = tuple(conditions.shape) if dimensions else type(conditions).__name__
            raise TypeError(f"conditions of this {kind.title} prior must be {_CONDITIONS[self.condition]}, got {given}")
        if states is not None and not kind.has_states:
            owners = titles(lambda sampler: sampler.has_states)
            raise ValueError(f"states exist for {owners} priors; this one is {kind.title}: leave them out")
        return self.decode(
            self.token_sampler.sample(conditions, first_image, keep=keep, states=states, progress=progress)
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode tokens (B, h, w) on the prior's device to images (B, 3, H, W) uint8."""
        return decode_tokens(self.tokenizer, tokens, self.precision)

    def describe(self) -> dict[str, Any]:
        """Describe how images are sampled, as plain values."""
        return {"prior": f"{self.entry.sampler.title}, {self.hash}", **self.token_sampler.describe()}


def _takes(setting: str, sampler: type[PriorSampler]) -> bool:
    return setting in sampler.settings_type.names()
