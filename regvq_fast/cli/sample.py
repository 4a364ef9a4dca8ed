"""The command ``regvq sample``: sample images from a trained prior."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from regvq_fast.config import read_config, run_command
from regvq_fast.config.runtime import DeviceConfig
from regvq_fast.console import progress_bar, say
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.loading import read_samples
from regvq_fast.data.reading import opened_image
from regvq_fast.data.tokens import TokenDataset
from regvq_fast.data.transforms import center_box, crop_labels, crop_rgb, image_to_tensor, to_float, upright_size
from regvq_fast.files import check_new_folder
from regvq_fast.image_grids import save_image_grid, save_images
from regvq_fast.models.hub import local_folder
from regvq_fast.models.weights import weights_hash
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.priors.conditions import (
    CONDITION_FLAGS,
    Condition,
    Conditions,
    conditions_of,
    fields_of,
    no_conditions,
    render,
    take,
)
from regvq_fast.priors.diffusion.text import words_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PriorName, SamplingConfig, titles
from regvq_fast.priors.sampler import Progress
from regvq_fast.priors.trained_on import TrainedOn
from regvq_fast.scenes.embedded import embedded_model, is_embedded
from regvq_fast.settings import Section, check_at_least

_GRID = 64  # images of the grid at most, and conditions that are taken of a data set
_STRIP = 12  # states of a denoising strip


USAGE = """Sample images from a trained prior.

    regvq sample --out samples                                        # the embedded prior of the scenes
    regvq sample --run runs/ar --out samples                          # maps of the validation split
    regvq sample --run runs/ar --out samples --map map.png --top-p 0.95 --guidance 2
    regvq sample --run runs/diffusion --out samples --text "grass on the left and bricks on the right"
    regvq sample --run runs/ar --out samples --label "golden retriever" --guidance 2
    regvq sample --run runs/ar --out samples --per-class 50           # every label of the prior
    regvq sample --run runs/ar --out samples --map map.png --edit photo.png --mask mask.png

--out gets each image as NUMBER.png, and grid.png: images under what they are conditioned on.
"""


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(Section):
    """Prior and conditions."""

    prior: PriorName | None = None
    """Prior that the run has to be of. Not given: any."""
    run: Path | None = None
    """Run of a prior, or its ORGANIZATION/NAME on the Hugging Face Hub.
    Not given: the embedded prior of the scenes, for maps, or with `text` for captions."""
    out: Path
    """Folder of the images; new, or empty."""
    num_images: int = 16
    """Images to sample. Conditions are used in turn."""
    per_class: int | None = None
    """Images of each label, all those of the first one first, in place of `num_images`."""
    map: Path | None = None
    """A semantic map, an image file whose pixels are class ids (greyscale or palette).
    Of one that is not square, the largest square in its middle counts, as of `edit` and `mask`."""
    text: tuple[str, ...] = ()
    """One or more captions."""
    label: tuple[str, ...] = ()
    """One or more labels, by name or number. Not given: all of the prior's, in turn."""
    data: Path | None = None
    """Take the conditions, 64 at most, of a data set's validation split: a folder or shards with maps or captions.
    Not given (nor a condition): of the one that the prior was trained on."""
    edit: Path | None = None
    """An image to edit: it is kept where `mask` is black."""
    mask: Path | None = None
    """Image file that is white where `edit` is to be sampled anew."""


# Of several bases, the fields of the last come first in the help.
@dataclass(frozen=True, kw_only=True)
class SampleConfig(DeviceConfig, SamplingConfig, SubjectConfig):
    """A run of ``regvq sample``."""

    batch_size: int = 16
    """Images that are sampled at once."""
    strip: bool = False
    """Save the states of the first image as a strip, too; of priors that sample in steps."""


def generate(config: SampleConfig) -> None:
    """Sample images, save each of them and a grid with their conditions, and print where they are.

    Raises:
        ValueError, OSError: what is wrong with settings, files or prior, in one sentence; nothing has been written.
    """
    _check(config)
    generator = _Generator(config)
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    start, seconds = 0, 0.0
    images: list[Tensor] = []
    with progress_bar(console) as progress:
        task = progress.add_task("images", total=generator.num_images)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=start + count * done / total)

        while start < generator.num_images:
            count = min(config.batch_size, generator.num_images - start)
            begin = time.perf_counter()
            sampled = generator.sample(start, count, advance).cpu()
            seconds += time.perf_counter() - begin
            save_images(config.out, sampled, first=start)
            images.append(sampled[: max(0, _GRID - start)])
            start += count
    grid = torch.cat(images)
    rows, legend = generator.show(len(grid))
    save_image_grid(config.out / "grid.png", *rows, grid, legend=legend)
    if generator.states:
        save_image_grid(config.out / "strip.png", generator.strip(), columns=_STRIP)
        say(console, "strip", str(config.out / "strip.png"))
    say(console, "grid", str(config.out / "grid.png"))
    say(console, "images", f"{config.out / '00000.png'} ..., {generator.num_images} in {seconds:.1f} s")


