"""The recipe of the autoregressive prior (``regvq train ar``)."""

from typing import Any, cast

from torch import Tensor, nn

from regvq_fast.priors.autoregressive.config import ARConfig
from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.autoregressive.sampler import ARSampler
from regvq_fast.priors.class_ids import ClassIdRecipe


class ARRecipe(ClassIdRecipe[ARConfig]):
    """Training of a transformer that predicts the tokens of an image from its semantic map."""

    command = "train ar"
    usage = """Train the autoregressive prior: a transformer over the tokens of an image, given a map or label.

    regvq train ar --cache runs/tokens --compile --amp
    regvq train ar --on-the-fly --tokenizer runs/vq --compile --amp
    regvq train ar --preset ade20k --cache ADE20K/tokens --compile --amp
    torchrun --nproc-per-node 4 -m regvq_fast train ar --preset ade20k --cache ADE20K/tokens --compile --amp
    regvq train ar --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); regvq sample samples images from it.
"""
    sampler = ARSampler

    def build_prior(self, config: ARConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
        return TokenTransformer(**self.arguments(), arch=config.model.arch), {}

    def build_loss(self) -> nn.Module:
        return _Loss(self.model, self.config.model.keep, self.config.model.condition_dropout)

    def validation_loss(self, model: TokenTransformer, tokens: Tensor, condition: Any, first_image: int) -> Tensor:
        return model.loss(tokens, condition)


class _Loss(nn.Module):
    """Cross-entropy of tokens, given corrupted inputs."""

    def __init__(self, prior: nn.Module, keep: float, condition_dropout: float) -> None:
        super().__init__()
        self.prior = prior
        self.keep, self.condition_dropout = keep, condition_dropout

    def forward(
        self, tokens: Tensor, condition: Tensor, seed: Tensor, first_image: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        prior = cast(TokenTransformer, self.prior)
        inputs, condition = prior.corrupt(
            tokens,
            condition,
            seed=seed,
            first_image=first_image,
            keep=self.keep,
            condition_dropout=self.condition_dropout,
        )
        return {"loss": prior.loss(tokens, condition, inputs=inputs)}, ()
