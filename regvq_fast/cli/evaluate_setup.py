"""Settings of ``regvq evaluate``, and the set-up that its kinds of evaluation share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from regvq_fast.config import VQGANConfig, read_config, typed_command
from regvq_fast.config.runtime import DeviceConfig, LoadingConfig
from regvq_fast.console import say
from regvq_fast.data.loading import default_workers
from regvq_fast.data.token_cache import read_info
from regvq_fast.evaluation.feature_nets import FeatureNet, NoFeaturesError, load_feature_net
from regvq_fast.evaluation.fid import too_few_images
from regvq_fast.evaluation.measurement import NOTE, run_metadata
from regvq_fast.files import check_writable
from regvq_fast.models.hub import hub_name, local_folder
from regvq_fast.precision import choose_precision
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import SAMPLING_SETTINGS, SamplingConfig
from regvq_fast.ranks import local_world_size, rank
from regvq_fast.settings import changed_flags, check_at_least

SCENES = "scenes"
"""Name of the embedded scenes for ``--data``."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadingConfig, DeviceConfig, SamplingConfig):
    """A run of ``regvq evaluate``."""

    run: Path | None = None
    """Tokenizer: run of regvq train vq, one of its checkpoints, a folder of VQGAN.save_pretrained, or
    ORGANIZATION/NAME on the Hugging Face Hub. Default: the tokenizer of --prior-run."""
    prior_run: Path | None = None
    """Prior to sample from, under the condition of each validation image: run or ORGANIZATION/NAME on the hub."""
    images: Path | None = None
    """Evaluate existing images instead of a prior: a folder, or an .npz file of regvq sample."""
    reference: Path | None = None
    """Reference .npz file of ADM's suite, instead of --data: FID, sFID, IS, precision and recall of --images."""
    image_size: int | None = None
    """Side of the images in pixels; only with --images and no --run. Default: the tokenizer's."""
    data: Path | None = None
    """Images, as for regvq train vq, or "scenes" for the embedded ones. Default: the training data of the run."""
    val_images: int | None = None
    """Maximum number of validation images. Default: the whole split (scenes: 256)."""
    data_seed: int = 0
    """Seed of the embedded scenes, independent of the run's seed so that all runs are compared on the same scenes."""
    fid_features: str | None = None
    """Features of FID: inception[:PATH], vgg16[:PATH], random-vgg16 or none.
    Default: inception; none for --run if it is unavailable."""
    perceptual_weights: Path | None = None
    """VGG-16 weights of LPIPS: file or "random". Default: ImageNet's from the torch hub, else no LPIPS."""
    cache_dir: Path | None = None
    """Cache of data set statistics. Default: ~/.cache/regvq_fast/fid."""
    batch_size: int = 32
    """Images per batch."""
    out: Path | None = None
    """Folder of evaluation.json and plots; required for hub models. Default: that of --prior-run, --run or --images."""


def check_flags(config: EvaluateConfig) -> None:
    """Raise ValueError if flags contradict each other."""
    counts = {"--val-images": config.val_images, "--image-size": config.image_size, "--batch-size": config.batch_size}
    check_at_least(1, {flag: value for flag, value in counts.items() if value is not None})
    config.check()
    if config.reference is not None:
        _check_reference(config, config.reference)
        return
    tokenizer = config.run or config.prior_run
    if config.prior_run is not None and config.images is not None:
        raise ValueError("--prior-run and --images exclude each other: give one")
    if config.prior_run is None and (flags := changed_flags(config, SAMPLING_SETTINGS)):
        raise ValueError(f"{flags[0]} is a sampling setting: give the run of a prior with --prior-run")
    if tokenizer is None and config.images is None:
        raise ValueError("nothing to evaluate: give --run, --prior-run or --images")
    if tokenizer is None and config.image_size is None:
        raise ValueError(f"--images {config.images} needs --image-size, or --run to use the size of a tokenizer")
    if tokenizer is not None and config.image_size is not None:
        raise ValueError(f"--image-size {config.image_size} is for --images alone: {tokenizer} sets the size")
    source = config.prior_run or config.run
    if config.out is None and source is not None and hub_name(source) is not None:
        raise ValueError(f"{source} is not a local folder: for a hub model, name an output folder with --out")
    if config.fid_features == "none" and (config.images or config.prior_run) is not None:
        raise ValueError("--fid-features none leaves no metric for sampled images: leave out --images and --prior-run")


