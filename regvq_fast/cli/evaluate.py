"""The command ``regvq evaluate``: metrics of trained models over a whole validation split, with protocols."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from regvq_fast.cli.evaluate_setup import EvaluateConfig, Setup, check_flags, data_of, few_images_note
from regvq_fast.cli.evaluate_suite import SuiteEvaluation
from regvq_fast.config import run_command
from regvq_fast.console import progress_bar, say
from regvq_fast.data.datasets import build_dataset
from regvq_fast.evaluation.feature_nets import PerceptualDistance
from regvq_fast.evaluation.fid import (
    Reference,
    TooFewImagesWarning,
    default_cache,
    describe_data,
    make_reference,
    statistics_of,
)
from regvq_fast.evaluation.measurement import (
    CODE_COUNTS,
    RESULTS,
    Measurement,
    print_measurements,
    write_measurements,
)
from regvq_fast.evaluation.metrics import evaluate_tokenizer, fid_of_samples, open_samples
from regvq_fast.evaluation.plots import save_entropy_map
from regvq_fast.evaluation.reconstruction_metrics import SSIM_WINDOW, ReconstructionMetrics
from regvq_fast.evaluation.shares import rank_batches, rank_share, unreadable_images
from regvq_fast.files import atomic_path
from regvq_fast.models.features import NoWeightsError
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.ownership import FolderLock
from regvq_fast.precision import inference_device
from regvq_fast.priors.conditions import fields_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.ranks import process_group, raise_on_all_ranks, rank, rank_0_first

ENTROPY_MAP = "token_entropy.png"
"""Plot of the entropy of a tokenizer's codes at each position."""

USAGE = """Measure a trained tokenizer, and images sampled by a prior, over a whole validation split.

    regvq evaluate --run runs/vq                     # PSNR, SSIM, LPIPS, FID[R]
    regvq evaluate --prior-run runs/ar --top-p 0.95  # and FID[G] of its samples
    regvq evaluate --images samples --data photos --image-size 256  # FID[G]
    regvq evaluate --images samples.npz --reference reference.npz   # like ADM
    regvq evaluate --run runs/vq --fid-features vgg16:vgg16.pth

Writes evaluation.json: each number beside the protocol it was measured by. Of a tokenizer also code_counts.json and
token_entropy.png.
"""


def evaluate(config: EvaluateConfig) -> dict[str, Measurement]:
    """Measure what the configuration names, print it and write evaluation.json; under ``torchrun`` by all ranks.

    Returns:
        By key: psnr, ssim, perceptual, utilization, perplexity, position_entropy and fid_r of a tokenizer, fid_g of
        sampled images; against a reference file also sfid, inception_score, precision and recall.

    Raises:
        ValueError, OSError: settings, models, data or weights can't be used; one sentence, before work starts.
    """
    device = inference_device(config.device)
    with process_group(device):
        with raise_on_all_ranks(), rank_0_first():  # it may download weights, and index shards
            check_flags(config)
            setup = Setup(config, device)
            evaluation = _SplitEvaluation(setup) if config.reference is None else SuiteEvaluation(setup)
        with ExitStack() as owned:
            with raise_on_all_ranks():
                if rank() == 0:
                    owned.enter_context(FolderLock(setup.out, "evaluation"))
            results = evaluation.measure()
            if rank() == 0:
                path = setup.out / RESULTS
                write_measurements(path, results)
                print_measurements(setup.console, results)
                say(setup.console, "results", str(path))
    return results


