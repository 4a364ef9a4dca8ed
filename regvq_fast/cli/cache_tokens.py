"""The command ``regvq tokens``: encode a data set once with a trained tokenizer."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import Dataset

from regvq_fast.config import run_command
from regvq_fast.config.runtime import DeviceConfig, LoadingConfig, SeedConfig
from regvq_fast.console import progress_bar, say
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.image_dataset import FieldCounts
from regvq_fast.data.loading import default_workers, fingerprint, first_samples, validation_batches
from regvq_fast.data.samples import Crop, Field, Sample, Split
from regvq_fast.data.token_cache import (
    INFO,
    REMEDY,
    CacheInfo,
    open_shard,
    read_info,
    shard_path,
    token_type,
    write_info,
    write_shard,
)
from regvq_fast.data.tokens import TokenBatch, tokenize_batch
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
    """Fill a token cache, or the rest of one, and print what it holds; under ``torchrun`` by all ranks.

    Tokens depend on neither batch size nor number of ranks (on a GPU as far as its convolutions don't).

    Raises:
        ValueError, OSError: what is wrong with settings, tokenizer, data or folder, in one sentence.
    """
    _check(config)
    device = inference_device(config.device)
    with process_group(device):
        with raise_on_all_ranks():
            caching = _Caching(config, device)
        caching.run()


def _check(config: CacheConfig) -> None:
    """Raise ValueError for flags that are out of range or contradict each other."""
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
    """A run whose model and data are open and checked; it writes nothing until `run`."""

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
        """Encode what is missing, and check and describe the whole; as the folder's one owner."""
        with ExitStack() as owned:
            with raise_on_all_ranks():
                if rank() == 0:
                    owned.enter_context(FolderLock(self.folder, "cache"))
            self._run()

    def _run(self) -> None:
        missing = [(split, number) for split in _SPLITS for number in self._missing(split)]
        any_rank(0)  # all have looked at the folder before anything changes in it
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
        start = time.perf_counter()
        with raise_on_all_ranks(), progress_bar(self.console) as progress:
            task = progress.add_task("images", total=sum(len(self.info.shard_range(*shard)) for shard in mine))
            for split in _SPLITS:
                for done in self._encode(split, [number for name, number in mine if name == split]):
                    progress.advance(task, done)
        seconds = time.perf_counter() - start
        unreadable = sum(map(unreadable_images, self.datasets.values()))
        if rank() == 0:
            self._finish(sum(len(self.info.shard_range(*shard)) for shard in missing), seconds, unreadable)

    def _say_fields(self) -> None:
        """Print what is kept beside tokens, what only some images have, and the priors that can be trained."""
        kept, images = self.info.fields, self.counts.images
        say(self.console, "fields", ", ".join(kept) or "none beside tokens")
        for field, having in sorted(self.counts.having.items()):
            if 0 < having < images and field not in kept:
                flags = " ".join(sorted((*kept, field)))
                some = f"{field}: {having:,} of {images:,} images; --fields {flags} keeps only these"
                say(self.console, "left out", some)
        say(self.console, "priors", trainable(kept, {name: prior.sampler.conditions for name, prior in PRIORS.items()}))

    def _missing(self, split: Split) -> list[int]:
        """Return the numbers of shards that are missing or damaged."""
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
        """Write cache.json, and remove incomplete files of runs that were killed."""
        write_info(self.folder, self.info)
        for leftover in self.folder.glob(".*.safetensors"):
            leftover.unlink()

    def _encode(self, split: Split, numbers: Sequence[int]) -> Iterator[int]:
        """Write these shards; yields the number of images after each batch."""
        if not numbers:
            return
        workers = default_workers(local_world_size()) if self.config.workers is None else self.config.workers
        images = _Shards(self.datasets[split], self.info, split, numbers)
        batches = validation_batches(images, self.config.batch_size, workers, pin_memory=self.device.type == "cuda")
        remaining = list(numbers)
        held: list[TokenBatch] = []  # on the device, which is waited for once a shard
        for batch in batches:
            with self.precision.autocast():
                held.append(tokenize_batch(self.model, batch, self.device))
            yield len(batch["image"])
            while remaining and _samples(held) >= (size := len(self.info.shard_range(split, remaining[0]))):
                whole = _concatenated(held)
                self._write(split, remaining.pop(0), _slice(whole, 0, size))
                held = [_slice(whole, size, None)]

    def _write(self, split: Split, number: int, batch: TokenBatch) -> None:
        tokens = batch["tokens"].cpu().numpy().astype(token_type(self.info.num_codes))
        segmentation = batch["segmentation"].cpu().numpy() if "segmentation" in self.info.fields else None
        captions = batch["caption"] if "caption" in self.info.fields else None
        labels = batch["label"].cpu().numpy().astype(np.int32) if "label" in self.info.fields else None
        write_shard(shard_path(self.folder, split, number), tokens, segmentation, captions, labels)

    def _finish(self, encoded: int, seconds: float, unreadable: int) -> None:
        """Check the shards of all ranks, mark the cache complete, and print a summary."""
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


class _Shards(Dataset[Sample]):
    """The samples of some shards, in ascending order of their numbers, as the images that they are made of."""

    def __init__(self, dataset: Dataset[Sample], info: CacheInfo, split: Split, numbers: Sequence[int]) -> None:
        self.dataset, self.numbers, self.shard_samples = dataset, numbers, info.shard_samples
        self.count = sum(len(info.shard_range(split, number)) for number in numbers)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        shard, row = divmod(index, self.shard_samples)  # only a split's last shard may have fewer
        return self.dataset[self.numbers[shard] * self.shard_samples + row]


def _samples(batches: Sequence[TokenBatch]) -> int:
    return sum(len(batch["tokens"]) for batch in batches)


def _concatenated(batches: Sequence[TokenBatch]) -> TokenBatch:
    whole: dict[str, Any] = {}
    for name, first in batches[0].items():
        values: list[Any] = [batch[name] for batch in batches]  # type: ignore[literal-required]
        whole[name] = torch.cat(values) if isinstance(first, torch.Tensor) else list(itertools.chain(*values))
    return cast(TokenBatch, whole)


def _slice(batch: TokenBatch, start: int, stop: int | None) -> TokenBatch:
    return cast(TokenBatch, {name: cast(Any, values)[start:stop] for name, values in batch.items()})


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
