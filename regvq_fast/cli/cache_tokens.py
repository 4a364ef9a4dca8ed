"""The command ``regvq tokens``: encode a data set once with a trained tokenizer."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regvq_fast.config import run_command
from regvq_fast.config.runtime import DeviceConfig, LoadingConfig, SeedConfig
from regvq_fast.console import progress_bar, say
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.encoding import ShardEncoder
from regvq_fast.data.image_dataset import FieldCounts
from regvq_fast.data.loading import default_workers, fingerprint, first_samples
from regvq_fast.data.samples import Crop, Field, Split
from regvq_fast.data.token_cache import (
    INFO,
    REMEDY,
    CacheInfo,
    open_shard,
    read_info,
    shard_path,
    write_info,
)
from regvq_fast.evaluation.codebook import CodebookUsage
from regvq_fast.evaluation.shares import unreadable_images
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.ownership import FolderLock
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.priors.conditions import trainable
from regvq_fast.priors.registry import PRIORS
from regvq_fast.ranks import any_rank, local_world_size, process_group, raise_on_all_ranks, rank, world_size
from regvq_fast.settings import check_at_least

_SPLITS: tuple[Split, ...] = ("train", "val")


USAGE = """Encode a data set once with a trained tokenizer, as training data of the priors.

    regvq tokens --tokenizer runs/NAME --out cache/           # embedded scenes
    regvq tokens --tokenizer runs/NAME --out cache/ --data photos/ --amp
    torchrun --nproc-per-node 8 -m regvq_fast tokens --tokenizer runs/NAME --out cache/ --data shards/ --amp

The cache holds the first --views epochs of the training stream and the validation split, with the captions, labels and
semantic maps that nearly all images have. The same command completes an interrupted cache.
"""


@dataclass(frozen=True)
class CacheConfig(LoadingConfig, DeviceConfig, SeedConfig):
    """A run of ``regvq tokens``."""

    tokenizer: Path
    """Tokenizer: run, checkpoint, folder of VQGAN.save_pretrained, or ORGANIZATION/NAME on the Hugging Face Hub."""
    out: Path
    """Folder of the cache; one begun with the same settings is completed."""
    data: Path | None = None
    """Images, as for regvq train vq. Default: the embedded scenes."""
    views: int | None = None
    """Epochs to encode, each with new flips, captions or scenes. Default: 4, or 2 for images without captions."""
    fields: tuple[Field, ...] | None = None
    """Fields to store; images without one are skipped. Default: fields that 95 % of the images have."""
    crop: Crop = "center"
    """Training crop; center is the crop of FID's reference images."""
    flip: bool = True
    """Mirror half of the training images."""
    scenes: int | None = None
    """Embedded scenes per epoch. Default: 8192."""
    val_images: int = 512
    """Maximum number of validation images."""
    shard_samples: int = 4096
    """Samples per file; an interrupted run loses at most one file."""
    batch_size: int = 64
    """Images encoded per batch."""


def cache_tokens(config: CacheConfig) -> None:
    """Fill or complete a token cache, and print a summary; under ``torchrun`` with all ranks.

    Tokens don't depend on batch size or number of ranks, except as far as a GPU's convolutions do.

    Raises:
        ValueError, OSError: settings, tokenizer, data or folder can't be used; the message is one sentence.
    """
    _check(config)
    device = inference_device(config.device)
    with process_group(device):
        with raise_on_all_ranks():
            caching = _Caching(config, device)
        caching.run()


def _check(config: CacheConfig) -> None:
    """Raise ValueError for flags out of range or in contradiction."""
    counts = {
        "--views": config.views,
        "--scenes": config.scenes,
        "--val-images": config.val_images,
        "--shard-samples": config.shard_samples,
        "--batch-size": config.batch_size,
    }
    check_at_least(1, {flag: value for flag, value in counts.items() if value is not None})
    config.check()
    if config.scenes is not None and config.data is not None:
        raise ValueError(f"--scenes {config.scenes} is for the embedded scenes, not for --data {config.data}")
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is a file: name a folder")


