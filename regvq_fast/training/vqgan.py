"""Training of the VQ-GAN: the task that ``train/vq.py`` gives to the loop."""

import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from regvq_fast.config import TrainConfig, check_config, override
from regvq_fast.data.loading import build_dataset, default_workers, training_batches, validation_batches
from regvq_fast.data.samples import Batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.codebook import CodebookUsage
from regvq_fast.evaluation.pictures import (
    atomic_path,
    save_codebook_mosaic,
    save_reconstruction_grid,
    save_usage_histogram,
)
from regvq_fast.evaluation.reconstruction import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.training.build import build_discriminator, build_model, build_reconstruction_loss, choose_device
from regvq_fast.training.optimization import average_weights, build_optimizer, learning_rate
from regvq_fast.training.precision import choose_precision
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.step import VQGANStep

_GRID_IMAGES = 16
_STANDARDIZE_IMAGES = 16
_GRADIENT_METRICS = {"grad_norm", "grad_norm_discriminator", "lambda"}


class VQGANTask:
    """Everything a run needs, built and checked; writes nothing until it is told to.

    Args:
        config: the run; kept as `config` with what was left open resolved.

    Raises:
        ValueError, OSError: what is wrong with the configuration or the data, in one sentence.
    """

    def __init__(self, config: TrainConfig) -> None:
        check_config(config)
        self.device = choose_device(config.run.device)
        data, optimizer = config.data, config.optimizer
        self.train_set = build_dataset(
            data.data,
            split="train",
            image_size=data.image_size,
            seed=config.run.seed,
            crop=data.crop,
            flip=data.flip,
        )
        self.val_set = build_dataset(
            data.data, split="val", image_size=data.image_size, length=data.val_images, seed=config.run.seed
        )
        self.batch_size = optimizer.batch_size
        self.steps = optimizer.steps or math.ceil(optimizer.epochs * len(self.train_set) / self.batch_size)
        self.workers = default_workers() if data.workers is None else data.workers
        self.config = config = override(config, device=str(self.device), steps=self.steps, workers=self.workers)

        torch.manual_seed(config.run.seed)
        self.model = build_model(config).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = build_discriminator(config).to(  # type: ignore[call-overload]
            self.device, memory_format=torch.channels_last
        )
        self.disc_start = self.steps if config.loss.disc_start is None else config.loss.disc_start
        if self.disc_start < self.steps and data.image_size < self.discriminator.min_size:
            raise ValueError(
                f"--image-size {data.image_size} is too small for a discriminator of {config.model.disc_layers} "
                f"layers, which needs {self.discriminator.min_size}: lower --disc-layers"
            )
        # Read here, so that a folder without a readable image is found out before anything is written.
        first = [self.train_set[i]["image"] for i in range(min(self.batch_size, _STANDARDIZE_IMAGES))]
        if self.model.quantize.expects_unit_variance:
            self.model.standardize_latents(to_float(torch.stack(first).to(self.device)))
        reconstruction_loss, self.facts = build_reconstruction_loss(config.loss)
        self.reconstruction_loss = reconstruction_loss.to(  # type: ignore[call-overload]
            self.device, memory_format=torch.channels_last
        )
        self.precision = choose_precision(config.run.amp, self.device)
        self.train_step = VQGANStep(
            self.model,
            self.discriminator,
            self.reconstruction_loss,
            self.precision,
            disc_weight=config.loss.disc_weight,
            compile=config.run.compile,
        )
        self.optimizers = [build_optimizer(m, optimizer) for m in (self.model, self.discriminator)]
        self.scaler = self.precision.scaler()
        self.average = average_weights(self.model, optimizer.ema)

        # One seed a step, counted on the device: mask, noise and sampled places are functions of it.
        self.seed = torch.tensor((config.run.seed & 0x7FFFFFFF) << 32, device=self.device)
        self.usage = CodebookUsage(config.quantizer.num_codes, self.device)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._batches: Iterator[Batch] | None = None
        self.lr = 0.0
        self.facts = self._describe() | self.facts

    def _describe(self) -> dict[str, str]:
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        parameters = sum(p.numel() for p in self.model.parameters())
        height, width = self.model.token_shape
        quantizer = self.model.quantize
        source = "embedded scenes" if self.config.data.data is None else str(self.config.data.data)
        return {
            "device": device,
            "precision": self.precision.reason,
            "data": f"{source}, {len(self.val_set)} validation images of {self.config.data.image_size} px",
            "model": f"{parameters / 1e6:.1f} M parameters, {height} x {width} tokens",
            "quantizer": f"{type(quantizer).__name__}({quantizer.extra_repr()})",
        }

    # ---------------------------------------------------------------------------------------------------- training

    def step(self, step: int) -> None:
        """One optimizer step on the next batch."""
        if self._batches is None:
            self._batches = training_batches(
                self.train_set, self.batch_size, workers=self.workers, pin_memory=self.device.type == "cuda"
            )
        parts = self.config.optimizer.accumulate
        adversarial = self.disc_start <= step
        self.model.train()
        self.discriminator.train()
        self.model.quantize.set_progress(step / self.steps)
        self.lr = learning_rate(self.config.optimizer, step, self.steps)
        self.seed += 1

        images = to_float(next(self._batches)["image"].to(self.device, non_blocking=True))
        images = images.contiguous(memory_format=torch.channels_last)
        loss_scale = self.scaler.scale(torch.ones((), device=self.device)) / parts
        for k, part in enumerate(images.chunk(parts)):
            first_image = torch.full((), k * len(part), device=self.device)
            metrics, indices = self.train_step(
                part, self.seed, first_image=first_image, adversarial=adversarial, loss_scale=loss_scale
            )
            self._add(metrics)
            self.usage.update(indices)
        modules = (self.model, self.discriminator) if adversarial else (self.model,)
        for module, optimizer in zip(modules, self.optimizers, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            self.scaler.unscale_(optimizer)
            if self.config.optimizer.clip_grad > 0:
                norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.config.optimizer.clip_grad)
                self._add({"grad_norm" if module is self.model else "grad_norm_discriminator": norm})
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def record(self) -> dict[str, float]:
        """Means of the numbers since the last call; the only place where training waits for the device."""
        names = list(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist()
        means = {name: value / self._counts[name] for name, value in zip(names, values, strict=True)}
        means["utilization"] = float(self.usage.utilization())
        means["perplexity"] = float(self.usage.perplexity())
        means["lr"] = self.lr
        self._sums, self._counts = {}, {}
        self.usage.reset()
        if self.scaler.is_enabled():  # it skips steps whose scaled gradients overflow: part of its search for a scale
            means["loss_scale"] = self.scaler.get_scale()
            for name in _GRADIENT_METRICS & means.keys():
                if not math.isfinite(means[name]):
                    del means[name]
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} became {means[bad[0]]}: lower --lr, or run without --amp to see whether it is fp16"
            )
        return means

    # -------------------------------------------------------------------------------------- evaluation and pictures

    @property
    def eval_model(self) -> VQGAN:
        """The model that is judged and saved: the averaged weights where there are any."""
        return cast(VQGAN, self.model if self.average is None else self.average.module).eval()

    def save_reconstructions(self, path: Path) -> None:
        """Grid of validation images and their reconstructions."""
        count = min(_GRID_IMAGES, len(self.val_set))
        originals = torch.stack([self.val_set[i]["image"] for i in range(count)])
        with torch.no_grad(), self.precision.autocast():
            output = self.eval_model(to_float(originals.to(self.device)))
        save_reconstruction_grid(path, originals, output.reconstruction.float())

    def evaluate(self) -> ReconstructionMetrics:
        """Reconstruction and codebook metrics over the validation images."""
        loss = self.reconstruction_loss

        def perceptual(x: Tensor, y: Tensor) -> Tensor:
            return loss.perceptual(loss.features(x), loss.features(y))

        return evaluate_reconstruction(
            self.eval_model,
            validation_batches(self.val_set, self.batch_size, workers=self.workers),
            num_codes=self.config.quantizer.num_codes,
            device=self.device,
            autocast=self.precision.autocast(),
            perceptual=perceptual if loss.perceptual_weight > 0 else None,
        )

    def finish(self, recorder: Recorder, metrics: ReconstructionMetrics, images_per_second: float) -> None:
        """Save model and pictures, and print the summary."""
        model = self.eval_model
        with atomic_path(recorder.folder / "model.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
        pictures = {
            "reconstructions": recorder.picture("reconstructions"),
            "codebook": recorder.picture("codebook"),
            "usage": recorder.picture("usage"),
        }
        self.save_reconstructions(pictures["reconstructions"])
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

        rows: dict[str, object] = {"quantizer": self.config.quantizer.quantizer, **metrics.scalars()}
        if "perceptual" in rows:
            rows[getattr(self.reconstruction_loss.perceptual, "name", "perceptual")] = rows.pop("perceptual")
        unreadable = sum(getattr(s, "unreadable", 0) for s in (self.train_set, self.val_set))
        if unreadable:
            rows["unreadable images"] = unreadable
        rows["images/s"] = images_per_second
        rows["peak memory (GiB)"] = self._peak_memory()
        rows["model"] = recorder.folder / "model.safetensors"
        rows |= pictures
        recorder.summarize(f"{recorder.folder}", rows)

    def _peak_memory(self) -> float:
        """GiB: of the GPU's allocations, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
