"""The command ``regvq evaluate``: metrics of trained models over a whole validation split, with protocols."""

import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from regvq_fast.config import VQGANConfig, read_config, run_command, typed_command
from regvq_fast.config.runtime import DeviceConfig, LoadingConfig
from regvq_fast.console import progress_bar, say
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import default_workers
from regvq_fast.data.token_cache import read_info
from regvq_fast.evaluation.feature_nets import PerceptualDistance, load_feature_net
from regvq_fast.evaluation.fid import (
    Reference,
    TooFewImagesWarning,
    default_cache,
    describe_data,
    make_reference,
    statistics_of,
    too_few_images,
)
from regvq_fast.evaluation.measurement import CODE_COUNTS, RESULTS, Measurement, print_measurements, write_measurements
from regvq_fast.evaluation.metrics import SampledImages, evaluate_tokenizer, fid_of_samples
from regvq_fast.evaluation.reconstruction_metrics import SSIM_WINDOW, ReconstructionMetrics
from regvq_fast.evaluation.shares import rank_batches, rank_share, unreadable_images
from regvq_fast.files import atomic_path, check_writable
from regvq_fast.models.features import NoWeightsError
from regvq_fast.models.hub import hub_name, local_folder
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.ownership import FolderLock
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.priors.conditions import fields_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import SAMPLING_SETTINGS, SamplingConfig
from regvq_fast.ranks import local_world_size, process_group, raise_on_all_ranks, rank, rank_0_first, world_size
from regvq_fast.settings import changed_flags, check_at_least
from regvq_fast.version import __version__

SCENES = "scenes"
"""Name of the embedded scenes for ``--data``."""


USAGE = """Measure a trained tokenizer, and images sampled by a prior, over a whole validation split.

    regvq evaluate --run runs/vq                                    # PSNR, SSIM, LPIPS, codebook, FID[R]
    regvq evaluate --prior-run runs/ar --top-p 0.95                 # and FID[G] of images by the prior
    regvq evaluate --images samples --data photos --image-size 256  # FID[G] of images that are there
    regvq evaluate --run runs/vq --fid-features vgg16:vgg16.pth     # with other features, named as such

Writes evaluation.json: each number beside the protocol it was measured by.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadingConfig, DeviceConfig, SamplingConfig):
    """A run of ``regvq evaluate``."""

    run: Path | None = None
    """Tokenizer: run of regvq train vq, one of its checkpoints, a folder of VQGAN.save_pretrained, or
    ORGANIZATION/NAME on the Hugging Face Hub. Not given: the one in the folder of `prior_run`."""
    prior_run: Path | None = None
    """Run of a prior, to sample an image under the condition of each validation image; or its
    ORGANIZATION/NAME on the hub."""
    images: Path | None = None
    """Folder of images that exist already, in place of `prior_run`."""
    image_size: int | None = None
    """Pixels a side, where only `images` are evaluated; otherwise the tokenizer's."""
    data: Path | None = None
    """Folder of images or of tar shards, as for regvq train vq.
    "scenes": the embedded scenes, where nothing is there of that name.
    Not given: what the run was trained on."""
    val_images: int | None = None
    """Use at most so many validation images. Not given: the whole split (of the scenes: 256)."""
    data_seed: int = 0
    """Seed of the embedded scenes. 0 whatever the seed of the run: all runs are judged on the same scenes.
    The validation scenes of its training are those of the seed it was trained with."""
    fid_features: str = "inception"
    """"inception" or "inception:PATH" (FID, with torch-fidelity's network), "vgg16" or "vgg16:PATH", "random-vgg16";
    "none": no Fréchet distance."""
    perceptual_weights: Path | None = None
    """Weights of VGG-16 for LPIPS, or "random". Not given: ImageNet's, from the torch hub cache or a download; without
    them no perceptual distance."""
    cache_dir: Path | None = None
    """Folder that keeps the statistics of data sets. Not given: ~/.cache/regvq_fast/fid."""
    batch_size: int = 32
    """Images that are computed at once."""
    out: Path | None = None
    """Folder of evaluation.json. Not given: that of `prior_run`, of `run`, or of `images`, the first there is;
    what comes from the hub needs one."""


def evaluate(config: EvaluateConfig) -> dict[str, Measurement]:
    """Measure what the configuration names, print it and write evaluation.json; under ``torchrun`` by all ranks.

    Returns:
        By key: psnr, ssim, perceptual, utilization, perplexity and fid_r of a tokenizer, fid_g of sampled images.

    Raises:
        ValueError, OSError: what is wrong with settings, models, data or weights, in one sentence, before work starts.
    """
    device = inference_device(config.device)
    with process_group(device):
        with raise_on_all_ranks(), rank_0_first():  # it may download weights, and index shards
            _check(config)
            evaluation = _Evaluation(config, device)
        return evaluation.run()


