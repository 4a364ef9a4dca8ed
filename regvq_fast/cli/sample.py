"""The command ``regvq sample``: sample images from a trained prior."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from regvq_fast.cli.sample_inputs import MOST_CONDITIONS, SubjectConfig, check_flags, read_conditions, read_edit
from regvq_fast.config import run_command
from regvq_fast.config.runtime import DeviceConfig
from regvq_fast.console import progress_bar, say
from regvq_fast.data.image_arrays import image_array_writer
from regvq_fast.files import check_new_file, check_new_folder, kept_folder
from regvq_fast.image_grids import save_image_grid, save_images
from regvq_fast.models.hub import local_folder
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.priors.canvas import plan, sample_canvas
from regvq_fast.priors.conditions import render, take
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import SamplingConfig, titles
from regvq_fast.priors.sampler import Progress
from regvq_fast.priors.trained_on import TrainedOn
from regvq_fast.scenes.embedded import embedded_model
from regvq_fast.settings import check_at_least

_GRID = MOST_CONDITIONS  # largest number of images in the grid
_STRIP = 12  # largest number of states in a strip


USAGE = """Sample images from a trained prior.

    regvq sample --out samples                # the embedded prior of the scenes
    regvq sample --run runs/ar --out samples  # maps of the validation split
    regvq sample --run runs/ar --out samples --map map.png --top-p 0.95 --guidance 2
    regvq sample --run runs/diffusion --out samples --text "grass on the left and bricks on the right"
    regvq sample --run runs/ar --out samples --label "golden retriever" --guidance 2
    regvq sample --run runs/ar --out samples --per-class 50  # 50 images a label
    regvq sample --run runs/ar --out samples --map map.png --edit photo.png --mask mask.png
    regvq sample --run runs/ar --out samples --edit photo.png --extend right right
    regvq sample --run runs/ar --out samples --num-images 50000 --npz samples.npz

