"""Training of the VQ-GAN: the task that ``train/vq.py`` gives to the loop."""

import hashlib
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from regvq_fast.config import TrainConfig, check_config, override
from regvq_fast.data.loading import build_dataset, default_workers, training_batches, validation_batches
from regvq_fast.data.samples import Batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.codebook import CodebookUsage, perplexity, utilization
from regvq_fast.evaluation.pictures import (
    save_codebook_mosaic,
    save_reconstruction_grid,
    save_usage_histogram,
)
from regvq_fast.evaluation.reconstruction import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.files import atomic_path
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.pretrained import WEIGHTS, weights_to_bytes
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.ranks import rank, sum_over_ranks
from regvq_fast.training.build import build_discriminator, build_model, build_reconstruction_loss, choose_device
from regvq_fast.training.checkpoint import Checkpoint, random_state, set_random_state
from regvq_fast.training.optimization import average_weights, build_optimizer, learning_rate
from regvq_fast.training.precision import choose_precision
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.step import VQGANStep
from regvq_fast.training.watch import OVERFLOWING, CollapseAlarm, Reading, Rollback, Watch

_GRID_IMAGES = 16
_STANDARDIZE_IMAGES = 16


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
        self._first_images = hashlib.sha256(torch.stack(first).numpy().tobytes()).hexdigest()
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
        self.watch = Watch(self.device)
        self.average = average_weights(self.model, optimizer.ema, self.watch.skip)
        for adamw in self.optimizers:
            adamw.found_inf = self.watch.skip  # type: ignore[attr-defined]  # its fused kernel does nothing where it is 1
        self._rollback = Rollback(self.model, self.discriminator)
        self._alarm = CollapseAlarm(config.run.collapse_threshold)
        self._reading = Reading({}, 0, [], 0)
        self._collapse: str | None = None

        # One seed a step, counted on the device: mask, noise and sampled places are functions of it.
        self.seed = torch.tensor((config.run.seed & 0x7FFFFFFF) << 32, device=self.device)
        self.usage = CodebookUsage(config.quantizer.num_codes, self.device)
        self._batches: Iterator[Batch] | None = None
        self.start = 0
        """Steps done before this process."""
        self._step = 0
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
        """One optimizer step on the batch that is this step's; skipped on the device where a number is not finite."""
        if self._batches is None:
            self._batches = training_batches(
                self.train_set,
                self.batch_size,
                start=step * self.batch_size,
                workers=self.workers,
                pin_memory=self.device.type == "cuda",
            )
        batch = next(self._batches)["image"]  # first: should it fail, the task is still as after the step before
        self._step = step
        parts = self.config.optimizer.accumulate
        adversarial = self.disc_start <= step
        self.model.train()
        self.discriminator.train()
        self.model.quantize.set_progress(step / self.steps)
        self.lr = learning_rate(self.config.optimizer, step, self.steps)
        self.seed += 1
        self._rollback.save()

        images = to_float(batch.to(self.device, non_blocking=True))
        images = images.contiguous(memory_format=torch.channels_last)
        loss_scale = self.scaler.scale(torch.ones((), device=self.device)) / parts
        for k, part in enumerate(images.chunk(parts)):
            first_image = torch.full((), k * len(part), device=self.device)
            try:
                metrics, indices = self.train_step(
                    part, self.seed, first_image=first_image, adversarial=adversarial, loss_scale=loss_scale
                )
            except FloatingPointError as error:
                self.watch.break_off(error)
                break
            self.watch.add(metrics)
            self.usage.update(indices)
        self._update(adversarial)

    def _update(self, adversarial: bool) -> None:
        """Let the optimizers take the gradients, if all numbers of the step are finite."""
        trained = {"grad_norm": (self.model, self.optimizers[0])}
        if adversarial:
            trained["grad_norm_discriminator"] = (self.discriminator, self.optimizers[1])
        norms = {}
        for name, (module, optimizer) in trained.items():
            self.scaler.unscale_(optimizer)
            norms[name] = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        self.watch.judge(norms)
        for name, (module, optimizer) in trained.items():
            if self.config.optimizer.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(module.parameters(), self.config.optimizer.clip_grad, norms[name])
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self._rollback.restore(self.watch.skip)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def record(self) -> dict[str, float | str]:
        """Means of the numbers since the last call; training waits for the device here."""
        self._reading = reading = self.watch.read()
        counts = sum_over_ranks(self.usage.counts).to("cpu", copy=True)
        self.usage.reset()
        values: dict[str, float | str] = {
            **reading.means,
            "utilization": float(utilization(counts)),
            "perplexity": float(perplexity(counts)),
            "lr": self.lr,
            "skipped": reading.skipped,
        }
        if reading.causes:
            values["not_finite"] = ", ".join(reading.causes)
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        self._collapse = self._alarm.check(counts) if self._step >= self.config.optimizer.warmup_steps else None
        return values

    def review(self) -> list[str]:
        """Warnings about what was recorded last.

        Raises:
            FloatingPointError: more steps in a row were skipped than ``--max-skipped`` allows.
        """
        _, skipped, causes, longest = self._reading
        if longest > (allowed := self.config.run.max_skipped):
            raise FloatingPointError(
                f"{longest} steps in a row were skipped (--max-skipped {allowed}), not finite: {', '.join(causes)}"
            )
        warnings = [self._collapse] if self._collapse else []
        # Loss scaling skips steps whose scaled gradients overflow, as part of its search for a scale.
        if skipped and not (self.scaler.is_enabled() and OVERFLOWING.issuperset(causes)):
            steps = "a step was" if skipped == 1 else f"{skipped} steps were"
            warnings.append(f"{steps} skipped since the last record, not finite: {', '.join(causes)}")
        return warnings

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside the weights of `eval_model`: tensors and plain values."""
        average = self.average
        return {
            "identity": self._identity(),
            "first_images": self._first_images,
            "model": None if average is None else self.model.state_dict(),
            "updates_of_average": 0 if average is None else int(average.n_averaged),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "seed": self.seed,
            "usage": sum_over_ranks(self.usage.counts),
            "watch": self.watch.state_dict(),
            "random": random_state(self.device),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, as if there had been no break; what the checkpoint held is let go.

        Raises:
            ValueError: the checkpoint is of other data or of other losses.
        """
        if checkpoint.folder is None:
            return
        state, weights = checkpoint.state, checkpoint.weights
        for name, value in self._identity().items():
            saved = state["identity"].get(name)
            if value != saved:
                raise ValueError(
                    f"this run has {value} {name}, the checkpoint {checkpoint.folder} has {saved}: resume with the same"
                )
        if self._first_images != state["first_images"]:
            checkpoint.notes.append(
                "the first training images differ from those of the checkpoint, of which there are as many: another "
                "folder, or another version of Pillow?"
            )
        self.start = checkpoint.step
        if self.average is None:
            self.model.load_state_dict(weights)
        else:
            self.model.load_state_dict(state["model"])
            self.eval_model.load_state_dict(weights)
            self.average.n_averaged.fill_(state["updates_of_average"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and state["scaler"]:  # empty where it was not enabled: it starts afresh then
            self.scaler.load_state_dict(state["scaler"])
        self.seed.copy_(state["seed"])
        self.usage.counts.copy_(state["usage"] * (rank() == 0))  # sums over the ranks; they are added up again
        self.watch.load_state_dict(state["watch"])
        set_random_state(state["random"], self.device)
        weights.clear()
        del state["model"], state["discriminator"], state["optimizers"]

    def _identity(self) -> dict[str, str]:
        """What a configuration doesn't tell of the data and the losses."""
        networks = [m.label for m in self.reconstruction_loss.modules() if isinstance(m, VGGFeatures)]
        return {"training images": str(len(self.train_set)), "as feature network": ", ".join(networks) or "none"}

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

    def evaluate(self, progress: Callable[[int], None] | None = None) -> ReconstructionMetrics:
        """Reconstruction and codebook metrics over the validation images; ``progress`` gets the number done."""
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
            progress=progress,
        )

    def finish(self, recorder: Recorder, metrics: ReconstructionMetrics, images_per_second: float) -> None:
        """Save model and pictures, and print the summary."""
        model = self.eval_model
        with atomic_path(recorder.folder / WEIGHTS) as temporary:
            temporary.write_bytes(weights_to_bytes(model.state_dict()))
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
        rows["model"] = recorder.folder / WEIGHTS
        rows |= pictures
        recorder.summarize(f"{recorder.folder}", rows)

    def _peak_memory(self) -> float:
        """GiB: of the GPU's allocations, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
