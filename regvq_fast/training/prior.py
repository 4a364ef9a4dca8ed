"""What the training of every prior over tokens shares: tokenizer, tokens, likelihood, samples."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regvq_fast.config import PriorConfig, read_config
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.image_dataset import TrainedPrior
from regvq_fast.data.image_files import left_out_note
from regvq_fast.data.samples import Batch, Field
from regvq_fast.data.token_cache import read_info
from regvq_fast.data.tokens import TokenBatch, TokenDataset, tokenize_batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.shares import rank_share
from regvq_fast.image_grids import save_image_grid
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.ranks import sum_over_ranks
from regvq_fast.sampling.common import Progress
from regvq_fast.sampling.images import decode_tokens
from regvq_fast.training.compilation import maybe_compile
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.step import distributed, synchronized
from regvq_fast.training.task import Task

_SAMPLES = 8  # of an image grid

Config = TypeVar("Config", bound=PriorConfig)


@dataclass(frozen=True)
class LikelihoodMetrics:
    """How well a prior predicts tokens that it has not seen."""

    loss: float
    """Mean over images of the training loss on validation tokens, in nats a token."""
    images: int

    def scalars(self) -> dict[str, float]:
        """The numbers by name."""
        return {"loss": self.loss, "images": self.images}


class PriorTask(Task[Config]):
    """A prior in training. A subclass says what its condition is, what its network is, and how it is sampled."""

    picture = "samples"
    condition_field: Field
    """Of the samples, what images are conditioned on."""

    # ------------------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def build_prior(self) -> nn.Module:
        """The network."""

    @abstractmethod
    def build_loss(self) -> nn.Module:
        """The module of a training step: inputs, seed and number of the first image to losses and other numbers by
        name, and to tensors for `observe`."""

    @abstractmethod
    def condition(self, batch: TokenBatch) -> tuple[Tensor, ...]:
        """The condition on the device, ready to be cut into parts along its first dimension."""

    @abstractmethod
    def sample(self, model: Any, batch: TokenBatch, progress: Progress | None = None) -> Tensor:
        """Sample tokens (B, h, w) under the conditions of a batch; ``progress`` as in the samplers."""

    @abstractmethod
    def show(self, batch: TokenBatch) -> Tensor:
        """The conditions of a batch as pictures (B, 3, H, W) uint8."""

    def legend(self, batch: TokenBatch) -> dict[int, str]:
        """Names of the class ids in the pictures of the conditions."""
        return {}

    # --------------------------------------------------------------------------------------------------- what is shared

    def build_data(self, config: Config) -> tuple[Any, Any]:
        tokens, seed = config.tokens, config.run.seed
        source = self._own_tokenizer(config) or tokens.tokenizer
        if source is None and tokens.cache is not None:
            source = Path(read_info(tokens.cache).tokenizer)
            if not source.exists():
                raise ValueError(f"the tokenizer {source} that {tokens.cache} names is not there: give --tokenizer")
        assert source is not None  # checked
        self.tokenizer = VQGAN.from_pretrained(source)
        self.tokenizer_hash = weights_hash(self.tokenizer)
        if tokens.cache is not None:
            splits = [
                TokenDataset(tokens.cache, split, seed=seed, tokenizer_hash=self.tokenizer_hash)
                for split in ("train", "val")
            ]
            if self.condition_field not in splits[0].info.fields:
                raise ValueError(
                    f"the token cache {tokens.cache} has no {self.condition_field}: make one with --fields "
                    f"{self.condition_field}"
                )
            self.dataset_class = dataset_class(splits[0].info.data)  # of the images that it has the tokens of
            return splits[0], splits[1]
        self.dataset_class = dataset_class(tokens.data)
        shared = {"image_size": self.tokenizer.image_size, "seed": seed, "fields": (self.condition_field,)}
        return (
            build_dataset(tokens.data, split="train", crop=tokens.crop, flip=tokens.flip, **shared),  # type: ignore[arg-type]
            build_dataset(tokens.data, split="val", length=tokens.val_images, **shared),  # type: ignore[arg-type]
        )

    def _own_tokenizer(self, config: Config) -> Path | None:
        """The one in the folder of a run that is resumed, unless ``--tokenizer`` names another than at first.

        Where that one came from, there may be another by now: its run may have gone on.
        """
        out = config.run.out
        if not config.run.resume or out is None or not (out / TOKENIZER).exists():
            return None
        given = config.tokens.tokenizer != read_config(out, type(config)).tokens.tokenizer
        return None if given else out / TOKENIZER

    def build(self) -> dict[str, nn.Module]:
        self.tokenizer.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encoder = _InParts(self.tokenizer, self.part)
        self.model = self.build_prior().to(self.device)
        # Tokens made on the way depend on the precision, images don't.
        self.first_samples("image" if self.config.tokens.cache is None else "tokens")
        self._plain = self.build_loss()
        return {"grad_norm": self.model}

    def distribute(self) -> None:
        self._encoder = _InParts(self.tokenizer, self.part, compile=self.compiles)
        self._loss = distributed(maybe_compile(self._plain, self.compiles))

    def train_images(self) -> int:
        """Each once, of however many of its views a cache has the tokens."""
        cached = isinstance(self.train_set, TokenDataset)
        return self.train_set.info.train_images if cached else super().train_images()

    def default_workers(self) -> int:
        """None for a cache: a batch of it is gathered in less time than a process hands one over."""
        return 0 if self.config.tokens.cache is not None else super().default_workers()

    def tokens_of(self, batch: Any) -> TokenBatch:
        """The batch as it is, or with tokens in place of its images."""
        if "tokens" in batch:
            return batch
        # Nothing takes gradients of it; said here, since a compiled encoder is one graph more for each of both modes.
        with torch.no_grad(), self.precision.autocast():
            return tokenize_batch(self._encoder, batch, self.device)

    def describe(self) -> dict[str, str]:
        tokens = self.config.tokens
        height, width = self.tokenizer.token_shape
        source = f"token cache {tokens.cache}" if tokens.cache else f"{self.train_set.label}, on the fly"
        return {
            "tokens": f"{source}: {len(self.train_set):,} training samples, {len(self.val_set):,} for validation"
            f"{left_out_note(self.train_set, self.val_set)}",
            "tokenizer": f"{height} x {width} tokens of {self.tokenizer.quantize.num_codes} codes",
        }

    def identity(self) -> dict[str, str]:
        return {**super().identity(), "as tokenizer": self.tokenizer_hash[:12]}

    def begin(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / TOKENIZER)

    def inputs(self, batch: Batch | TokenBatch) -> tuple[Tensor, ...]:
        ready = self.tokens_of(batch)
        return ready["tokens"].to(self.device, non_blocking=True), *self.condition(ready)

    def forward_backward(
        self, *inputs: Tensor, first_image: Tensor, loss_scale: Tensor, synchronize: bool, plain: bool = False
    ) -> dict[str, Tensor]:
        network = self._plain if plain else self._loss
        with synchronized(network, enabled=synchronize):
            with self.precision.autocast():
                metrics, observed = network(*inputs, seed=self.seed, first_image=first_image)
            (loss_scale * metrics["loss"]).backward()
        if not plain:
            self.observe(*observed)
        return {name: value.detach() for name, value in metrics.items()}

    def observe(self, *tensors: Tensor) -> None:
        """Learn from what a step saw, without a gradient."""

    @torch.no_grad()
    def evaluate(self, progress: Callable[[int], None] | None = None) -> LikelihoodMetrics:
        model = self.eval_model
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        done, first = 0, rank_share(len(self.val_set)).start
        for batch in self.validation():
            inputs = self.inputs(batch)
            with self.precision.autocast():
                loss = self.validation_loss(model, first + done, *inputs).double()
            total += torch.stack([loss, torch.ones_like(loss)]) * len(inputs[0])
            done += len(inputs[0])
            if progress is not None:
                progress(done)
        loss, images = sum_over_ranks(total).tolist()
        return LikelihoodMetrics(loss / images, int(images))

    @abstractmethod
    def validation_loss(self, model: Any, first_image: int, *inputs: Tensor) -> Tensor:
        """Mean loss of some images, numbered from ``first_image`` on, in nats a token; without what training adds."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 of tokens (B, h, w)."""
        parts = tokens.to(self.device).split(self.part)
        return torch.cat([decode_tokens(self.tokenizer, part, self.precision) for part in parts])

    def save_pictures(self, path: Path) -> None:
        """Conditions, samples under them, and what the tokenizer makes of the images they are of."""
        batch = self.tokens_of(self.read(self.val_set, range(min(_SAMPLES, len(self.val_set)))))
        with self.precision.autocast():
            tokens = self.sample(self.eval_model, batch)
        images = self.decode(tokens), self.decode(batch["tokens"])
        save_image_grid(path, self.show(batch), *images, legend=self.legend(batch))

    def finish(self, recorder: Recorder, metrics: LikelihoodMetrics, rows: Mapping[str, object]) -> None:
        path = recorder.picture(self.picture)
        self.save_pictures(path)
        recorder.show_picture(path, self.steps)
        numbers: dict[str, object] = {"loss (nats a token)": metrics.loss, "images": metrics.images}
        numbers |= self.evaluate_samples(recorder)
        recorder.summarize(f"{recorder.folder}", numbers | dict(rows) | {"samples": path})

    @torch.no_grad()
    def evaluate_samples(self, recorder: Recorder) -> Mapping[str, float]:
        """Measure samples as the data set defines it (:meth:`ImageDataset.evaluate_samples`)."""
        tokenizer = _InParts(self.tokenizer, self.part)

        def reconstruct(images: Tensor) -> Tensor:
            return self.decode(tokenizer.tokenize(to_float(images.to(self.device))))

        def sample(batch: Batch, progress: Progress) -> Tensor:
            conditions = tokenize_batch(tokenizer, batch, self.device)
            with self.precision.autocast():
                return self.decode(self.sample(self.eval_model, conditions, progress))

        seed = getattr(self.val_set, "info", self.config.run).seed
        return self.dataset_class.evaluate_samples(
            TrainedPrior(
                condition=self.condition_field,
                image_size=self.tokenizer.image_size,
                seed=seed,
                val_images=len(self.val_set),
                reconstruct=reconstruct,
                sample=sample,
                stage=recorder.stage,
            )
        )


class _InParts:
    """A tokenizer that encodes no more images at once than go through the prior, whatever the size of a batch.

    Args:
        tokenizer: see above.
        size: images of a part.
        compile: compile the encoder, for parts of this size; what is left over goes as it is.
    """

    def __init__(self, tokenizer: VQGAN, size: int, *, compile: bool = False) -> None:
        self._size = size
        self._plain, self._whole = tokenizer.tokenize, maybe_compile(tokenizer.tokenize, compile)

    def tokenize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in -1..1 -> (B, h, w) int64."""
        parts = images.split(self._size)
        return torch.cat([(self._whole if len(part) == self._size else self._plain)(part) for part in parts])
