"""Training of the autoregressive prior: the task of ``train/ar.py``."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from regvq_fast.config import ARConfig
from regvq_fast.data.samples import Batch
from regvq_fast.data.scenes import CLASSES
from regvq_fast.data.tokens import TokenBatch, TokenDataset
from regvq_fast.evaluation.agreement import RegionClassifier, region_accuracy
from regvq_fast.models.token_transformer import TokenTransformer
from regvq_fast.pictures import color_map, legend_of
from regvq_fast.sampling import sample_autoregressive
from regvq_fast.sampling.common import Progress
from regvq_fast.training.prior import PriorTask

_MAX_CLASSES = 256


class ARTask(PriorTask[ARConfig]):
    """A transformer in training that predicts the tokens of an image, given its semantic map."""

    script = "train/ar.py"
    condition_field = "segmentation"

    def check(self, config: ARConfig) -> None:
        config.check()

    def build_prior(self) -> TokenTransformer:
        model = self.config.model
        return TokenTransformer(
            self.tokenizer.quantize.num_codes,
            self._num_classes(),
            token_shape=self.tokenizer.token_shape,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            dropout=model.dropout,
        )

    def _num_classes(self) -> int:
        """Ids that a map may hold."""
        cached = isinstance(self.train_set, TokenDataset)
        found = (self.train_set.info if cached else self.train_set).num_classes
        given = self.config.model.num_classes
        if given is None and found is None:
            raise ValueError("--on-the-fly does not know the classes of these images: give --num-classes")
        if given is not None and not (found or 1) <= given <= _MAX_CLASSES:
            source = self.config.tokens.cache if cached else self.train_set.label
            there = f" ({source} has {found} classes)" if found else ""
            raise ValueError(
                f"--num-classes must be at least {found or 1} and at most {_MAX_CLASSES}, got {given}{there}"
            )
        if found is None:  # a picture whose map has other ids is one that can't be read
            self.train_set.num_classes = self.val_set.num_classes = given
        return given or found or 0

    def build_loss(self) -> nn.Module:
        model = self.config.model
        return _Loss(self.model, model.keep, model.condition_dropout)

    def condition(self, batch: TokenBatch) -> tuple[Tensor]:
        return (batch["segmentation"].to(self.device, non_blocking=True).long(),)

    def validation_loss(self, model: TokenTransformer, first_image: int, *inputs: Tensor) -> Tensor:
        return model.loss(*inputs)

    def sample(self, model: TokenTransformer, batch: TokenBatch, progress: Progress | None = None) -> Tensor:
        return sample_autoregressive(model, *self.condition(batch), seed=self.config.run.seed, progress=progress)

    def show(self, batch: TokenBatch) -> Tensor:
        size = self.tokenizer.image_size
        return color_map(batch["segmentation"], (size, size))

    def legend(self, batch: TokenBatch) -> dict[int, str]:
        return legend_of(batch["segmentation"], CLASSES if self.scenes else ())

    def judge(self, classifier: RegionClassifier, images: Tensor, scenes: Batch) -> Mapping[str, float]:
        return {"agreement": region_accuracy(classifier, images, scenes["segmentation"]).accuracy}


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
