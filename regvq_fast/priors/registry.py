"""PRIORS, the registry of generative models over tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from regvq_fast.models.model import Model
from regvq_fast.priors.autoregressive.config import AR_PRESETS
from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.autoregressive.recipe import ARRecipe
from regvq_fast.priors.autoregressive.sampler import ARSettings
from regvq_fast.priors.config import PriorConfig
from regvq_fast.priors.diffusion.config import DIFFUSION_PRESETS
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.recipe import DiffusionRecipe
from regvq_fast.priors.diffusion.sampler import DiffusionSettings
from regvq_fast.priors.maskgit.config import MASKGIT_PRESETS
from regvq_fast.priors.maskgit.model import MaskGIT
from regvq_fast.priors.maskgit.recipe import MaskGITRecipe
from regvq_fast.priors.maskgit.sampler import MaskGITSettings
from regvq_fast.priors.prior_recipe import PriorRecipe
from regvq_fast.priors.sampler import PriorSampler


@dataclass(frozen=True)
class Prior:
    """A generative model over tokens."""

    model: type[Model]
    """Network; a run's architecture has its name."""
    presets: Mapping[str, PriorConfig]
    """Configurations by data set, the default first."""
    recipe: type[PriorRecipe[Any]]
    """Training, and the sampler."""

    @property
    def sampler(self) -> type[PriorSampler]:
        """Sampling: conditions, settings, guidance."""
        return self.recipe.sampler

    @property
    def config(self) -> type[PriorConfig]:
        """Class of the configurations."""
        return type(next(iter(self.presets.values())))

    @property
    def command(self) -> str:
        """The command of `regvq` that trains it."""
        return self.recipe.command


PRIORS: dict[str, Prior] = {
    "ar": Prior(TokenTransformer, AR_PRESETS, ARRecipe),
    "diffusion": Prior(VQDiffusion, DIFFUSION_PRESETS, DiffusionRecipe),
    "maskgit": Prior(MaskGIT, MASKGIT_PRESETS, MaskGITRecipe),
}
"""Priors by their name on command lines."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ARSettings, DiffusionSettings, MaskGITSettings):
    """Settings of all samplers, for command lines; each prior uses its own."""


SAMPLING_SETTINGS = tuple(name for name in SamplingConfig.names() if name != "compile")
"""Settings that determine the images, unlike `compile`."""


if TYPE_CHECKING:
    PriorName = str
else:
    PriorName = Literal[tuple(PRIORS)]
"""A name in PRIORS."""


def prior_of(model: nn.Module) -> Prior:
    """Return the entry of a model."""
    return next(prior for prior in PRIORS.values() if isinstance(model, prior.model))


def titles(has: Callable[[type[PriorSampler]], bool]) -> str:
    """Name the priors whose sampler has something, for messages: "autoregressive, diffusion and MaskGIT"."""
    *others, last = [prior.sampler.title for prior in PRIORS.values() if has(prior.sampler)]
    return f"{', '.join(others)} and {last}" if others else last
