"""Drawing images from a trained prior: what ``train/sample.py`` runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from regvq_fast.config import read_config
from regvq_fast.config.prior import ARConfig, DiffusionConfig
from regvq_fast.data.loading import build_dataset, collate
from regvq_fast.data.pictures import Field
from regvq_fast.data.tokens import TokenDataset, majority_vote
from regvq_fast.data.transforms import (
    Box,
    center_box,
    crop_labels,
    crop_rgb,
    image_to_tensor,
    to_float,
    to_uint8,
    upright_size,
)
from regvq_fast.evaluation.pictures import caption_tiles, color_map, save_image_grid, save_images
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.token_transformer import TokenTransformer
from regvq_fast.models.vq_diffusion import VQDiffusion
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import choose_device, choose_precision
from regvq_fast.sampling.autoregressive import sample_autoregressive
from regvq_fast.sampling.diffusion import sample_diffusion

_GRID = 64  # images of the grid at most
_TEXT_SIZE = 192  # pixels of a caption's picture at least
_STRIP = 12  # states of a denoising strip


@dataclass(frozen=True)
class SampleConfig:
    """A run of ``train/sample.py``."""

    prior: Literal["ar", "diffusion"]
    """Autoregressive (semantic maps to images), or diffusion (captions to images)."""
    run: Path
    """Run of train/ar.py or train/diffusion.py."""
    out: Path
    """Folder of the images; new, or empty."""
    num_images: int = 16
    """Images to draw. Conditions are used in turn."""
    map: Path | None = None
    """ar: a semantic map, an image file whose pixels are class ids (greyscale or palette)."""
    text: tuple[str, ...] = ()
    """diffusion: one or more captions."""
    data: Path | None = None
    """Take the conditions of a data set's validation split: a folder or shards with maps or captions. Not given (nor
    map or text): of the one that the prior was trained on."""
    edit: Path | None = None
    """An image to edit: it is kept where `mask` is black."""
    mask: Path | None = None
    """Image file that is white where `edit` is to be drawn anew."""
    temperature: float = 1.0
    """Of the choice of a token; 0 takes the most likely one."""
    top_k: int | None = None
    """ar: choose among so many most likely codes."""
    top_p: float | None = None
    """ar: choose among the fewest codes whose probabilities sum to this."""
    truncation: float = 0.86
    """diffusion: share of p(x_0 | x_t) to choose from, the most likely codes first."""
    steps: int | None = None
    """diffusion: steps to take. Not given: all that the prior was trained with."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1: none."""
    seed: int = 0
    """Decides the images: number k of a seed is the same in any batch."""
    batch_size: int = 16
    """Images that are drawn at once."""
    device: str = "auto"
    """"cuda", "cpu", "cuda:1" ...; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile the prior's step with torch.compile: for many images."""
    amp: bool = False
    """Mixed precision."""
    strip: bool = False
    """diffusion: save the states of the first image as a strip, too."""