class _SplitEvaluation:
    """An evaluation over a validation split; the constructor opens and checks models, data and networks."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config, self.net = setup, setup.config, setup.net
        config, device = setup.config, setup.device
        self.cache = config.cache_dir or default_cache()
        self.sampler: ImageSampler | None = None
        if config.prior_run is not None:
            self.sampler = ImageSampler.from_run(config.prior_run, config, setup.precision)
        self.tokenizer = self._load_tokenizer()
        self.perceptual: PerceptualDistance | None = None
        if self.tokenizer is not None:
            self.tokenizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.perceptual = self._load_perceptual()
        size = config.image_size if self.tokenizer is None else self.tokenizer.image_size
        assert size is not None  # checked
        for name, least in self._least_sizes():
            if size < least:
                raise ValueError(
                    f"{name} needs images of at least {least} pixels a side, these have {size}: use larger ones"
                )
        data = data_of(config, self.sampler)
        self.dataset = build_dataset(
            data,
            split="val",
            image_size=size,
            length=config.val_images,
            seed=config.data_seed,
            fields=() if self.sampler is None else fields_of(self.sampler.condition),
        )
        if self.sampler is not None:
            self.sampler.check_labels(self.dataset)
        self.samples = None if config.images is None else open_samples(config.images, size)
        for what, images in (("validation", self.dataset), ("sampled", self.samples)):
            if self.net is not None and images is not None and len(images) < 2:
                raise ValueError(f"a Fréchet distance needs at least 2 {what} images, got {len(images)}")
        self.protocol: dict[str, Any] = {}
        self.results: dict[str, Measurement] = {}

    def _load_tokenizer(self) -> VQGAN | None:
        config = self.config
        tokenizer = None if config.run is None else VQGAN.from_pretrained(config.run)
        if self.sampler is None:
            return tokenizer
        own = self.sampler.tokenizer
        if tokenizer is not None and (given := weights_hash(tokenizer)) != (wanted := weights_hash(own)):
            raise ValueError(
                f"--run {config.run} (SHA-256 {given[:12]}) is not the tokenizer of --prior-run {config.prior_run} "
                f"({wanted[:12]}): evaluate them separately, or leave out --run"
            )
        return own

    def _load_perceptual(self) -> PerceptualDistance | None:
        try:
            return PerceptualDistance(self.config.perceptual_weights).to(self.setup.device)
        except NoWeightsError as error:
            say(
                self.setup.console,
                "left out",
                f'perceptual distance: {error}; give --perceptual-weights PATH, or "random"',
            )
            return None

    def _least_sizes(self) -> Iterator[tuple[str, int]]:
        if self.tokenizer is not None:
            yield "SSIM", SSIM_WINDOW
        for net in (self.perceptual, self.net):
            if net is not None:
                yield net.name, net.min_size

    # ------------------------------------------------------------------------------------------------------- measuring

    def measure(self) -> dict[str, Measurement]:
        """Return the metrics by key; for a tokenizer also save its code counts and their plot."""
        config, device, loading = self.config, self.setup.device, self.setup.loading
        reference = metrics = None
        described = describe_data(self.dataset)
        self.protocol = {**described, **self._metadata()}
        with progress_bar(self.setup.console) as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", TooFewImagesWarning)  # the protocol has a note instead

            def bar(name: str, images: int = len(self.dataset)) -> Callable[[int], None]:
                task = progress.add_task(name, total=len(rank_share(images)))
                return lambda done: progress.update(task, completed=done)

            if self.net is not None:
                reference = make_reference(
                    self.dataset,
                    self.net,
                    device=device,
                    cache=self.cache,
                    data=described,
                    progress=bar("validation images"),
                    **loading,
                )
            if self.tokenizer is not None:
                metrics = evaluate_tokenizer(
                    self.tokenizer,
                    self.dataset,
                    reference=reference,
                    perceptual=self.perceptual,
                    device=device,
                    autocast=self.setup.precision.autocast(),
                    progress=bar("reconstructions"),
                    **loading,
                )
                self._keep_reconstruction(metrics.reconstruction)
                if reference is not None and metrics.frechet is not None:
                    self._keep_frechet("fid_r", metrics.frechet, reference, len(self.dataset), {})
            if reference is not None and self.sampler is not None:
                value = fid_of_samples(self.sampler, self.dataset, reference, progress=bar("samples"), **loading)
                details = {"prior_run": str(config.prior_run), **self.sampler.describe()}
                self._keep_frechet("fid_g", value, reference, len(self.dataset), details)
            if reference is not None and self.samples is not None:
                images = (batch["image"] for batch in rank_batches(self.samples, device=device, **loading))
                tick = bar("samples", len(self.samples))
                sampled = statistics_of(images, reference.net, device, tick)
                details = {"sampled_images": str(config.images)}
                self._keep_frechet("fid_g", reference.distance(sampled), reference, sampled.count, details)
        # Unreadable images were replaced by the next ones; a cached reference is not read again.
        if unreadable := max(unreadable_images(self.dataset), reference.unreadable if reference is not None else 0):
            for found in self.results.values():
                found.protocol["unreadable"] = unreadable
        # At the end, beside the results: the folder may be removed meanwhile.
        if metrics is not None and rank() == 0:
            with atomic_path(self.setup.out / CODE_COUNTS) as temporary:
                temporary.write_text(f"{metrics.reconstruction.code_counts.tolist()}\n")
            save_entropy_map(self.setup.out / ENTROPY_MAP, metrics.reconstruction.position_entropy)
        return self.results

    def _metadata(self) -> dict[str, Any]:
        """Return the part of the protocol that does not describe the images."""
        metadata: dict[str, Any] = {}
        if self.tokenizer is not None:
            source = self.config.run or Path(str(self.config.prior_run)) / TOKENIZER
            metadata |= {"tokenizer": str(source), "tokenizer_sha256": weights_hash(self.tokenizer)[:12]}
        return metadata | self.setup.metadata()

    def _keep_reconstruction(self, metrics: ReconstructionMetrics) -> None:
        codes = {"codes": len(metrics.code_counts)}
        entropy = metrics.position_entropy
        spread = {"lowest": float(entropy.min()), "highest": float(entropy.max())}
        bound = math.log2(min(len(metrics.code_counts), metrics.images))
        rows: dict[str, tuple[str, float, dict[str, Any]]] = {
            "psnr": ("PSNR (dB)", metrics.psnr, {"of": "8-bit images, mean over images"}),
            "ssim": ("SSIM", metrics.ssim, {"of": "8-bit images, Gaussian windows of 11 pixels wholly inside"}),
            "utilization": ("codebook utilization", metrics.utilization, codes),
            "perplexity": ("codebook perplexity", metrics.perplexity, codes),
            "position_entropy": (
                "entropy per position (bits)",
                float(entropy.mean()),
                {"of": "the codes at each position of the token grid, mean over positions", **spread, "bound": bound},
            ),
        }
        if self.perceptual is not None and metrics.perceptual is not None:
            network = {"network": self.perceptual.trunk.label, "network_sha256": self.perceptual.hash}
            rows["perceptual"] = (self.perceptual.name, metrics.perceptual, network)
        for key, (name, value, details) in rows.items():
            self.results[key] = Measurement(name, value, self.protocol | details)

    def _keep_frechet(
        self, key: str, value: float, reference: Reference, samples: int, details: dict[str, Any]
    ) -> None:
        net, count = reference.net, reference.statistics.count
        network = {"samples": samples, "features": net.name, "features_sha256": net.hash}
        note = few_images_note(min(samples, count), net.num_features)
        self.results[key] = Measurement(
            reference.title(key[-1].upper()), value, self.protocol | network | details | note
        )


def main(args: Sequence[str]) -> None:
    """Run ``regvq evaluate``."""
    run_command("evaluate", EvaluateConfig, evaluate, USAGE, args)
