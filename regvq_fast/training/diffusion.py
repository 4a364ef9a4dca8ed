"""Training of the diffusion prior: the task of ``train/diffusion.py``."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from regvq_fast.config import DiffusionConfig
from regvq_fast.data.samples import Batch
from regvq_fast.data.tokens import TokenBatch
from regvq_fast.evaluation.agreement import RegionClassifier
from regvq_fast.evaluation.captions import caption_accuracy
from regvq_fast.losses.discrete_diffusion import diffusion_terms
from regvq_fast.losses.timesteps import TimestepSampler
from regvq_fast.models.text import PretrainedTextEncoder, TextEncoder, WordEncoder
from regvq_fast.models.vq_diffusion import VQDiffusion
from regvq_fast.pictures import caption_tiles
from regvq_fast.sampling import sample_diffusion
from regvq_fast.sampling.common import Progress
from regvq_fast.training.prior import PriorTask

_SAMPLING_STEPS = 25  # of pictures


class DiffusionTask(PriorTask[DiffusionConfig]):
    """A discrete diffusion over the tokens of an image in training, given its caption."""

    script = "train/diffusion.py"
    condition_field = "caption"

    def check(self, config: DiffusionConfig) -> None:
        config.check()

    def build_prior(self) -> VQDiffusion:
        model = self.config.model
        # Data sets have long captions: what doesn't fit is cut off.
        encoder: TextEncoder = WordEncoder(truncate=True)
        if model.text_encoder != "words":
            encoder = PretrainedTextEncoder(model.text_encoder, truncate=True)
        prior = VQDiffusion(
            self.tokenizer.quantize.num_codes,
            token_shape=self.tokenizer.token_shape,
            text_encoder=encoder,
            num_steps=model.diffusion_steps,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            dropout=model.dropout,
            null_condition=model.caption_dropout > 0,
        )
        self.timesteps = self.companions["timesteps"] = TimestepSampler(model.diffusion_steps).to(self.device)
        self._uniform = TimestepSampler(model.diffusion_steps).to(self.device)
        return prior

    def build_loss(self) -> nn.Module:
        model = self.config.model
        return _Loss(self.model, self.timesteps, model.auxiliary_weight, model.caption_dropout)

    def condition(self, batch: TokenBatch) -> tuple[Tensor]:
        return (self.model.tokenize_text(batch["caption"]).to(self.device, non_blocking=True),)

    def observe(self, *tensors: Tensor) -> None:
        self.timesteps.update(*tensors)

    def validation_loss(self, model: VQDiffusion, first_image: int, *inputs: Tensor) -> Tensor:
        """Of one uniformly drawn step an image, the same ones in every evaluation, times their number: the bound."""
        tokens, text = inputs
        tokens = tokens.flatten(1)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)
        t, probability = self._uniform.draw(seed, len(tokens), first_image)
        noisy = model.transition.corrupt(tokens, t, seed, first_image)
        terms = diffusion_terms(model.transition, model(noisy, t, text), tokens, noisy, t)
        return (terms.bound / probability).mean()

    def sample(self, model: VQDiffusion, batch: TokenBatch, progress: Progress | None = None) -> Tensor:
        steps = min(_SAMPLING_STEPS, model.num_steps)
        return sample_diffusion(model, batch["caption"], seed=self.config.run.seed, steps=steps, progress=progress)

    def show(self, batch: TokenBatch) -> Tensor:
        size = self.tokenizer.image_size
        return caption_tiles(batch["caption"], size * max(1, -(-192 // size)))

    def judge(self, classifier: RegionClassifier, images: Tensor, scenes: Batch) -> Mapping[str, float]:
        found = caption_accuracy(classifier, images, scenes["caption"])
        return {"layout": found.layout, "classes": found.classes}


class _Loss(nn.Module):
    """The variational bound at one step an image, and the auxiliary cross-entropy."""

    def __init__(
        self, prior: nn.Module, timesteps: TimestepSampler, auxiliary_weight: float, caption_dropout: float
    ) -> None:
        super().__init__()
        self.prior, self.timesteps = prior, timesteps
        self.auxiliary_weight, self.caption_dropout = auxiliary_weight, caption_dropout

    def forward(
        self, tokens: Tensor, text: Tensor, seed: Tensor, first_image: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        prior = cast(VQDiffusion, self.prior)
        tokens = tokens.flatten(1)
        t, probability = self.timesteps.draw(seed, len(tokens), first_image)
        noisy = prior.transition.corrupt(tokens, t, seed, first_image)
        kept = prior.keep_text(len(tokens), self.caption_dropout, seed=seed, first_image=first_image)
        terms = diffusion_terms(prior.transition, prior(noisy, t, text, kept), tokens, noisy, t)
        loss = terms.loss(t, probability, prior.num_steps, self.auxiliary_weight)
        metrics = {
            "loss": loss,
            "bound": (terms.bound / probability).mean(),
            "cross_entropy": terms.cross_entropy.mean(),
        }
        return metrics, (t, terms.bound.detach())
