"""The recipe of the VQ-GAN: autoencoder, quantizer and discriminator (``regvq train vq``)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regvq_fast.config import VQGANConfig
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.image_files import left_out_note
from regvq_fast.data.loading import default_workers, fingerprint, first_samples, read_samples, spread_samples
from regvq_fast.data.samples import Batch
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.codebook import CodebookUsage, perplexity, utilization
from regvq_fast.evaluation.plots import save_codebook_mosaic, save_reconstruction_grid, save_usage_histogram
from regvq_fast.evaluation.reconstruction_metrics import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.losses.adversarial import ADVERSARIAL_LOSSES, LeCAM
from regvq_fast.models.discriminator import PatchDiscriminator
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.pretrained import step_folders
from regvq_fast.ranks import local_world_size, rank, sum_over_ranks, world_size
from regvq_fast.training.build import build_model, build_reconstruction_loss
from regvq_fast.training.recipe import Data, ImagesDone, Networks, Recipe, Step
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.starting import begin, check_architecture, freeze, read_weights, start_model
from regvq_fast.training.vqgan_step import VQGANStep

_GRID_IMAGES = 16
_START_IMAGES = 64  # their latents fit the codebook and scales of a quantizer that starts from weights


class VQGANRecipe(Recipe[VQGANConfig]):
    """Training of an image tokenizer."""

    command = "train vq"
    usage = """Train an image tokenizer: a VQ-GAN with Reg-VQ, or a baseline.

    regvq train vq --compile --amp           # embedded scenes; minutes on a CPU
    regvq train vq --data photos/ --image-size 128 --steps 20000 --compile --amp
    torchrun --nproc-per-node 4 -m regvq_fast train vq --preset ade20k --data ADE20K/ --amp
    regvq train vq --resume --out runs/NAME  # continue a run that stopped
    regvq train vq --init-from last.ckpt --quantizer reg-vq --data photos/