class _Caching:
    """A run of ``regvq tokens``. The constructor opens and checks model and data; only `run` writes."""

    def __init__(self, config: CacheConfig, device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, config.out
        self.console = Console(quiet=rank() > 0)
        self.model = VQGAN.from_pretrained(config.tokenizer)
        num_codes = self.model.quantize.num_codes
        self.precision = choose_precision(config.amp, device)
        self.counts = (
            FieldCounts(0, {}) if config.fields is not None else dataset_class(config.data).count_fields(config.data)
        )
        fields = self.counts.usable if config.fields is None else tuple(sorted(set(config.fields)))
        self.datasets = {
            split: build_dataset(
                config.data,
                split=split,
                image_size=self.model.image_size,
                length=config.scenes if split == "train" else config.val_images,
                seed=config.seed,
                crop=config.crop,
                flip=config.flip,
                fields=fields,
            )
            for split in _SPLITS
        }
        first_images = [first_samples(dataset, len(dataset))["image"] for dataset in self.datasets.values()]
        self.info = CacheInfo(
            tokenizer=str(config.tokenizer),
            tokenizer_sha256=weights_hash(self.model),
            num_codes=num_codes,
            token_shape=self.model.token_shape,
            image_size=self.model.image_size,
            precision="fp32" if self.precision.dtype is None else str(self.precision.dtype).removeprefix("torch."),
            data=None if config.data is None else str(config.data),
            seed=config.seed,
            crop=config.crop,
            flip=config.flip,
            views=config.views or (4 if config.data is None or "caption" in fields else 2),
            train_images=len(self.datasets["train"]),
            val_images=len(self.datasets["val"]),
            fields=fields,
            shard_samples=config.shard_samples,
            label_names=self.datasets["train"].label_names if "label" in fields else (),
            first_images=fingerprint(*first_images)[:12],
        )
        self._check_folder()
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _check_folder(self) -> None:
        """Raise ValueError unless the folder is new or holds a cache with these settings."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        if INFO in names:
            saved = read_info(self.folder).settings()
            for name, value in self.info.settings().items():
                if name == "label_names":
                    if saved[name] != value:
                        raise ValueError(
                            f"the names of the classes differ from those in {self.folder / INFO}: name another --out"
                        )
                elif name == "first_images":
                    if saved[name] not in (None, value):
                        raise ValueError(
                            f"the first images differ from those encoded in {self.folder} (other files, or "
                            "another version of Pillow?): name another --out"
                        )
                elif value != saved[name]:
                    raise ValueError(
                        f"{name} is {value} here but {saved[name]} in {self.folder / INFO}: continue with the same, or "
                        "name another --out"
                    )
        elif any(not name.startswith(".") for name in names):
            raise ValueError(f"--out {self.folder} is neither empty nor a token cache: name a new folder")

    def run(self) -> None:
        """Lock the folder, encode missing shards, check all of them and print a summary."""
        with ExitStack() as owned:
            with raise_on_all_ranks():
                if rank() == 0:
                    owned.enter_context(FolderLock(self.folder, "cache"))
            self._run()

    def _run(self) -> None:
        missing = [(split, number) for split in _SPLITS for number in self._missing(split)]
        any_rank(0)  # wait until all ranks have read the folder
        with raise_on_all_ranks():
            if missing and rank() == 0:
                self._begin()
        total = sum(map(self.info.num_shards, _SPLITS))
        data = self.datasets["train"].title
        say(self.console, "data", f"{data}, {self.info.train_images} training images x {self.info.views} views")
        self._say_fields()
        say(self.console, "precision", self.precision.reason)
        if len(missing) < total:
            say(self.console, "resuming", f"{total - len(missing)} of {total} shards are there")
        mine = missing[rank() :: world_size()]
        config = self.config
        workers = default_workers(local_world_size()) if config.workers is None else config.workers
        encoder = ShardEncoder(self.model, self.folder, self.info, self.precision, config.batch_size, workers)
        start = time.perf_counter()
        with raise_on_all_ranks(), self._keeping_info(), progress_bar(self.console) as progress:
            task = progress.add_task("images", total=sum(len(self.info.shard_range(*shard)) for shard in mine))
            for split in _SPLITS:
                numbers = [number for name, number in mine if name == split]
                for done in encoder.encode(self.datasets[split], split, numbers):
                    progress.advance(task, done)
        seconds = time.perf_counter() - start
        unreadable = sum(map(unreadable_images, self.datasets.values()))
        if rank() == 0:
            self._finish(sum(len(self.info.shard_range(*shard)) for shard in missing), seconds, unreadable)

    @contextmanager
    def _keeping_info(self) -> Iterator[None]:
        """Write cache.json again after the block if it was removed meanwhile, so that the same command goes on."""
        try:
            yield
        finally:
            if rank() == 0 and self.folder.exists() and not (self.folder / INFO).exists():
                write_info(self.folder, self.info)

    def _say_fields(self) -> None:
        """Print the fields kept beside tokens, fields of only some images, and the priors that can be trained."""
        kept, images = self.info.fields, self.counts.images
        say(self.console, "fields", ", ".join(kept) or "none beside tokens")
        for field, having in sorted(self.counts.having.items()):
            if 0 < having < images and field not in kept:
                flags = " ".join(sorted((*kept, field)))
                some = f"{field}: {having:,} of {images:,} images; --fields {flags} keeps only these"
                say(self.console, "left out", some)
        say(self.console, "priors", trainable(kept, {name: prior.sampler.conditions for name, prior in PRIORS.items()}))

    def _missing(self, split: Split) -> list[int]:
        """Return the numbers of missing and damaged shards."""
        missing = []
        for number in range(self.info.num_shards(split)):
            try:
                open_shard(self.folder, self.info, split, number)
            except FileNotFoundError:
                missing.append(number)
            except ValueError as error:
                problem = str(error).removesuffix(REMEDY)
                self.console.print(Text(f"warning: {problem}: it is made anew"), soft_wrap=True)
                missing.append(number)
        return missing

    def _begin(self) -> None:
        """Write cache.json, and remove incomplete files of killed runs."""
        write_info(self.folder, self.info)
        for leftover in self.folder.glob(".*.safetensors"):
            leftover.unlink()

    def _finish(self, encoded: int, seconds: float, unreadable: int) -> None:
        """Check all shards, mark the cache complete, and print a summary."""
        usage = CodebookUsage(self.info.num_codes)
        largest, size = -1, 0
        for split in _SPLITS:
            for number in range(self.info.num_shards(split)):
                shard = open_shard(self.folder, self.info, split, number)
                usage.update(torch.from_numpy(shard.tokens.astype(np.int64)))
                if shard.segmentation is not None:
                    largest = max(largest, int(shard.segmentation.max()))
                size += shard_path(self.folder, split, number).stat().st_size
        num_classes = None
        if "segmentation" in self.info.fields:
            num_classes = self.datasets["train"].num_classes or largest + 1
            if largest >= num_classes:
                raise ValueError(
                    f"{self.folder} holds class id {largest} of {num_classes} classes: delete it and make it again"
                )
        write_info(self.folder, dataclasses.replace(self.info, num_classes=num_classes, complete=True))

        samples = sum(map(self.info.samples, _SPLITS))
        rows = {
            "training samples": f"{self.info.samples('train')}",
            "validation samples": f"{self.info.samples('val')}",
            "tokens": f"{samples * math.prod(self.info.token_shape)}",
            "size (MiB)": f"{size / 2**20:.4g}",
            "codes used": f"{float(usage.utilization()):.1%} of {self.info.num_codes}",
            "perplexity": f"{float(usage.perplexity()):.4g}",
        }
        if num_classes is not None:
            rows["classes"] = str(num_classes)
        if unreadable:
            rows["unreadable images"] = str(unreadable)
        if encoded:
            rows["images/s"] = f"{encoded / seconds:.4g}"
            rows["tokens/s"] = f"{encoded * math.prod(self.info.token_shape) / seconds:.4g}"
        table = Table(title=Text(f"token cache {self.folder}"), show_header=False, title_justify="left", min_width=40)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows.items():
            table.add_row(*row)
        self.console.print(table)


def main(args: Sequence[str]) -> None:
    """Run ``regvq tokens``."""
    run_command(
        "tokens",
        CacheConfig,
        cache_tokens,
        USAGE,
        args,
        stopped="stopped; the same command goes on from the shards that are done",
    )
