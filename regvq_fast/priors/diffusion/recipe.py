"""The recipe of the diffusion prior (``regvq train diffusion``)."""

from typing import cast

import torch
from torch import Tensor, nn

from regvq_fast.priors.diffusion.config import DiffusionConfig, DiffusionModelConfig
from regvq_fast.priors.diffusion.loss import diffusion_terms
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.sampler import DiffusionSampler
from regvq_fast.priors.diffusion.text import LabelEncoder, PretrainedTextEncoder, TextEncoder, WordEncoder
from regvq_fast.priors.diffusion.timesteps import TimestepSampler
from regvq_fast.priors.prior_recipe import PriorRecipe


class DiffusionRecipe(PriorRecipe[DiffusionConfig]):
    """Training of a discrete diffusion over the tokens of an image, given its caption."""

    command = "train diffusion"
    usage = """Train the diffusion prior: VQ-Diffusion over the tokens of an image, given its caption or label.

    regvq train diffusion --cache runs/tokens --compile --amp
    regvq train diffusion --on-the-fly --tokenizer runs/vq --compile --amp
    regvq train diffusion --preset coco --cache COCO/tokens --compile --amp
    torchrun --nproc-per-node 4 -m regvq_fast train diffusion --preset coco --cache COCO/tokens --compile --amp
    regvq train diffusion --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); regvq sample samples images from it.
"""
    sampler = DiffusionSampler

    @staticmethod
    def check_files(config: DiffusionConfig) -> None:
        _text_encoder(config.model)

    def build_prior(self, config: DiffusionConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
        model = config.model
        prior = VQDiffusion(
            self.tokenizer.quantize.num_codes,
            token_shape=self.tokenizer.token_shape,
            text_encoder=self._condition_encoder(),
            text_shape=(1, model.width),  # of an unconditional prior
            num_steps=model.diffusion_steps,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            dropout=model.dropout,
            null_condition=self.conditioned_on == "none" or model.condition_dropout > 0,
        )
        self.timesteps = TimestepSampler(model.diffusion_steps).to(self.device)
        self._uniform = TimestepSampler(model.diffusion_steps).to(self.device)
        return prior, {"timesteps": self.timesteps}

    def _condition_encoder(self) -> TextEncoder | None:
        if self.conditioned_on == "label":
            return LabelEncoder(self.label_names, width=self.config.model.width)
        return _text_encoder(self.config.model) if self.conditioned_on == "caption" else None

    def build_loss(self) -> nn.Module:
        model = self.config.model
        return _Loss(self.model, self.timesteps, model.auxiliary_weight, model.condition_dropout)

    def observe(self, *tensors: Tensor) -> None:
        self.timesteps.update(*tensors)

    def validation_loss(self, model: VQDiffusion, tokens: Tensor, condition: Tensor | None, first_image: int) -> Tensor:
        """Return the bound, estimated from one uniform step per image, the same in every evaluation."""
        tokens = tokens.flatten(1)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)
        t, probability = self._uniform.sample(seed, len(tokens), first_image)
        noisy = model.transition.corrupt(tokens, t, seed, first_image)
        terms = diffusion_terms(model.transition, model(noisy, t, condition), tokens, noisy, t)
        return (terms.bound / probability).mean()


def _text_encoder(model: DiffusionModelConfig) -> TextEncoder:
    """Build the text encoder, which truncates long captions."""
    if model.text_encoder == "words":
        return WordEncoder(truncate=True)
    return PretrainedTextEncoder(model.text_encoder, truncate=True)


class _Loss(nn.Module):
    """The variational bound at one step per image, and the auxiliary cross-entropy."""

    def __init__(
        self, prior: nn.Module, timesteps: TimestepSampler, auxiliary_weight: float, condition_dropout: float
    ) -> None:
        super().__init__()
        self.prior, self.timesteps = prior, timesteps
        self.auxiliary_weight, self.condition_dropout = auxiliary_weight, condition_dropout

    def forward(
        self, tokens: Tensor, text: Tensor | None, seed: Tensor, first_image: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        prior = cast(VQDiffusion, self.prior)
        tokens = tokens.flatten(1)
        t, probability = self.timesteps.sample(seed, len(tokens), first_image)
        noisy = prior.transition.corrupt(tokens, t, seed, first_image)
        kept = prior.keep_text(len(tokens), self.condition_dropout, seed=seed, first_image=first_image)
        terms = diffusion_terms(prior.transition, prior(noisy, t, text, kept), tokens, noisy, t)
        loss = terms.loss(t, probability, prior.num_steps, self.auxiliary_weight)
        metrics = {
            "loss": loss,
            "bound": (terms.bound / probability).mean(),
            "cross_entropy": terms.cross_entropy.mean(),
        }
        return metrics, (t, terms.bound.detach())
