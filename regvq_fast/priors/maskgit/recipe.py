"""The recipe of the masked prior (``regvq train maskgit``)."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from regvq_fast.priors.class_ids import ClassIdRecipe
from regvq_fast.priors.maskgit.config import MaskGITConfig
from regvq_fast.priors.maskgit.model import MaskGIT
from regvq_fast.priors.maskgit.sampler import MaskGITSampler


class MaskGITRecipe(ClassIdRecipe[MaskGITConfig]):
    """Training of a transformer that predicts the masked tokens of an image."""

    command = "train maskgit"
    usage = """Train the masked prior: MaskGIT over the tokens of an image, given a map or label.

    regvq train maskgit --cache runs/tokens --compile --amp
    regvq train maskgit --on-the-fly --tokenizer runs/vq --compile --amp
    regvq train maskgit --preset imagenet --cache ImageNet/tokens --compile --amp
    torchrun --nproc-per-node 8 -m regvq_fast train maskgit --preset imagenet --cache ImageNet/tokens --compile --amp
    regvq train maskgit --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); regvq sample samples images from it.
"""
    sampler = MaskGITSampler

    def build_prior(self, config: MaskGITConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
        return MaskGIT(**self.arguments()), {}

    def build_loss(self) -> nn.Module:
        model = self.config.model
        return _Loss(self.model, model.label_smoothing, model.condition_dropout)

    def validation_loss(self, model: MaskGIT, tokens: Tensor, condition: Any, first_image: int) -> Tensor:
        """Return a bound of -log p(tokens | condition), estimated with one mask per image, the same in all evaluations.

        It is the bound of a random order of the tokens: the mean loss of masked tokens, whose number is uniform.
        """
        seed = torch.zeros((), dtype=torch.int64, device=tokens.device)
        counts = model.uniform_counts(len(tokens), seed=seed, first_image=first_image)
        masked = model.mask(counts, seed=seed, first_image=first_image)
        return model.loss(tokens, condition, masked).mean()


class _Loss(nn.Module):
    """Cross-entropy of masked tokens."""

    def __init__(self, prior: nn.Module, label_smoothing: float, condition_dropout: float) -> None:
        super().__init__()
        self.prior = prior
        self.label_smoothing, self.condition_dropout = label_smoothing, condition_dropout

    def forward(
        self, tokens: Tensor, condition: Tensor, seed: Tensor, first_image: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        prior = cast(MaskGIT, self.prior)
        counts = prior.training_counts(len(tokens), seed=seed, first_image=first_image)
        masked = prior.mask(counts, seed=seed, first_image=first_image)
        condition = prior.drop_condition(condition, self.condition_dropout, seed=seed, first_image=first_image)
        losses = prior.loss(tokens, condition, masked, label_smoothing=self.label_smoothing)
        return {"loss": losses.mean()}, ()