A run leaves its configuration, metrics, images, checkpoints and weights in --out.
"""

    @classmethod
    def begin(
        cls, config: VQGANConfig, source: str, quantizer: str | None
    ) -> tuple[VQGANConfig, Callable[[VQGANConfig], VQGANConfig]]:
        return begin(config, source, quantizer)

    def open_data(self, config: VQGANConfig) -> Data:
        data, seed = config.data, config.run.seed
        train = build_dataset(
            data.data, split="train", image_size=data.image_size, seed=seed, crop=data.crop, flip=data.flip
        )
        val = build_dataset(data.data, split="val", image_size=data.image_size, length=data.val_images, seed=seed)
        self.data = Data(train, val, len(train), default_workers(local_world_size()))
        return self.data

    def build(self, config: VQGANConfig) -> tuple[VQGANConfig, Networks]:
        steps, device, layout = config.optimizer.steps or 0, self.device, torch.channels_last
        run, weights = config.run, None
        if config.model.init_from is not None and not (run.resume and run.out and step_folders(run.out)):
            weights = read_weights(config.model.init_from)
            check_architecture(config, weights.model)
        self.model = build_model(config).to(device, memory_format=layout)  # type: ignore[call-overload]
        shape = config.model
        discriminator = PatchDiscriminator(3, shape.disc_filters, shape.disc_layers, shape.disc_norm)
        self.disc_start = disc_start = steps if config.loss.disc_start is None else config.loss.disc_start
        if disc_start < steps and config.data.image_size < discriminator.min_size:
            raise ValueError(
                f"--image-size {config.data.image_size} is too small for a discriminator of "
                f"{config.model.disc_layers} layers, which needs {discriminator.min_size}: lower --disc-layers"
            )
        if world_size() > 1 and device.type == "cuda":  # SyncBatchNorm needs GPUs
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        started: dict[str, str] = {}
        if weights is not None:
            started["weights"] = f"{config.model.init_from}: {weights.report}"
            found = weights.discriminator
            if found and all(getattr(shape, name) == value for name, value in found.settings.items()):
                discriminator.load_state_dict(found.state_dict)
                started["weights"] += ", discriminator taken"
        self.discriminator = discriminator.to(device, memory_format=layout)  # type: ignore[call-overload]
        first = first_samples(self.data.train, config.optimizer.batch_size)["image"]
        if weights is None:
            self.model.initialize_quantizer(to_float(first.to(device)))
        else:
            some = read_samples(self.data.train, range(min(_START_IMAGES, len(self.data.train))))["image"]
            started["codebook"] = start_model(
                self.model,
                weights.model.to(device, memory_format=layout),  # type: ignore[call-overload]
                to_float(some.to(device)),
                reset_codebook=config.model.reset_codebook,
                micro_batch=self.micro_batch,
            )
        self._frozen = freeze(self.model, config.model.freeze)
        if config.model.freeze:
            count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            started["frozen"] = f"{', '.join(config.model.freeze)}; {count / 1e6:.1f} M parameters of the model train"
        loss, losses, feature_networks = build_reconstruction_loss(config.loss, optional=config.run.preset == "scenes")
        self.lecam = LeCAM(losses.lecam_weight).to(device) if losses.lecam_weight > 0 else None
        optimizer = config.optimizer
        disc_optimizer = replace(
            optimizer, lr=losses.disc_lr or optimizer.lr, betas=losses.disc_betas or optimizer.betas
        )
        self.config = config = replace(config, loss=losses)  # a resumed run keeps these losses
        self.reconstruction_loss = loss.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.meter = CodebookMeter(config, device)

        joins = f"from step {disc_start:,} of {steps:,} on"
        if disc_start >= steps:
            joins = f"none: --disc-start {disc_start} is past the last step, {steps - 1}"
            if config.loss.disc_start is None:
                joins = "none; --disc-start N brings it in"
        quantizer, (height, width) = self.model.quantize, self.model.token_shape
        images = f"{len(self.data.train):,} training images, {len(self.data.val):,} validation images"
        left_out = left_out_note(self.data.train, self.data.val)
        features = [module.label for module in loss.modules() if isinstance(module, VGGFeatures)]
        return config, Networks(
            self.model,
            {"grad_norm": self.model, "grad_norm_discriminator": self.discriminator},
            first_step={"grad_norm_discriminator": disc_start},
            optimizers={"grad_norm_discriminator": disc_optimizer},
            auxiliary={} if self.lecam is None else {"lecam": self.lecam},
            metadata={
                "data": f"{self.data.train.title}: {images} of {config.data.image_size} px{left_out}",
                "tokens": f"{height} x {width} an image",
                "quantizer": f"{type(quantizer).__name__}({quantizer.extra_repr()})",
                **started,
                "discriminator": joins,
                **feature_networks,
            },
            identity={"as feature network": ", ".join(features) or "none"},
            fingerprint=fingerprint(first),
            scheduled=tuple(quantizer.scheduled),
            meter=self.meter,
        )

    def distribute(self, compile: bool) -> None:
        loss = self.config.loss
        self.train_step = VQGANStep(
            self.model,
            self.discriminator,
            self.reconstruction_loss,
            self.precision,
            adversarial_loss=ADVERSARIAL_LOSSES[loss.disc_loss],
            disc_weight=loss.disc_weight,
            lecam=self.lecam,
            r1_weight=loss.r1_weight * loss.r1_every,
            compile=compile,
        )

    def step(self, batch: Batch, now: Step) -> dict[str, Tensor]:
        images = to_float(batch["image"].to(self.device, non_blocking=True))
        for module in self._frozen:
            module.eval()
        self.model.quantize.set_progress(now.number / (self.config.optimizer.steps or 1))
        with_discriminator, loss = now.number - self.disc_start, self.config.loss
        metrics, indices = self.train_step(
            images.contiguous(memory_format=torch.channels_last),
            now.seed,
            first_image=now.first_image,
            adversarial=with_discriminator >= 0,
            penalize=loss.r1_weight > 0 and with_discriminator % loss.r1_every == 0 and not now.plain,
            loss_scale=now.loss_scale,
            synchronize=now.synchronize,
            plain=now.plain,
        )
        if not now.plain:
            self.meter.usage.update(indices)
        return metrics

    def evaluate(self, model: Any, batches: Any, progress: ImagesDone | None = None) -> ReconstructionMetrics:
        loss = self.reconstruction_loss

        def perceptual(x: Tensor, y: Tensor) -> Tensor:
            return loss.perceptual(loss.features(x), loss.features(y))

        return evaluate_reconstruction(
            model,
            batches,
            num_codes=self.config.quantizer.num_codes,
            device=self.device,
            autocast=self.precision.autocast(),
            perceptual=perceptual if loss.perceptual_weight > 0 else None,
            progress=progress,
        )

    def save_images(self, model: Any, path: Path) -> None:
        originals = spread_samples(self.data.val, _GRID_IMAGES)["image"]
        with torch.no_grad(), self.precision.autocast():
            output = model(to_float(originals.to(self.device)))
        save_reconstruction_grid(path, originals, output.reconstruction.float())

    def summarize(
        self, model: Any, metrics: ReconstructionMetrics, recorder: Recorder
    ) -> tuple[dict[str, object], dict[str, Path]]:
        paths = {name: recorder.image_path(name) for name in ("reconstructions", "codebook", "usage")}
        config = self.config.quantizer
        self.save_images(model, paths["reconstructions"])
        with self.precision.autocast():
            save_codebook_mosaic(
                paths["codebook"],
                lambda indices: model.decode_indices(indices).float(),
                config.num_codes,
                self.model.token_shape,
                device=self.device,
            )
        title = f"{config.quantizer}: codes selected on {metrics.images} validation images"
        save_usage_histogram(paths["usage"], metrics.code_counts, title)
        numbers: dict[str, object] = {"quantizer": config.quantizer, **metrics.scalars()}
        if "perceptual" in numbers:
            numbers[getattr(self.reconstruction_loss.perceptual, "name", "perceptual")] = numbers.pop("perceptual")
        numbers["parameters"] = sum(p.numel() for p in model.parameters())
        numbers["parameters of the quantizer"] = sum(p.numel() for p in model.quantize.parameters())
        return numbers, paths


class CodebookMeter:
    """Utilization and perplexity of the codebook between two records, with one warning if it collapses.

    Args:
        config: of the run.
        device: of the indices.
    """

    def __init__(self, config: VQGANConfig, device: torch.device) -> None:
        self.usage = CodebookUsage(config.quantizer.num_codes, device)
        self._warmup, self._threshold = config.optimizer.warmup_steps, config.quantizer.collapse_threshold
        self._silent = self._threshold == 0

    def read(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the numbers and warnings of the window that ends at a step, and begin a new one."""
        counts = sum_over_ranks(self.usage.counts).to("cpu", copy=True)
        self.usage.reset()
        numbers = {"utilization": float(utilization(counts)), "perplexity": float(perplexity(counts))}
        warning = self.collapse(counts) if step > self._warmup else None
        return numbers, [] if warning is None else [warning]

    def collapse(self, counts: Tensor) -> str | None:
        """Return a warning, at most once, if the counts (N,) show too few used codes."""
        used = float(utilization(counts))
        attainable = 1 - (1 - 1 / len(counts)) ** int(counts.sum())  # expected from that many uniform samples
        if self._silent or used >= self._threshold * attainable:
            return None
        self._silent = True
        return (
            f"the codebook is collapsing: {used:.1%} of {len(counts)} codes were used since the last record "
            f"(--collapse-threshold {self._threshold:g}); docs/troubleshooting.md says what helps"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts of all ranks."""
        return {"usage": sum_over_ranks(self.usage.counts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`, whose sums over the ranks go to rank 0."""
        self.usage.counts.copy_(state["usage"] * (rank() == 0))
