"""Base class of the recipes of priors: tokenizer, tokens, likelihood, samples."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from regvq_fast.config import read_config
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.image_dataset import ImageDataset, TrainedPrior
from regvq_fast.data.image_files import left_out_note
from regvq_fast.data.loading import default_workers, fingerprint, first_samples, spread_samples
from regvq_fast.data.samples import Batch
from regvq_fast.data.token_cache import read_info
from regvq_fast.data.tokens import TokenBatch, TokenDataset, tokenize_batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.shares import rank_share
from regvq_fast.image_grids import save_image_grid
from regvq_fast.models.hub import hub_name
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.priors.conditions import Condition, choose_condition, conditions_of, fields_of, render
from regvq_fast.priors.config import PriorConfig
from regvq_fast.priors.sampler import PriorSampler, Progress, decode_images
from regvq_fast.ranks import distributed, local_world_size, sum_over_ranks, synchronized, world_size
from regvq_fast.training.compilation import maybe_compile
from regvq_fast.training.optimizers import block_matrices
from regvq_fast.training.recipe import Data, ImagesDone, Networks, Recipe, Step
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.sharding import shard, skeleton

_SAMPLES = 8  # of an image grid

Config = TypeVar("Config", bound=PriorConfig)


@dataclass(frozen=True)
class LikelihoodMetrics:
    """Likelihood of validation tokens under a prior."""

    loss: float
    """Mean over images of the training loss on validation tokens, in nats a token."""
    images: int

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {"loss": self.loss, "images": self.images}


class PriorRecipe(Recipe[Config]):
    """Training of a prior. A subclass defines its network and loss."""

    image_name = "samples"
    sampler: ClassVar[type[PriorSampler]]
    """Sampler of the prior."""
    dataset: type[ImageDataset]
    """Class of the images' data set; `ImageDataset` itself if unknown."""
    conditioned_on: Condition
    """Kind of condition."""
    label_names: tuple[str, ...]
    """Names of the labels; empty unless images are conditioned on them."""

    @staticmethod
    def check_files(config: Config) -> None:
        """Raise ValueError or OSError if files that the network needs are not available."""

    @abstractmethod
    def build_prior(self, config: Config) -> tuple[Any, dict[str, nn.Module]]:
        """Return the network, a `TokenPrior`, and by name the modules without an optimizer whose buffers change."""

    @abstractmethod
    def build_loss(self) -> nn.Module:
        """Return the module of a training step.

        It takes tokens, ids of conditions (the network's `condition_ids`), seed and number of the first image. It
        returns losses and other numbers by name, and tensors for :meth:`observe`.
        """

    @abstractmethod
    def validation_loss(self, model: Any, tokens: Tensor, condition: Tensor | None, first_image: int) -> Tensor:
        """Return the mean loss of some images in nats per token, without regularization."""

    def observe(self, *tensors: Tensor) -> None:
        """Update modules without an optimizer from the tensors of a step."""

    def open_data(self, config: Config) -> Data:
        tokens, seed = config.tokens, config.run.seed
        source = self._own_tokenizer(config) or tokens.tokenizer
        if source is None and tokens.cache is not None:
            source = Path(read_info(tokens.cache).tokenizer)
            if not source.exists() and hub_name(source) is None:
                raise ValueError(f"the tokenizer {source} named by {tokens.cache} is missing: give --tokenizer")
        assert source is not None  # checked
        self.tokenizer = VQGAN.from_pretrained(source)
        self.tokenizer_hash = weights_hash(self.tokenizer)
        if tokens.cache is not None:
            train, val = (
                TokenDataset(tokens.cache, split, seed=seed, tokenizer_hash=self.tokenizer_hash)
                for split in ("train", "val")
            )
            has, made_of = train.info.fields, f"the token cache {tokens.cache}"
            self.conditioned_on = choose_condition(tokens.condition, self.sampler.conditions, has, made_of)
            self.label_names = train.info.label_names if self.conditioned_on == "label" else ()
            try:
                self.dataset = dataset_class(train.info.data)
            except OSError:  # the images may be missing; the tokens suffice
                self.dataset = ImageDataset  # type: ignore[type-abstract]  # never instantiated
            # An epoch covers each image once, regardless of views. Loader processes would not pay: gathering a batch
            # takes less time than passing one between processes.
            self.data = Data(train, val, train.info.train_images, workers=0)
            return self.data
        kind = dataset_class(tokens.data)
        has = kind.count_fields(tokens.data).usable
        self.conditioned_on = choose_condition(tokens.condition, self.sampler.conditions, has, f"--data {tokens.data}")
        shared = {"image_size": self.tokenizer.image_size, "seed": seed, "fields": fields_of(self.conditioned_on)}
        images = build_dataset(tokens.data, split="train", crop=tokens.crop, flip=tokens.flip, **shared)  # type: ignore[arg-type]
        held_out = build_dataset(tokens.data, split="val", length=tokens.val_images, **shared)  # type: ignore[arg-type]
        self.dataset = type(images)
        self.label_names = images.label_names if self.conditioned_on == "label" else ()
        self.data = Data(images, held_out, len(images), default_workers(local_world_size()))
        return self.data

    def _own_tokenizer(self, config: Config) -> Path | None:
        """Return the tokenizer saved in a resumed run, unless ``--tokenizer`` has changed.

        The original path may hold another tokenizer by now, if its run was continued.
        """
        out = config.run.out
        if not config.run.resume or out is None or not (out / TOKENIZER).exists():
            return None
        given = config.tokens.tokenizer != read_config(out, type(config)).tokens.tokenizer
        return None if given else out / TOKENIZER

    def build(self, config: Config) -> tuple[Config, Networks]:
        tokens = replace(config.tokens, condition=self.conditioned_on)  # a resumed run keeps it
        self.config = config = replace(config, tokens=tokens)
        self.tokenizer.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, auxiliary = self.build_prior(config)
        self.model.to(self.device)
        self._sharded = config.run.shard and world_size() > 1
        sharding = f"among {world_size()} processes" if self._sharded else "off: there is one process"
        self._plain_loss = self.build_loss()
        # On the fly, fingerprint the images: their tokens depend on the precision.
        first: Any = first_samples(self.data.train, config.optimizer.batch_size)
        height, width = self.tokenizer.token_shape
        source = f"token cache {tokens.cache}" if tokens.cache else f"{self.data.train.title}, on the fly"
        return config, Networks(
            self.model,
            {"grad_norm": self.model},
            matrices=block_matrices(self.model) if config.optimizer.muon else (),
            auxiliary=auxiliary,
            saved_beside={TOKENIZER: self.tokenizer},
            metadata={
                "tokens": f"{source}: {len(self.data.train):,} training samples, {len(self.data.val):,} for validation"
                f"{left_out_note(self.data.train, self.data.val)}",
                "tokenizer": f"{height} x {width} tokens of {self.tokenizer.quantize.num_codes} codes",
                "condition": self._describe_condition(),
                **({"sharding": sharding} if config.run.shard else {}),
            },
            identity={"as tokenizer": self.tokenizer_hash[:12]},
            fingerprint=fingerprint(first["image" if tokens.cache is None else "tokens"]),
            skeleton=skeleton(self.model) if self._sharded else None,
        )

    def _describe_condition(self) -> str:
        if self.conditioned_on == "none":
            return f"none: unconditional ({' or '.join(self.sampler.conditions[:-1])} would be one)"
        if self.conditioned_on != "label":
            return self.conditioned_on
        names, more = self.label_names, " ..." if len(self.label_names) > 3 else ""
        return f"label, one of {len(names)}: {', '.join(names[:3])}{more}"

    def distribute(self, compile: bool) -> None:
        self._encoder = _MicroBatchEncoder(self.tokenizer, self.micro_batch, compile=compile)
        if self._sharded:
            shard(self._plain_loss, self.device, compile=compile)
            self._loss = self._plain_loss
        else:
            self._loss = distributed(maybe_compile(self._plain_loss, compile))

    def step(self, batch: Batch | TokenBatch, now: Step) -> dict[str, Tensor]:
        tokens, condition = self.inputs(batch)
        network = self._plain_loss if now.plain else self._loss
        # Of a sharded network, gradients that wait to be averaged would outlast the plain pass, and casts that are kept
        # would be all of its weights.
        with synchronized(network, enabled=now.synchronize or now.plain):
            with self.precision.autocast(keep_casts=not self._sharded):
                metrics, observed = network(tokens, condition, seed=now.seed, first_image=now.first_image)
            (now.loss_scale * metrics["loss"]).backward()
        if not now.plain:
            self.observe(*observed)
        return {name: value.detach() for name, value in metrics.items()}

    def inputs(self, batch: Batch | TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Return tokens and condition of a batch on the device."""
        ready = self.tokenize(batch)
        ids = self.model.condition_ids(conditions_of(ready, self.conditioned_on))
        condition = None if ids is None else ids.to(self.device, non_blocking=True)
        return ready["tokens"].to(self.device, non_blocking=True), condition

    def tokenize(self, batch: Any) -> TokenBatch:
        """Return the batch with tokens in place of its images."""
        if "tokens" in batch:
            return batch
        # Nothing takes gradients of it; stated here, since a compiled encoder is one graph more for each mode.
        with torch.no_grad(), self.precision.autocast():
            return tokenize_batch(self._encoder, batch, self.device)

    @torch.no_grad()
    def evaluate(self, model: Any, batches: Any, progress: ImagesDone | None = None) -> LikelihoodMetrics:
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        done, first = 0, rank_share(len(self.data.val)).start
        for batch in batches:
            tokens, condition = self.inputs(batch)
            with self.precision.autocast():
                loss = self.validation_loss(model, tokens, condition, first + done).double()
            total += torch.stack([loss, torch.ones_like(loss)]) * len(tokens)
            done += len(tokens)
            if progress is not None:
                progress(done)
        loss, images = sum_over_ranks(total).tolist()
        return LikelihoodMetrics(loss / images, int(images))

    def sample(self, model: Any, batch: Any, progress: Progress | None = None) -> Tensor:
        """Sample tokens (B, h, w) under the conditions of a batch, with preview settings."""
        sampler = self.sampler.preview(model, self.config.run.seed)
        return sampler.sample(conditions_of(batch, self.conditioned_on), progress=progress)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) uint8 of tokens (B, h, w)."""
        parts = tokens.to(self.device).split(self.micro_batch)
        return torch.cat([decode_images(self.tokenizer, part, self.precision) for part in parts])

    def save_images(self, model: Any, path: Path) -> None:
        batch = self.tokenize(spread_samples(self.data.val, _SAMPLES))
        with self.precision.autocast():
            tokens = self.sample(model, batch)
        kind, names = self.conditioned_on, self.label_names or self.dataset.class_names
        size = self.tokenizer.image_size
        rows, legend = render(kind, conditions_of(batch, kind), (size, size), names)
        save_image_grid(path, *rows, self.decode(tokens), self.decode(batch["tokens"]), legend=legend)

    def summarize(
        self, model: Any, metrics: LikelihoodMetrics, recorder: Recorder
    ) -> tuple[dict[str, object], dict[str, Path]]:
        path = recorder.image_path(self.image_name)
        self.save_images(model, path)
        numbers: dict[str, object] = {"loss (nats a token)": metrics.loss, "images": metrics.images}
        numbers |= self.evaluate_samples(model, recorder)
        return numbers, {self.image_name: path}

    @torch.no_grad()
    def evaluate_samples(self, model: Any, recorder: Recorder) -> Mapping[str, float]:
        """Measure samples by :meth:`ImageDataset.evaluate_samples`."""
        encoder = _MicroBatchEncoder(self.tokenizer, self.micro_batch)

        def reconstruct(images: Tensor) -> Tensor:
            return self.decode(encoder.tokenize(to_float(images.to(self.device))))

        def sample(batch: Batch, progress: Progress) -> Tensor:
            conditions = tokenize_batch(encoder, batch, self.device)
            with self.precision.autocast():
                return self.decode(self.sample(model, conditions, progress))

        return self.dataset.evaluate_samples(
            TrainedPrior(
                condition=self.conditioned_on,
                image_size=self.tokenizer.image_size,
                seed=getattr(self.data.val, "info", self.config.run).seed,
                val_images=len(self.data.val),
                reconstruct=reconstruct,
                sample=sample,
                stage=recorder.stage,
            )
        )


class _MicroBatchEncoder:
    """A tokenizer that encodes a batch in micro-batches.

    Args:
        tokenizer: to wrap.
        size: images per micro-batch.
        compile: compile the encoder for this size; smaller batches are encoded uncompiled.
    """

    def __init__(self, tokenizer: VQGAN, size: int, *, compile: bool = False) -> None:
        self._size = size
        self._plain, self._whole = tokenizer.tokenize, maybe_compile(tokenizer.tokenize, compile)

    def tokenize(self, images: Tensor) -> Tensor:
        """Return tokens (B, h, w) int64 of images (B, 3, H, W) float32 in [-1, 1]."""
        parts = images.split(self._size)
        return torch.cat([(self._whole if len(part) == self._size else self._plain)(part) for part in parts])