def _check(config: EvaluateConfig) -> None:
    """Raise ValueError if flags contradict each other."""
    counts = {"--val-images": config.val_images, "--image-size": config.image_size, "--batch-size": config.batch_size}
    check_at_least(1, {flag: value for flag, value in counts.items() if value is not None})
    config.check()
    tokenizer = config.run or config.prior_run
    if config.prior_run is not None and config.images is not None:
        raise ValueError("--prior-run samples images and --images brings them: give one of the two")
    if config.prior_run is None and (flags := changed_flags(config, SAMPLING_SETTINGS)):
        raise ValueError(f"{flags[0]} says how a prior samples: give its run with --prior-run")
    if tokenizer is None and config.images is None:
        raise ValueError("there is nothing to evaluate: give --run, --prior-run or --images")
    if tokenizer is None and config.image_size is None:
        raise ValueError(f"--images {config.images} needs --image-size, or --run for that of a tokenizer")
    if tokenizer is not None and config.image_size is not None:
        raise ValueError(f"--image-size {config.image_size} is for --images alone: {tokenizer} has a size of its own")
    source = config.prior_run or config.run
    if config.out is None and source is not None and hub_name(source) is not None:
        raise ValueError(f"{source} is no folder here: if it is on the hub, name one for evaluation.json with --out")
    if config.fid_features == "none" and (config.images or config.prior_run) is not None:
        raise ValueError("--fid-features none measures nothing of sampled images: leave out --images and --prior-run")


class _Evaluation:
    """An evaluation whose models, data and networks are open and checked."""

    def __init__(self, config: EvaluateConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.console = Console(quiet=rank() > 0)
        out = config.out or config.prior_run or config.run or config.images
        assert out is not None  # checked
        check_writable(out, "name another folder for evaluation.json with --out")
        self.out = out
        self.precision = choose_precision(config.amp, device)
        self.workers = default_workers(local_world_size()) if config.workers is None else config.workers
        self.cache = config.cache_dir or default_cache()
        self.net = None if config.fid_features == "none" else load_feature_net(config.fid_features).to(device)
        self.sampler: ImageSampler | None = None
        if config.prior_run is not None:
            self.sampler = ImageSampler.from_run(config.prior_run, config, self.precision)
        self.tokenizer = self._load_tokenizer()
        self.perceptual: PerceptualDistance | None = None
        if self.tokenizer is not None:
            self.tokenizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.perceptual = self._load_perceptual()
        size = config.image_size if self.tokenizer is None else self.tokenizer.image_size
        assert size is not None  # checked
        for name, least in self._least_sizes():
            if size < least:
                raise ValueError(f"{name} needs images of at least {least} pixels a side, these have {size}")
        data = _data_of(config, self.sampler)
        self.dataset = build_dataset(
            data,
            split="val",
            image_size=size,
            length=config.val_images,
            seed=config.data_seed,
            fields=() if self.sampler is None else fields_of(self.sampler.condition),
        )
        self.samples = None if config.images is None else SampledImages(config.images, size)
        for what, images in (("validation", self.dataset), ("sampled", self.samples)):
            if self.net is not None and images is not None and len(images) < 2:
                raise ValueError(f"a Fréchet distance needs at least 2 {what} images, there is {len(images)}")
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
                f"({wanted[:12]}): evaluate them apart, or leave out --run"
            )
        return own

    def _load_perceptual(self) -> PerceptualDistance | None:
        try:
            return PerceptualDistance(self.config.perceptual_weights).to(self.device)
        except NoWeightsError as error:
            say(self.console, "left out", f'perceptual distance: {error}; give --perceptual-weights PATH, or "random"')
            return None

    def _least_sizes(self) -> Iterator[tuple[str, int]]:
        if self.tokenizer is not None:
            yield "SSIM", SSIM_WINDOW
        for net in (self.perceptual, self.net):
            if net is not None:
                yield net.name, net.min_size

    # ------------------------------------------------------------------------------------------------------- measuring

    def run(self) -> dict[str, Measurement]:
        """Measure, print and write, as the one process that evaluates into the folder."""
        with ExitStack() as owned:
            with raise_on_all_ranks():
                if rank() == 0:
                    owned.enter_context(FolderLock(self.out, "evaluation"))
            return self._run()

    def _run(self) -> dict[str, Measurement]:
        config, reference = self.config, None
        loading: dict[str, Any] = {"batch_size": config.batch_size, "workers": self.workers}
        described = describe_data(self.dataset)
        self.protocol = {**described, **self._facts()}
        with progress_bar(self.console) as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", TooFewImagesWarning)  # a note in the protocol says so

            def bar(name: str, images: int = len(self.dataset)) -> Callable[[int], None]:
                task = progress.add_task(name, total=len(rank_share(images)))
                return lambda done: progress.update(task, completed=done)

            if self.net is not None:
                reference = make_reference(
                    self.dataset,
                    self.net,
                    device=self.device,
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
                    device=self.device,
                    autocast=self.precision.autocast(),
                    progress=bar("reconstructions"),
                    **loading,
                )
                self._keep_reconstruction(metrics.reconstruction)
                if rank() == 0:
                    with atomic_path(self.out / CODE_COUNTS) as temporary:
                        temporary.write_text(f"{metrics.reconstruction.code_counts.tolist()}\n")
                if reference is not None and metrics.frechet is not None:
                    self._keep_frechet("fid_r", metrics.frechet, reference, len(self.dataset), {})
            if reference is not None and self.sampler is not None:
                value = fid_of_samples(self.sampler, self.dataset, reference, progress=bar("samples"), **loading)
                facts = {"prior_run": str(config.prior_run), **self.sampler.describe()}
                self._keep_frechet("fid_g", value, reference, len(self.dataset), facts)
            if reference is not None and self.samples is not None:
                images = (batch["image"] for batch in rank_batches(self.samples, device=self.device, **loading))
                tick = bar("samples", len(self.samples))
                sampled = statistics_of(images, reference.net, self.device, tick)
                facts = {"drawn": str(config.images)}
                self._keep_frechet("fid_g", reference.distance(sampled), reference, sampled.count, facts)
        # Unreadable images were replaced by the next ones; a cached reference is not read again.
        if unreadable := max(unreadable_images(self.dataset), reference.unreadable if reference is not None else 0):
            for found in self.results.values():
                found.protocol["unreadable"] = unreadable
        if rank() == 0:
            path = self.out / RESULTS
            write_measurements(path, self.results)
            print_measurements(self.console, self.results)
            say(self.console, "results", str(path))
        return self.results

    def _facts(self) -> dict[str, Any]:
        """Return what the numbers depend on beside the images."""
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        precision = self.precision.reason.partition(" (")[0]
        facts: dict[str, Any] = {}
        if self.tokenizer is not None:
            source = self.config.run or Path(str(self.config.prior_run)) / TOKENIZER
            facts |= {"tokenizer": str(source), "tokenizer_sha256": weights_hash(self.tokenizer)[:12]}
        return facts | {
            "precision": precision if self.device.type == "cpu" else f"{precision}, TF32 where fp32",
            "device": device if world_size() == 1 else f"{device}, {world_size()} processes",
            "batch_size": self.config.batch_size,
            "command": typed_command("evaluate", self.config),
            "versions": {
                "regvq_fast": __version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "torchmetrics", "Pillow")},
            },
        }

    def _keep_reconstruction(self, metrics: ReconstructionMetrics) -> None:
        codes = {"codes": len(metrics.code_counts)}
        rows: dict[str, tuple[str, float, dict[str, Any]]] = {
            "psnr": ("PSNR (dB)", metrics.psnr, {"of": "8-bit images, mean over images"}),
            "ssim": ("SSIM", metrics.ssim, {"of": "8-bit images, Gaussian windows of 11 pixels wholly inside"}),
            "utilization": ("codebook utilization", metrics.utilization, codes),
            "perplexity": ("codebook perplexity", metrics.perplexity, codes),
        }
        if self.perceptual is not None and metrics.perceptual is not None:
            network = {"network": self.perceptual.trunk.label, "network_sha256": self.perceptual.hash}
            rows["perceptual"] = (self.perceptual.name, metrics.perceptual, network)
        for key, (name, value, facts) in rows.items():
            self.results[key] = Measurement(name, value, self.protocol | facts)

    def _keep_frechet(self, key: str, value: float, reference: Reference, samples: int, facts: dict[str, Any]) -> None:
        net, count = reference.net, reference.statistics.count
        network = {"samples": samples, "features": net.name, "features_sha256": net.hash}
        note = too_few_images(min(samples, count), net.num_features)
        protocol = self.protocol | network | facts | ({} if note is None else {"note": note})
        self.results[key] = Measurement(reference.title(key[-1].upper()), value, protocol)


