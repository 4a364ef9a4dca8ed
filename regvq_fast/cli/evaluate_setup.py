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
    ORGANIZATION/NAME on the Hugging Face Hub. Not given: the one in the folder of `prior_run`."""
    prior_run: Path | None = None
    """Run of a prior, to sample an image under the condition of each validation image; or its
    ORGANIZATION/NAME on the hub."""
    images: Path | None = None
    """Images that exist already, in place of `prior_run`: a folder, or an .npz file of regvq sample."""
    reference: Path | None = None
    """Reference .npz file of ADM's evaluation suite, to measure `images` as papers do:
    FID, sFID, Inception Score, precision and recall. Takes the place of `data`."""
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
    fid_features: str | None = None
    """"inception" or "inception:PATH" (FID, with torch-fidelity's network), "vgg16" or "vgg16:PATH", "random-vgg16";
    "none": no Fréchet distance. Not given: inception; where it can't be had, none for `run`."""
    perceptual_weights: Path | None = None
    """Weights of VGG-16 for LPIPS, or "random". Not given: ImageNet's, from the torch hub cache or a download; without
    them no perceptual distance."""
    cache_dir: Path | None = None
    """Folder that keeps the statistics of data sets. Not given: ~/.cache/regvq_fast/fid."""
    batch_size: int = 32
    """Images that are computed at once."""
    out: Path | None = None
    """Folder of evaluation.json and plots.
    Not given: that of `prior_run`, of `run`, or of `images`, the first there is; what comes from the hub needs one."""


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


def _check_reference(config: EvaluateConfig, reference: Path) -> None:
    """Raise ValueError for flags that contradict ``--reference``."""
    if config.images is None:
        raise ValueError(
            f"--reference {reference} is for images that exist: give --images, a file of regvq sample --npz"
        )
    others = ("run", "prior_run", "data", "val_images", "image_size", *SAMPLING_SETTINGS)
    if flags := changed_flags(config, others):
        raise ValueError(f"{flags[0]} has no part in --images against --reference {reference}: leave it out")
    if config.fid_features == "none":
        raise ValueError(f"--fid-features none measures nothing against --reference {reference}: leave it out")


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