def _check(config: SampleConfig) -> None:
    check_at_least(1, {"--num-images": config.num_images, "--batch-size": config.batch_size})
    check_new_folder(config.out)
    if (config.edit is None) != (config.mask is None):
        raise ValueError("--edit and --mask go together: the image, and where it is to be sampled anew")
    if config.per_class is not None:
        check_at_least(1, {"--per-class": config.per_class})
    given = (config.map, config.text, config.label)
    if config.data is not None and any(given):
        raise ValueError(f"--data {config.data} brings conditions of its own: leave out --map, --text or --label")


class _Generator:
    """A sampler with the conditions and edits of the images."""

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        precision = choose_precision(config.amp, inference_device(config.device))
        embedded = config.prior or ("diffusion" if config.text else "ar")
        self.run = embedded_model(embedded) if config.run is None else local_folder(config.run)
        self.sampler = ImageSampler.from_run(self.run, config, precision, config.prior)
        self._check_flags()
        self.size = self.sampler.tokenizer.image_size
        self.trained_on = TrainedOn.of(self.run, self.sampler.entry.config)
        self.conditions = self._conditions()
        self.num_images = config.num_images if config.per_class is None else len(self.conditions)
        self.kept = None if config.edit is None or config.mask is None else self._edited(config.edit, config.mask)
        self.states: list[Tensor] | None = [] if config.strip else None

    def sample(self, start: int, count: int, progress: Progress) -> Tensor:
        """Sample images (count, 3, H, W) uint8 from number ``start`` on."""
        keep = None
        if self.kept is not None:
            tokens, kept = self.kept
            keep = tokens.expand(count, -1, -1), kept.expand(count, -1, -1)
        states: list[Tensor] | None = [] if self.states is not None and start == 0 else None
        conditions = self._of(range(start, start + count))
        images = self.sampler.sample_under(conditions, start, keep=keep, states=states, progress=progress)
        if states is not None:
            self.states = [state[:1] for state in states]
        return images

    def _of(self, numbers: range) -> Any:
        """Return the conditions of some images."""
        return take(self.conditions, [k % len(self.conditions) for k in numbers])

    def show(self, count: int) -> tuple[list[Tensor], dict[int, str]]:
        """Return the rows above the first ``count`` images in the grid, and the names of the class ids in maps.

        The rows are their conditions, and the edited image.
        """
        names = self.sampler.prior.label_names or self.trained_on.class_names
        rows, legend = render(self.sampler.condition, self._of(range(count)), self.size, names)
        if self.kept is not None:
            tokens, kept = self.kept
            whole = self.sampler.decode(tokens).cpu()
            rows.append(torch.where(self._enlarged(kept), whole, whole // 2 + 127).expand(count, -1, -1, -1))
        return rows, legend

    def strip(self) -> Tensor:
        """Return some states of the first image, from masked (grey) to done."""
        assert self.states
        chosen = [self.states[round(k)] for k in np.linspace(0, len(self.states) - 1, min(_STRIP, len(self.states)))]
        tokens = torch.cat(chosen)
        masked = tokens == self.sampler.prior.num_codes
        images = self.sampler.decode(tokens.masked_fill(masked, 0)).cpu()
        return torch.where(self._enlarged(masked), 127, images).to(torch.uint8)

    def _enlarged(self, mask: Tensor) -> Tensor:
        """Return a mask of tokens (B, h, w) as one of pixels (B, 1, H, W), on the CPU."""
        return F.interpolate(mask[:, None].float().cpu(), (self.size, self.size)).bool()

    # --------------------------------------------------------------------------------------------------- conditions

    def _check_flags(self) -> None:
        """Raise ValueError for flags that are for priors of another kind."""
        config, condition, title = self.config, self.sampler.condition, self.sampler.entry.sampler.title
        given: dict[str, tuple[object, Condition]] = {
            "--map": (config.map, "segmentation"),
            "--text": (config.text, "caption"),
            "--label": (config.label, "label"),
            "--per-class": (config.per_class, "label"),
        }
        for flag, (value, kind) in given.items():
            if value and kind != condition:
                there = "without a condition" if condition == "none" else f"conditioned on a {condition}"
                raise ValueError(f"{flag} is for priors conditioned on a {kind}; this {title} one is {there}")
        if config.strip and not self.sampler.entry.sampler.has_states:
            raise ValueError(f"--strip is for {titles(lambda kind: kind.has_states)} priors; this one is {title}")

    def _conditions(self) -> Conditions:
        """Return the conditions that images get in turn, on the CPU."""
        config, prepare = self.config, self.sampler.token_sampler.prepare
        if self.sampler.condition == "none":
            return no_conditions(config.num_images)
        if config.text:
            self._warn_of_words(config.text)
            return prepare(config.text, "--text", strict=True)
        if config.map is not None:
            return prepare(_read_ids(config.map), f"--map {config.map}")
        if self.sampler.condition == "label" and config.data is None:
            labels = prepare(config.label or range(len(self.sampler.prior.label_names)), "--label")
            return labels.repeat_interleave(config.per_class or 1)
        batch, source = self._validation(min(config.num_images, _GRID))
        return prepare(conditions_of(batch, self.sampler.condition), source)

    def _warn_of_words(self, captions: Sequence[str]) -> None:
        """Warn of words that no training caption had: the prior can't know them."""
        known = self.trained_on.words()
        words = dict.fromkeys(word for caption in captions for word in words_of(caption))
        if known and (unknown := [word for word in words if word not in known]):
            say(Console(), "warning", f"no training caption has {', '.join(map(repr, unknown))}: the prior ignores it")

    def _validation(self, count: int) -> tuple[Any, str]:
        """Return at most ``count`` validation samples of --data, or of the prior's data set, and a name for either."""
        data, seed, fields = self.config.data, 0, fields_of(self.sampler.condition)
        if data is None and not is_embedded(self.run):
            trained = read_config(self.run, self.sampler.entry.config)
            tokens, seed = trained.tokens, trained.run.seed
            if tokens.cache is not None:
                return self._cached(tokens.cache, count), f"the cache {tokens.cache}"
            data = tokens.data
        dataset = build_dataset(data, split="val", image_size=self.size, length=count, seed=seed, fields=fields)
        return read_samples(dataset, range(min(count, len(dataset)))), str(data or dataset.title)

    def _cached(self, folder: Path, count: int) -> Any:
        """Return at most ``count`` validation samples of the cache that the prior was trained on."""
        lack = "is not there"
        if folder.exists():
            cached = TokenDataset(folder, "val", tokenizer_hash=weights_hash(self.sampler.tokenizer))
            if self.sampler.condition in cached.info.fields:
                return cached.__getitems__(list(range(min(count, len(cached)))))
            lack = f"has no {self.sampler.condition} any more"
        raise ValueError(
            f"the token cache {folder} that {self.run} was trained on {lack}: give --data, or "
            f"{CONDITION_FLAGS[self.sampler.condition]}"
        )

    def _edited(self, path: Path, mask: Path) -> tuple[Tensor, Tensor]:
        """Return tokens (1, h, w) of the image, and which of them to keep."""
        pixels, image_size = _read_square("--edit", path, self.size)
        white, mask_size = _read_square("--mask", mask, self.size)
        if image_size != mask_size:
            raise ValueError(f"--mask {mask} has {mask_size} pixels, --edit {path} {image_size}: make them alike")
        sampler, device = self.sampler, self.sampler.precision.device
        pixels, resampled = pixels[None].to(device), white[0] > 127
        with torch.no_grad(), sampler.precision.autocast():
            tokens = sampler.tokenizer.tokenize(to_float(pixels))
        anew = F.adaptive_max_pool2d(resampled[None, None].float(), sampler.prior.token_shape)[:, 0] > 0
        return tokens, ~anew.to(device)


def _read_square(flag: str, path: Path, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Read the largest square in the middle of an image file, (3, size, size) uint8, and the file's width, height."""
    with _opened(flag, path) as image:
        width, height = upright_size(image)
        square = crop_rgb(image, center_box(width, height), size, size, OVERSAMPLING["val"])
    return image_to_tensor(square), (width, height)


def _read_ids(path: Path) -> Tensor:
    """Read the class ids of the largest square in the middle of a semantic map, (1, S, S) uint8."""
    with _opened("--map", path) as image:
        side = min(image.size)
        labels = crop_labels(image, center_box(*image.size), image.size, side, side)
    return torch.from_numpy(np.array(labels, dtype=np.uint8))[None]


def _opened(flag: str, path: Path) -> AbstractContextManager[Image.Image]:
    """Open the image file that a flag names."""
    return opened_image(path, f"{flag} {path}", lambda why: f"{flag} {path}: {why}")


def main(args: Sequence[str]) -> None:
    """Run ``regvq sample``."""
    run_command("sample", SampleConfig, generate, USAGE, args, stopped="stopped; the images so far are in {out}")