def _data_of(config: EvaluateConfig, sampler: ImageSampler | None) -> Path | None:
    """Return the data that ``--data`` names or that the run was trained on; None: the embedded scenes."""
    if config.data is not None:
        return None if str(config.data) == SCENES and not config.data.exists() else config.data
    remedy = f"give the images with --data PATH, or --data {SCENES} for the embedded scenes"
    if config.run is not None:
        try:
            return read_config(local_folder(config.run), VQGANConfig).data.data
        except ValueError:
            raise ValueError(f"{config.run} doesn't say what it was trained on: {remedy}") from None
    if config.prior_run is None or sampler is None:
        raise ValueError(f"--images {config.images} don't say what they are to be compared with: {remedy}")
    try:
        tokens = read_config(local_folder(config.prior_run), sampler.entry.config).tokens
    except ValueError:
        raise ValueError(f"{config.prior_run} doesn't say what it was trained on: {remedy}") from None
    if tokens.cache is None:
        return tokens.data
    if not tokens.cache.exists():
        raise ValueError(
            f"the token cache {tokens.cache} that {config.prior_run} was trained on is not there: {remedy}"
        )
    data = read_info(tokens.cache).data
    return None if data is None else Path(data)


def main(args: Sequence[str]) -> None:
    """Run ``regvq evaluate``."""
    run_command("evaluate", EvaluateConfig, evaluate, USAGE, args)
