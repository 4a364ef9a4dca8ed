"""The command ``regvq sample``: sample images from a trained prior."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from regvq_fast.data.image_arrays import image_array_writer
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.loading import read_samples
from regvq_fast.data.reading import opened_image
from regvq_fast.data.samples import Field
from regvq_fast.data.tokens import TokenDataset
from regvq_fast.data.transforms import center_box, crop_labels, crop_rgb, image_to_tensor, to_float, upright_size
from regvq_fast.files import check_new_folder
from regvq_fast.image_grids import caption_tiles, color_map, legend_of, save_image_grid, save_images
from regvq_fast.models.hub import local_folder
from regvq_fast.models.weights import weights_hash
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PriorName, SamplingConfig, titles
from regvq_fast.priors.sampler import PriorSampler, Progress
from regvq_fast.priors.trained_on import TrainedOn
from regvq_fast.scenes.embedded import embedded_model, is_embedded
from regvq_fast.settings import Section, check_at_least

_GRID = 64  # images of the grid at most, and conditions that are taken of a data set
_TEXT_SIZE = 192  # least pixels of a caption's tile
_STRIP = 12  # states of a denoising strip
_FLAGS: dict[Field, str] = {"segmentation": "--map", "caption": "--text"}


USAGE = """Sample images from a trained prior.

    regvq sample --out samples                                        # the embedded prior of the scenes
    regvq sample --run runs/ar --out samples                          # maps of the validation split
    regvq sample --run runs/ar --out samples --map map.png --top-p 0.95 --guidance 2
    regvq sample --run runs/diffusion --out samples --text "grass on the left and bricks on the right"
    regvq sample --run runs/ar --out samples --map map.png --edit photo.png --mask mask.png
    regvq sample --run runs/ar --out samples --num-images 50000 --npz samples.npz   # for regvq evaluate --reference