def generate(config: SampleConfig) -> None:
    """Draw images, save each of them and a grid with their conditions, and say where they are.

    Raises:
        ValueError, OSError: what is wrong with settings, files or prior, in one sentence; nothing has been written.
    """
    _check(config)
    generator = _Generator(config)
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    start, seconds = 0, 0.0
    images: list[Tensor] = []
    with Progress(
        TextColumn("[bold]sampling"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} images"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=float(config.num_images))
        while start < config.num_images:
            count = min(config.batch_size, config.num_images - start)
            begin = time.perf_counter()
            drawn = generator.draw(
                start,
                count,
                lambda done, total, at=start, n=count: progress.update(task, completed=at + n * done / total),
            )
            drawn = drawn.cpu()
            seconds += time.perf_counter() - begin
            save_images(config.out, drawn, first=start)
            images.append(drawn[: max(0, _GRID - start)])
            start += count
    grid = torch.cat(images)
    save_image_grid(config.out / "grid.png", *generator.show(len(grid)), grid)
    if generator.states:
        save_image_grid(config.out / "strip.png", generator.strip(), columns=_STRIP)
        console.print(f"strip   {config.out / 'strip.png'}", highlight=False, soft_wrap=True)
    console.print(f"grid    {config.out / 'grid.png'}", highlight=False, soft_wrap=True)
    console.print(
        f"images  {config.out}/00000.png ..., {config.num_images} in {seconds:.1f} s", highlight=False, soft_wrap=True
    )


def _check(config: SampleConfig) -> None:
    for name in ("num_images", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ValueError(f"--out {config.out} exists and is not an empty folder; name a new one")
    if (config.edit is None) != (config.mask is None):
        raise ValueError("--edit and --mask go together: the image, and where it is to be drawn anew")
    others: dict[str, dict[str, object]] = {
        "ar": {"--text": config.text, "--steps": config.steps, "--strip": config.strip},
        "diffusion": {"--map": config.map, "--top-k": config.top_k, "--top-p": config.top_p},
    }
    for flag, value in others[config.prior].items():
        if value:
            raise ValueError(f"{flag} is not for --prior {config.prior}")
    if config.data is not None and (config.map is not None or config.text):
        raise ValueError(f"--data {config.data} brings conditions of its own: leave out --map or --text")


class _Generator:
    """A prior, its tokenizer, and what the images are to be."""

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.amp, self.device)
        kind = TokenTransformer if config.prior == "ar" else VQDiffusion
        self.prior: Any = kind.from_pretrained(config.run).to(self.device)
        if self.precision.dtype is not None:
            self.prior.to(self.precision.dtype)
        tokenizer = VQGAN.from_pretrained(config.run / TOKENIZER)
        if tokenizer.token_shape != self.prior.token_shape or tokenizer.quantize.num_codes != self.prior.num_codes:
            raise ValueError(
                f"{config.run / TOKENIZER} has {tokenizer.token_shape} tokens of {tokenizer.quantize.num_codes} codes, "
                f"the prior {self.prior.token_shape} of {self.prior.num_codes}: they don't belong together"
            )
        self.tokenizer = tokenizer.to(self.device)
        self.maps, self.captions = self._conditions()
        self.kept = None if config.edit is None or config.mask is None else self._edited(config.edit, config.mask)
        self.states: list[Tensor] | None = [] if config.strip else None

    def draw(self, start: int, count: int, progress: Any) -> Tensor:
        """Images (count, 3, H, W) uint8 from number ``start`` on."""
        config = self.config
        keep = None if self.kept is None else tuple(part.expand(count, -1, -1) for part in self.kept)
        shared: dict[str, Any] = {
            "seed": config.seed,
            "temperature": config.temperature,
            "guidance": config.guidance,
            "keep": keep,
            "first_image": start,
            "compile": config.compile,
            "progress": progress,
        }
        numbers = range(start, start + count)
        if self.maps is not None:
            condition = self.maps[[k % len(self.maps) for k in numbers]].to(self.device).long()
            tokens = sample_autoregressive(self.prior, condition, top_k=config.top_k, top_p=config.top_p, **shared)
        else:
            captions = [self.captions[k % len(self.captions)] for k in numbers]
            states: list[Tensor] | None = [] if self.states is not None and start == 0 else None
            tokens = sample_diffusion(
                self.prior, captions, steps=config.steps, truncation=config.truncation, states=states, **shared
            )
            if states is not None and self.states is not None:
                self.states += [state[:1] for state in states]
        return self._decode(tokens)

    def show(self, count: int) -> list[Tensor]:
        """What belongs above the first ``count`` images: conditions, and what is edited."""
        size = self.tokenizer.image_size
        if self.maps is not None:
            rows = [color_map(self.maps[[k % len(self.maps) for k in range(count)]], (size, size))]
        else:
            captions = [self.captions[k % len(self.captions)] for k in range(count)]
            rows = [caption_tiles(captions, size * -(-_TEXT_SIZE // size))]
        if self.kept is not None:
            tokens, kept = self.kept
            whole = self._decode(tokens).cpu()
            shown = F.interpolate(kept[:, None].float().cpu(), (size, size)).bool()
            rows.append(torch.where(shown, whole, whole // 2 + 127).expand(count, -1, -1, -1))
        return rows

    def strip(self) -> Tensor:
        """Some states of the first image, from masked (grey) to done."""
        assert self.states
        chosen = [self.states[round(k)] for k in np.linspace(0, len(self.states) - 1, min(_STRIP, len(self.states)))]
        tokens = torch.cat(chosen)
        masked = tokens == self.prior.num_codes
        images = self._decode(tokens.masked_fill(masked, 0)).cpu()
        size = self.tokenizer.image_size
        return torch.where(F.interpolate(masked[:, None].float().cpu(), (size, size)).bool(), 127, images).to(
            torch.uint8
        )

    @torch.no_grad()
    def _decode(self, tokens: Tensor) -> Tensor:
        with self.precision.autocast():
            return to_uint8(self.tokenizer.decode_indices(tokens).float())

    # --------------------------------------------------------------------------------------------------- conditions

    def _conditions(self) -> tuple[Tensor | None, Sequence[str]]:
        """Semantic maps (K, h', w') on the CPU, or captions."""
        config = self.config
        if config.text:
            self.prior.text_encoder.truncate = False  # of a data set's captions; people are told what doesn't fit
            self.prior.tokenize_text(config.text)
            return None, config.text
        if config.map is not None:
            return self._checked(_read_ids(config.map, self.prior.condition_shape), f"--map {config.map}"), ()
        field: Field = "segmentation" if config.prior == "ar" else "caption"
        batch, source = self._validation(field, min(config.num_images, _GRID))
        if field == "caption":
            return None, batch["caption"]
        maps = batch["segmentation"]
        if maps.shape[1:] != self.prior.condition_shape:
            maps = majority_vote(maps, self.prior.condition_shape)
        return self._checked(maps, source), ()

    def _validation(self, field: Field, count: int) -> tuple[Any, str]:
        """The first validation samples of --data, or of what the prior was trained on; and what that is."""
        data, seed, size = self.config.data, 0, self.tokenizer.image_size
        if data is None:
            kind: type[ARConfig | DiffusionConfig] = ARConfig if self.config.prior == "ar" else DiffusionConfig
            trained = read_config(self.config.run, kind)
            tokens, seed = trained.tokens, trained.run.seed
            if tokens.cache is not None and tokens.cache.exists():
                cached = TokenDataset(tokens.cache, "val")
                return cached.__getitems__(list(range(min(count, len(cached))))), f"the cache {tokens.cache}"
            if tokens.cache is not None:
                raise ValueError(
                    f"the token cache {tokens.cache} that {self.config.run} was trained on is not there: give --data, "
                    f"or {'--map' if self.config.prior == 'ar' else '--text'}"
                )
            data = tokens.data
        dataset = build_dataset(data, split="val", image_size=size, length=count, seed=seed, fields=(field,))
        return collate([dataset[k] for k in range(min(count, len(dataset)))]), str(data or "the embedded scenes")

    def _checked(self, maps: Tensor, source: str) -> Tensor:
        if int(maps.max()) >= self.prior.num_classes:
            raise ValueError(
                f"{source} holds the class id {int(maps.max())}; the prior knows ids below {self.prior.num_classes}"
            )
        return maps

    def _edited(self, path: Path, mask: Path) -> tuple[Tensor, Tensor]:
        """Tokens (1, h, w) of the image, and which of them to keep."""
        size = self.tokenizer.image_size
        pixels, image_size = _read_square(path, size)
        white, mask_size = _read_square(mask, size)
        if image_size != mask_size:
            raise ValueError(f"--mask {mask} has {mask_size} pixels, --edit {path} {image_size}: make them alike")
        pixels, redrawn = pixels[None].to(self.device), white[0] > 127
        with torch.no_grad(), self.precision.autocast():
            tokens = self.tokenizer.tokenize(to_float(pixels))
        anew = F.adaptive_max_pool2d(redrawn[None, None].float(), self.prior.token_shape)[:, 0] > 0
        return tokens, ~anew.to(self.device)


def _read_square(path: Path, size: int) -> tuple[Tensor, tuple[int, int]]:
    """The largest square in the middle of an image file, (3, size, size) uint8; and the file's width and height."""
    try:
        with Image.open(path) as image:
            width, height = upright_size(image)
            return image_to_tensor(crop_rgb(image, center_box(width, height), size, size, 3.0)), (width, height)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image") from None


def _read_ids(path: Path, shape: tuple[int, int]) -> Tensor:
    """A semantic map reduced to a grid by majority vote, (1, h, w) uint8."""
    try:
        with Image.open(path) as image:
            box = Box(0, 0, *image.size)
            labels = crop_labels(image, box, image.size, *image.size)
    except UnidentifiedImageError:
        raise ValueError(f"--map {path} is not an image") from None
    except ValueError as error:
        raise ValueError(f"--map {path}: {error}") from None
    return majority_vote(torch.from_numpy(np.array(labels, dtype=np.uint8))[None], shape)
