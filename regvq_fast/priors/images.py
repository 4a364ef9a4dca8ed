"""Sampling of images from a trained prior under its conditions."""

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
from regvq_fast.priors.sampler import PriorSampler, Progress, decode_images

_CONDITIONS: dict[Condition, str] = {
    "segmentation": "a tensor of maps (B, H, W)",
    "caption": "captions",
    "label": "a tensor of labels (B,)",
    "none": "a tensor (B, 0)",
}


_DIMENSIONS: dict[Condition, int] = {"segmentation": 3, "caption": 0, "label": 1, "none": 2}


class ImageSampler:
    """A prior with its tokenizer, to sample images.

    Args:
        prior: in evaluation mode, on its final device; cast to the precision's type.
        tokenizer: of the prior, on the same device.
        config: settings of sampling.
        precision: of both networks.

    Attributes:
        entry: the prior's entry in `PRIORS`.
        token_sampler: the prior's sampler of tokens.
        condition: kind of condition.
        hash: the first 12 digits of the prior's `weights_hash`, before the cast.

    Raises:
        ValueError: a setting out of range or for another prior; a tokenizer with another shape.
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
                f"{self.prior.token_shape} of {self.prior.num_codes}: give the tokenizer of its training"
            )
        self.hash = weights_hash(prior)[:12]
        if precision.dtype is not None:
            prior.to(precision.dtype)
        self.tokenizer, self.precision = tokenizer, precision
        self.condition = self.token_sampler.condition

    @classmethod
    def from_run(cls, run: str | Path, config: SamplingConfig, precision: Precision, name: str | None = None) -> Self:
        """Load the prior of a run, with the tokenizer in its folder, else beside it.

        Args:
            run: the folder, or a name on the Hugging Face Hub, as in `Model.from_pretrained`.
            config, precision: as for the class.
            name: name of the prior in `PRIORS`; None: any.

        Raises:
            OSError, ValueError: the prior is missing, damaged, or of another kind; or as the class.
        """
        run = local_folder(run)
        entries = PRIORS.values() if name is None else [PRIORS[name]]
        prior = read_model(run, *(entry.model for entry in entries)).to(precision.device)
        tokenizer = VQGAN.from_pretrained(tokenizer_folder(run)).to(precision.device)
        sampler = cls(prior, tokenizer, config, precision)
        sampler.token_sampler.check(run)
        return sampler

    def check_labels(self, dataset: ImageDataset) -> None:
        """Raise ValueError if a data set has other labels than the prior."""
        names = self.prior.label_names
        if self.condition == "label" and dataset.label_names != names:
            raise ValueError(
                f"the {len(dataset.label_names)} labels of {dataset.title} are not the prior's {len(names)}: take the "
                "data that it was trained on"
            )

    def sample(self, batch: Batch, first_image: int) -> Tensor:
        """Sample one image for each sample of a batch, (B, 3, H, W) uint8 on the prior's device.

        Args:
            batch: with the field named by :attr:`condition`.
            first_image: global number of its first sample.

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
            ValueError: invalid conditions, or states of a prior without states.
            TypeError: conditions of another kind.
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
        return decode_images(self.tokenizer, tokens, self.precision)

    def describe(self) -> dict[str, Any]:
        """Describe how images are sampled, as plain values."""
        return {"prior": f"{self.entry.sampler.title}, {self.hash}", **self.token_sampler.describe()}


def _takes(setting: str, sampler: type[PriorSampler]) -> bool:
    return setting in sampler.settings_type.names()