--out gets each image as NUMBER.png, and grid.png: images under what they are conditioned on.
"""


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(Section):
    """Prior and conditions."""

    prior: PriorName | None = None
    """Prior that the run has to be of: ar (semantic maps to images), or diffusion (captions to images).
    Not given: any."""
    run: Path | None = None
    """Run of a prior, or its ORGANIZATION/NAME on the Hugging Face Hub.
    Not given: the embedded prior of the scenes, for maps, or with `text` for captions."""
    out: Path
    """Folder of the images; new, or empty."""
    num_images: int = 16
    """Images to sample. Conditions are used in turn."""
    map: Path | None = None
    """ar: a semantic map, an image file whose pixels are class ids (greyscale or palette).
    Of one that is not square, the largest square in its middle counts, as of `edit` and `mask`."""
    text: tuple[str, ...] = ()
    """diffusion: one or more captions."""
    data: Path | None = None
    """Take the conditions, 64 at most, of a data set's validation split: a folder or shards with maps or captions.
    Not given (nor map or text): of the one that the prior was trained on."""
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
    npz: Path | None = None
    """Write the images to this file, arr_0 (N, H, W, 3) uint8 as evaluation suites read it, in place of NUMBER.png."""
    strip: bool = False
    """diffusion: save the states of the first image as a strip, too."""


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
    with progress_bar(console) as progress, _saving(config, generator.size) as save:
        task = progress.add_task("images", total=config.num_images)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=start + count * done / total)

        while start < config.num_images:
            count = min(config.batch_size, config.num_images - start)
            begin = time.perf_counter()
            sampled = generator.sample(start, count, advance).cpu()
            seconds += time.perf_counter() - begin
            save(sampled, start)
            images.append(sampled[: max(0, _GRID - start)])
            start += count
    grid = torch.cat(images)
    save_image_grid(config.out / "grid.png", *generator.show(len(grid)), grid, legend=generator.legend(len(grid)))
    if generator.states:
        save_image_grid(config.out / "strip.png", generator.strip(), columns=_STRIP)
        say(console, "strip", str(config.out / "strip.png"))
    say(console, "grid", str(config.out / "grid.png"))
    where = f"{config.out / '00000.png'} ..." if config.npz is None else str(config.npz)
    say(console, "images", f"{where}, {config.num_images} in {seconds:.1f} s")


@contextmanager
def _saving(config: SampleConfig, size: int) -> Iterator[Callable[[Tensor, int], None]]:
    """Yield a function that saves images (B, 3, size, size) uint8 from a number on: as files, or in one."""
    if config.npz is None:
        yield lambda images, first: save_images(config.out, images, first)
        return
    with image_array_writer(config.npz, config.num_images, size) as write:
        yield lambda images, _: write(images)


def _check(config: SampleConfig) -> None:
    check_at_least(1, {"--num-images": config.num_images, "--batch-size": config.batch_size})
    check_new_folder(config.out)
    if config.npz is not None and config.npz.suffix != ".npz":
        raise ValueError(f"--npz {config.npz} must end in .npz")
    if config.npz is not None and config.npz.exists():
        raise FileExistsError(f"--npz {config.npz} exists; name a new file")
    if (config.edit is None) != (config.mask is None):
        raise ValueError("--edit and --mask go together: the image, and where it is to be sampled anew")
    if config.data is not None and (config.map is not None or config.text):
        raise ValueError(f"--data {config.data} brings conditions of its own: leave out --map or --text")


class _Generator:
    """A sampler with the conditions and edits of the images."""

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        precision = choose_precision(config.amp, inference_device(config.device))
        embedded = config.prior or ("diffusion" if config.text else "ar")
        self.run = embedded_model(embedded) if config.run is None else local_folder(config.run)
        self.sampler = ImageSampler.from_run(self.run, config, precision, config.prior)
        wanted: tuple[tuple[str, object, Callable[[type[PriorSampler]], bool]], ...] = (
            ("--map", config.map, lambda sampler: sampler.condition_field == "segmentation"),
            ("--text", config.text, lambda sampler: sampler.condition_field == "caption"),
            ("--strip", config.strip, lambda sampler: sampler.has_states),
        )
        own = self.sampler.entry.sampler
        for flag, value, has in wanted:
            if value and not has(own):
                raise ValueError(f"{flag} is for {titles(has)} priors; this one is {own.title}")
        self.size = self.sampler.tokenizer.image_size
        self.conditions = self._conditions()
        self.kept = None if config.edit is None or config.mask is None else self._edited(config.edit, config.mask)
        self.states: list[Tensor] | None = [] if config.strip else None

    def sample(self, start: int, count: int, progress: Progress) -> Tensor:
        """Sample images (count, 3, H, W) uint8 from number ``start`` on."""
        keep = None
        if self.kept is not None:
            tokens, kept = self.kept
            keep = tokens.expand(count, -1, -1), kept.expand(count, -1, -1)
        states: list[Tensor] | None = [] if self.states is not None and start == 0 else None
        conditions = self._chosen(range(start, start + count))
        images = self.sampler.sample_under(conditions, start, keep=keep, states=states, progress=progress)
        if states is not None:
            self.states = [state[:1] for state in states]
        return images

    def _chosen(self, numbers: range) -> Tensor | list[str]:
        """Return the conditions of some images."""
        chosen = [k % len(self.conditions) for k in numbers]
        if isinstance(self.conditions, Tensor):
            return self.conditions[chosen]
        return [self.conditions[k] for k in chosen]

    def show(self, count: int) -> list[Tensor]:
        """Return the rows above the first ``count`` images in the grid: conditions, and the edited image."""
        conditions = self._chosen(range(count))
        if isinstance(conditions, Tensor):
            rows = [color_map(conditions, (self.size, self.size))]
        else:
            rows = [caption_tiles(conditions, self.size * -(-_TEXT_SIZE // self.size))]
        if self.kept is not None:
            tokens, kept = self.kept
            whole = self.sampler.decode(tokens).cpu()
            rows.append(torch.where(self._enlarged(kept), whole, whole // 2 + 127).expand(count, -1, -1, -1))
        return rows

    def legend(self, count: int) -> dict[int, str]:
        """Return names of the class ids in the maps of the first ``count`` images."""
        conditions = self._chosen(range(count))
        return legend_of(conditions, self._class_names()) if isinstance(conditions, Tensor) else {}

    def _class_names(self) -> tuple[str, ...]:
        """Return the names of the classes that the prior was trained on; none if unknown."""
        return TrainedOn.of(self.run, self.sampler.entry.config).class_names

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

    def _conditions(self) -> Tensor | Sequence[str]:
        """Return semantic maps (K, h', w') on the CPU, or captions."""
        config, prepare = self.config, self.sampler.token_sampler.prepare
        if config.text:
            return prepare(config.text, "--text", strict=True)
        if config.map is not None:
            return prepare(_read_ids(config.map), f"--map {config.map}")
        batch, source = self._validation(min(config.num_images, _GRID))
        return prepare(batch[self.sampler.field], source)

    def _validation(self, count: int) -> tuple[Any, str]:
        """Return at most ``count`` validation samples of --data, or of the prior's data set, and a name for either."""
        data, seed, fields = self.config.data, 0, (self.sampler.field,)
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
            if self.sampler.field in cached.info.fields:
                return cached.__getitems__(list(range(min(count, len(cached)))))
            lack = f"has no {self.sampler.field} any more"
        raise ValueError(
            f"the token cache {folder} that {self.run} was trained on {lack}: give --data, or "
            f"{_FLAGS[self.sampler.field]}"
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
    run_command("sample", SampleConfig, generate, USAGE, args, stopped="stopped; images saved so far are in {out}")
