"""The recipe of the autoregressive prior (``regvq train ar``)."""

from typing import Any, cast

from torch import Tensor, nn

from regvq_fast.data.tokens import TokenDataset
from regvq_fast.priors.autoregressive.config import ARConfig
from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.autoregressive.sampler import ARSampler
from regvq_fast.priors.prior_recipe import PriorRecipe

_MAX_CLASSES = 256


class ARRecipe(PriorRecipe[ARConfig]):
    """Training of a transformer that predicts the tokens of an image from its semantic map."""

    command = "train ar"
    usage = """Train the autoregressive prior: a transformer over the tokens of an image, given a map or label.

    regvq train ar --cache runs/tokens --compile --amp                # tokens of a cache
    regvq train ar --on-the-fly --tokenizer runs/vq --compile --amp   # tokens made in every step
    regvq train ar --preset ade20k --cache ADE20K/tokens --compile --amp
    torchrun --nproc-per-node 4 -m regvq_fast train ar --preset ade20k --cache ADE20K/tokens --compile --amp
    regvq train ar --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); regvq sample samples images from it.
"""
    sampler = ARSampler

    def build_prior(self, config: ARConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
        model = config.model
        prior = TokenTransformer(
            self.tokenizer.quantize.num_codes,
            self._num_classes() if self.conditioned_on == "segmentation" else len(self.label_names),
            label_names=self.label_names,
            token_shape=self.tokenizer.token_shape,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            dropout=model.dropout,
            arch=model.arch,
        )
        return prior, {}

    def _num_classes(self) -> int:
        """Return the number of ids that a map may hold."""
        train = self.data.train
        cached = isinstance(train, TokenDataset)
        found = (train.info if cached else train).num_classes
        given = self.config.model.num_classes
        if given is None and found is None:
            raise ValueError("--on-the-fly does not know the classes of these images: give --num-classes")
        if given is not None and not (found or 1) <= given <= _MAX_CLASSES:
            source = self.config.tokens.cache if cached else train.title
            there = f" ({source} has {found} classes)" if found else ""
            raise ValueError(
                f"--num-classes must be at least {found or 1} and at most {_MAX_CLASSES}, got {given}{there}"
            )
        if found is None:  # an image whose map has other ids counts as unreadable
            train.num_classes = self.data.val.num_classes = given
        return given or found or 0

    def build_loss(self) -> nn.Module:
        return _Loss(self.model, self.config.model.keep, self.config.model.condition_dropout)

    def validation_loss(self, model: TokenTransformer, tokens: Tensor, condition: Any, first_image: int) -> Tensor:
        return model.loss(tokens, condition)


class _Loss(nn.Module):
    """Cross-entropy of tokens, of which the network sees a corrupted form."""

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