--out gets each image as NUMBER.png, and grid.png: images under what they are conditioned on.
"""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class SampleConfig(DeviceConfig, SamplingConfig, SubjectConfig):
    """A run of ``regvq sample``."""

    batch_size: int = 16
    """Images sampled per batch."""
    npz: Path | None = None
    """Write the images to this file, arr_0 (N, H, W, 3) uint8 as evaluation suites read it, in place of NUMBER.png."""
    strip: bool = False
    """Save the states of the first image as a strip, too; of priors that sample in steps."""


def generate(config: SampleConfig) -> None:
    """Sample images, save them and a grid with their conditions, and print the paths.

    Raises:
        ValueError, OSError: settings, files or prior can't be used; one sentence, and nothing is written.
    """
    _check(config)
    generator = _Generator(config)
    console = Console()
    columns = generator.columns()
    # If there are more images than fit into the grid, it has whole rows only.
    most = _GRID if generator.num_images <= _GRID else _GRID // columns * columns
    start, seconds = 0, 0.0
    images: list[Tensor] = []
    with kept_folder(config.out) as check:
        with progress_bar(console) as progress, generator.saving() as save:
            task = progress.add_task("images", total=generator.num_images)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=start + count * done / total)

            while start < generator.num_images:
                count = min(config.batch_size, generator.num_images - start)
                begin = time.perf_counter()
                sampled = generator.sample(start, count, advance).cpu()
                seconds += time.perf_counter() - begin
                save(sampled, start)
                check()
                images.append(sampled[: max(0, most - start)])
                start += count
        grid = torch.cat(images)
        rows, legend = generator.show(len(grid))
        save_image_grid(config.out / "grid.png", *rows, grid, columns=columns, legend=legend)
        if generator.states:
            save_image_grid(config.out / "strip.png", generator.strip(), columns=_STRIP)
            say(console, "strip", str(config.out / "strip.png"))
    say(console, "grid", str(config.out / "grid.png"))
    where = f"{config.out / '00000.png'} ..." if config.npz is None else str(config.npz)
    say(console, "images", f"{where}, {generator.num_images} in {seconds:.1f} s")


def _check(config: SampleConfig) -> None:
    check_at_least(1, {"--num-images": config.num_images, "--batch-size": config.batch_size})
    check_new_folder(config.out)
    if config.npz is not None and config.npz.suffix != ".npz":
        raise ValueError(f"--npz {config.npz} must end in .npz")
    if config.npz is not None:
        check_new_file("--npz", config.npz)
    if config.mask is not None and config.edit is None:
        raise ValueError(f"--mask {config.mask} needs an image: give --edit")
    if config.edit is not None and config.mask is None and not config.extend:
        raise ValueError(f"--edit {config.edit} needs --mask, the region to resample, or --extend")
    if config.strip and config.extend:
        raise ValueError("--strip shows a single grid of tokens: leave out --extend")
    if config.per_class is not None:
        check_at_least(1, {"--per-class": config.per_class})
    given = (config.map, config.text, config.label, config.per_class)
    if config.data is not None and any(given):
        raise ValueError(
            f"--data {config.data} has its own conditions: leave out --map, --text, --label or --per-class"
        )


class _Generator:
    """A sampler with its conditions and edits."""

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        precision = choose_precision(config.amp, inference_device(config.device))
        embedded = config.prior or ("diffusion" if config.text else "ar")
        self.run = embedded_model(embedded) if config.run is None else local_folder(config.run)
        self.sampler = ImageSampler.from_run(self.run, config, precision, config.prior)
        check_flags(config, self.sampler)
        kind = self.sampler.entry.sampler
        if config.strip and not kind.has_states:
            owners = titles(lambda other: other.has_states)
            raise ValueError(f"--strip is for {owners} priors; this one is {kind.title}")
        self.factor = self.sampler.tokenizer.downsampling_factor
        self.plan = plan(self.sampler.prior.token_shape, config.extend)
        self.trained_on = TrainedOn.of(self.run, self.sampler.entry.config)
        self.conditions = read_conditions(config, self.sampler, self.run, self.trained_on, self.plan)
        self.num_images = config.num_images if config.per_class is None else len(self.conditions)
        self.kept = None if config.edit is None else read_edit(self.sampler, config.edit, config.mask)
        self.states: list[Tensor] | None = [] if config.strip else None

    def sample(self, start: int, count: int, progress: Progress) -> Tensor:
        """Sample images (count, 3, H, W) uint8 from number ``start`` on."""
        keep = None
        if self.kept is not None:
            tokens, kept = self.kept
            keep = tokens.expand(count, -1, -1), kept.expand(count, -1, -1)
        states: list[Tensor] | None = [] if self.states is not None and start == 0 else None
        conditions = self._of(range(start, start + count))
        if self.config.extend:
            of_window = partial(self.plan.part, conditions, self.sampler.condition)
            tokens = sample_canvas(
                self.sampler.token_sampler, self.plan, of_window, start, self.num_images, keep=keep, progress=progress
            )
            return self.sampler.decode(tokens)
        images = self.sampler.sample_under(conditions, start, keep=keep, states=states, progress=progress)
        if states is not None:
            self.states = [state[:1] for state in states]
        return images

    @contextmanager
    def saving(self) -> Iterator[Callable[[Tensor, int], None]]:
        """Yield a function that saves images (B, 3, H, W) uint8, given the first number: as files, or into one file."""
        if self.config.npz is None:
            yield lambda images, first: save_images(self.config.out, images, first)
            return
        with image_array_writer(self.config.npz, self.num_images, self._pixels()) as write:
            yield lambda images, _: write(images)
            check_new_file("--npz", self.config.npz)

    def _of(self, numbers: range) -> Any:
        """Return the conditions of some images."""
        return take(self.conditions, [k % len(self.conditions) for k in numbers])

    def show(self, count: int) -> tuple[list[Tensor], dict[int, str]]:
        """Return the rows above the first ``count`` images in the grid, and the names of the class ids in maps.

        The rows show the conditions and the edited image.
        """
        names = self.sampler.prior.label_names or self.trained_on.class_names
        rows, legend = render(self.sampler.condition, self._of(range(count)), self._pixels(), names)
        if self.kept is not None:
            tokens, kept = self.kept
            whole = self.sampler.decode(tokens).cpu()
            edited = torch.where(self._enlarged(kept), whole, whole // 2 + 127)
            rows.append(self._on_canvas(edited).expand(count, -1, -1, -1))
        return rows, legend

    def columns(self) -> int:
        """Return the number of columns of the grid: with few labels, a multiple of their number."""
        if self.sampler.condition != "label":
            return 8
        labels = len(torch.as_tensor(self.conditions).unique())
        return max(1, 8 // labels) * labels if labels <= 16 else 8

    def _pixels(self) -> tuple[int, int]:
        """Return height and width of the images."""
        return self.plan.height * self.factor, self.plan.width * self.factor

    def _on_canvas(self, image: Tensor) -> Tensor:
        """Return an image (1, 3, H, W) uint8 at its position on a grey canvas."""
        canvas = torch.full((1, 3, *self._pixels()), 127, dtype=torch.uint8)
        top, left = (side * self.factor for side in self.plan.windows[0])
        canvas[..., top : top + image.shape[2], left : left + image.shape[3]] = image
        return canvas

    def strip(self) -> Tensor:
        """Return some states of the first image, from all masked (grey) to the result."""
        assert self.states
        chosen = [self.states[round(k)] for k in np.linspace(0, len(self.states) - 1, min(_STRIP, len(self.states)))]
        tokens = torch.cat(chosen)
        masked = tokens == self.sampler.prior.num_codes
        images = self.sampler.decode(tokens.masked_fill(masked, 0)).cpu()
        return torch.where(self._enlarged(masked), 127, images).to(torch.uint8)

    def _enlarged(self, mask: Tensor) -> Tensor:
        """Return a mask of tokens (B, h, w) as one of pixels (B, 1, H, W), on the CPU."""
        return F.interpolate(mask[:, None].float().cpu(), scale_factor=self.factor).bool()


def main(args: Sequence[str]) -> None:
    """Run ``regvq sample``."""
    run_command("sample", SampleConfig, generate, USAGE, args, stopped="stopped; images saved so far are in {out}")
