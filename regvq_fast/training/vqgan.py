"""Training of the VQ-GAN: the task of ``train/vq.py``."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.config import VQGANConfig
from regvq_fast.data.loading import ImageData, build_dataset
from regvq_fast.data.pictures import left_out_note
from regvq_fast.data.samples import Batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.codebook import CodebookUsage, perplexity, utilization
from regvq_fast.evaluation.pictures import (
    save_codebook_mosaic,
    save_reconstruction_grid,
    save_usage_histogram,
)
from regvq_fast.evaluation.reconstruction import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.models.features import VGGFeatures
from regvq_fast.ranks import num_ranks, rank, sum_over_ranks
from regvq_fast.training.build import build_discriminator, build_model, build_reconstruction_loss
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.step import VQGANStep
from regvq_fast.training.task import Task
from regvq_fast.training.watch import CollapseAlarm

_GRID_IMAGES = 16


class VQGANTask(Task[VQGANConfig]):
    """A tokenizer in training: autoencoder, quantizer, discriminator."""

    script = "train/vq.py"

    def check(self, config: VQGANConfig) -> None:
        config.check()

    def build_data(self, config: VQGANConfig) -> tuple[ImageData, ImageData]:
        data, seed = config.data, config.run.seed
        train_set = build_dataset(
            data.data, split="train", image_size=data.image_size, seed=seed, crop=data.crop, flip=data.flip
        )
        val_set = build_dataset(data.data, split="val", image_size=data.image_size, length=data.val_images, seed=seed)
        return train_set, val_set

    def build(self) -> dict[str, nn.Module]:
        config, device = self.config, self.device
        self.model = build_model(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        discriminator = build_discriminator(config)
        self.disc_start = self.steps if config.loss.disc_start is None else config.loss.disc_start
        if self.disc_start < self.steps and config.data.image_size < discriminator.min_size:
            raise ValueError(
                f"--image-size {config.data.image_size} is too small for a discriminator of "
                f"{config.model.disc_layers} layers, which needs {discriminator.min_size}: lower --disc-layers"
            )
        if num_ranks() > 1 and device.type == "cuda":  # batch norm over all ranks; it exists on GPUs alone
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator = discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = self.first_samples("image")
        self.model.initialize_quantizer(to_float(first.to(device)))
        reconstruction_loss, losses, self.facts = build_reconstruction_loss(
            config.loss, optional=config.run.preset == "scenes"
        )
        self.config = replace(config, loss=losses)  # a resumed run has the same losses, whatever it finds then
        self.reconstruction_loss = reconstruction_loss.to(  # type: ignore[call-overload]
            device, memory_format=torch.channels_last
        )
        self.usage = CodebookUsage(config.quantizer.num_codes, device)
        self._alarm = CollapseAlarm(config.quantizer.collapse_threshold)
        self._collapse: str | None = None
        return {"grad_norm": self.model, "grad_norm_discriminator": self.discriminator}

    def distribute(self) -> None:
        self.train_step = VQGANStep(
            self.model,
            self.discriminator,
            self.reconstruction_loss,
            self.precision,
            disc_weight=self.config.loss.disc_weight,
            compile=self.compiles,
        )

    def describe(self) -> dict[str, str]:
        config = self.config
        height, width = self.model.token_shape
        quantizer = self.model.quantize
        images = f"{len(self.train_set):,} training images, {len(self.val_set):,} validation images"
        note = left_out_note(self.train_set, self.val_set)
        return {
            "data": f"{self.train_set.label}: {images} of {config.data.image_size} px{note}",
            "tokens": f"{height} x {width} an image",
            "quantizer": f"{type(quantizer).__name__}({quantizer.extra_repr()})",
            "discriminator": self._discriminator_joins(),
        }

    def _discriminator_joins(self) -> str:
        if self.disc_start < self.steps:
            return f"from step {self.disc_start} of {self.steps} on"
        given = self.config.loss.disc_start
        if given is None:
            return "none; --disc-start N brings it in"
        return f"none: --disc-start {given} is past the last step, {self.steps - 1}"

    def identity(self) -> dict[str, str]:
        networks = [m.label for m in self.reconstruction_loss.modules() if isinstance(m, VGGFeatures)]
        return {**super().identity(), "as feature network": ", ".join(networks) or "none"}

    # ---------------------------------------------------------------------------------------------------- training

    def trained_at(self, step: int) -> tuple[str, ...]:
        return tuple(self.trained)[: 2 if self.disc_start <= step else 1]

    def compiles_at(self) -> dict[int, str]:
        joins = {self.disc_start: "compiling the discriminator"} if self.disc_start < self.steps else {}
        return joins | super().compiles_at()

    def before_step(self, step: int) -> None:
        self.model.quantize.set_progress(step / self.steps)

    def scheduled(self) -> list[str]:
        return [*super().scheduled(), *self.model.quantize.scheduled]

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        images = to_float(batch["image"].to(self.device, non_blocking=True))
        return (images.contiguous(memory_format=torch.channels_last),)

    def forward_backward(
        self, *inputs: Tensor, first_image: Tensor, loss_scale: Tensor, synchronize: bool, plain: bool = False
    ) -> dict[str, Tensor]:
        (images,) = inputs
        metrics, indices = self.train_step(
            images,
            self.seed,
            first_image=first_image,
            adversarial=self.disc_start <= self._step,
            loss_scale=loss_scale,
            synchronize=synchronize,
            plain=plain,
        )
        if not plain:
            self.usage.update(indices)
        return metrics

    def measure(self) -> dict[str, float]:
        counts = sum_over_ranks(self.usage.counts).to("cpu", copy=True)
        self.usage.reset()
        self._collapse = self._alarm.check(counts) if self._step >= self.config.optimizer.warmup_steps else None
        return {"utilization": float(utilization(counts)), "perplexity": float(perplexity(counts))}

    def warnings(self) -> list[str]:
        return [self._collapse] if self._collapse else []

    def more_state(self) -> dict[str, Any]:
        return {"usage": sum_over_ranks(self.usage.counts)}

    def load_more(self, state: Mapping[str, Any]) -> None:
        self.usage.counts.copy_(state["usage"] * (rank() == 0))  # sums over the ranks; they are added up again

    # ----------------------------------------------------------------------------------------- evaluation and results

    def evaluate(self, progress: Callable[[int], None] | None = None) -> ReconstructionMetrics:
        loss = self.reconstruction_loss

        def perceptual(x: Tensor, y: Tensor) -> Tensor:
            return loss.perceptual(loss.features(x), loss.features(y))

        return evaluate_reconstruction(
            self.eval_model,
            self.validation(),
            num_codes=self.config.quantizer.num_codes,
            device=self.device,
            autocast=self.precision.autocast(),
            perceptual=perceptual if loss.perceptual_weight > 0 else None,
            progress=progress,
        )

    def save_pictures(self, path: Path) -> None:
        """Grid of validation images and their reconstructions."""
        count = min(_GRID_IMAGES, len(self.val_set))
        originals = self.read(self.val_set, range(count))["image"]
        with torch.no_grad(), self.precision.autocast():
            output = self.eval_model(to_float(originals.to(self.device)))
        save_reconstruction_grid(path, originals, output.reconstruction.float())

    def finish(self, recorder: Recorder, metrics: ReconstructionMetrics, rows: Mapping[str, object]) -> None:
        model = self.eval_model
        pictures = {
            "reconstructions": recorder.picture("reconstructions"),
            "codebook": recorder.picture("codebook"),
            "usage": recorder.picture("usage"),
        }
        self.save_pictures(pictures["reconstructions"])
        with self.precision.autocast():
            save_codebook_mosaic(
                pictures["codebook"],
                lambda indices: model.decode_indices(indices).float(),
                self.config.quantizer.num_codes,
                self.model.token_shape,
                device=self.device,
            )
        title = f"{self.config.quantizer.quantizer}: codes selected on {metrics.images} validation images"
        save_usage_histogram(pictures["usage"], metrics.code_counts, title)
        for path in pictures.values():
            recorder.show_picture(path, self.steps)

        numbers: dict[str, object] = {"quantizer": self.config.quantizer.quantizer, **metrics.scalars()}
        if "perceptual" in numbers:
            numbers[getattr(self.reconstruction_loss.perceptual, "name", "perceptual")] = numbers.pop("perceptual")
        recorder.summarize(f"{recorder.folder}", numbers | dict(rows) | pictures)