def _check_reference(config: EvaluateConfig, reference: Path) -> None:
    """Raise ValueError for flags that contradict ``--reference``."""
    if config.images is None:
        raise ValueError(f"--reference {reference} needs --images, a file made by regvq sample --npz")
    others = ("run", "prior_run", "data", "val_images", "image_size", *SAMPLING_SETTINGS)
    if flags := changed_flags(config, others):
        raise ValueError(f"{flags[0]} is not used with --reference {reference}: leave it out")
    if config.fid_features == "none":
        raise ValueError(f"--fid-features none leaves no metric for --reference {reference}: leave it out")


class Setup:
    """Output folder, precision, loader and feature network of an evaluation.

    Raises:
        ValueError, OSError: the folder, the device or the network can't be used.
    """

    def __init__(self, config: EvaluateConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.console = Console(quiet=rank() > 0)
        out = config.out or config.prior_run or config.run or config.images
        assert out is not None  # checked
        self.out = out.parent if out == config.images and out.suffix == ".npz" else out
        check_writable(self.out, "name another folder for evaluation.json with --out")
        self.precision = choose_precision(config.amp, device)
        workers = default_workers(local_world_size()) if config.workers is None else config.workers
        self.loading: dict[str, Any] = {"batch_size": config.batch_size, "workers": workers}
        self.net = self._load_net()

    def _load_net(self) -> FeatureNet | None:
        wanted = self.config.fid_features
        if wanted == "none":
            return None
        try:
            return load_feature_net(wanted or "inception").to(self.device)
        except NoFeaturesError as error:
            if wanted is not None or self.config.images is not None or self.config.prior_run is not None:
                raise
            say(self.console, "left out", f"FID[R]: {error}")
            return None

    def metadata(self) -> dict[str, Any]:
        """Return the part of a protocol that does not describe images or models."""
        return run_metadata(self.precision, self.config.batch_size, typed_command("evaluate", self.config))


def few_images_note(images: int, features: int) -> dict[str, str]:
    """Return the part of a protocol that warns of too few images for a Fréchet distance; empty if there are enough."""
    note = too_few_images(images, features)
    return {} if note is None else {NOTE: note}


def data_of(config: EvaluateConfig, sampler: ImageSampler | None) -> Path | None:
    """Return the data that ``--data`` names or that the run was trained on; None: the embedded scenes."""
    if config.data is not None:
        return None if str(config.data) == SCENES and not config.data.exists() else config.data
    remedy = f"give the images with --data PATH, or --data {SCENES} for the embedded scenes"
    if config.run is not None:
        try:
            return read_config(local_folder(config.run), VQGANConfig).data.data
        except ValueError:
            raise ValueError(f"{config.run} does not record its training data: {remedy}") from None
    if config.prior_run is None or sampler is None:
        raise ValueError(f"--images {config.images} have no images to compare with: {remedy}")
    try:
        tokens = read_config(local_folder(config.prior_run), sampler.entry.config).tokens
    except ValueError:
        raise ValueError(f"{config.prior_run} does not record its training data: {remedy}") from None
    if tokens.cache is None:
        return tokens.data
    if not tokens.cache.exists():
        raise ValueError(f"the token cache {tokens.cache} that {config.prior_run} was trained on is missing: {remedy}")
    data = read_info(tokens.cache).data
    return None if data is None else Path(data)
