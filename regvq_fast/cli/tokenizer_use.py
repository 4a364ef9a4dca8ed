"""Flags and helpers of the commands that use a tokenizer: its run, tiles, input images, batches of one size."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from regvq_fast.config.runtime import DeviceConfig
from regvq_fast.data.finding import EXTENSIONS, find_files, is_image
from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.reading import opened_image
from regvq_fast.data.tiles import Tiling, checked_tiling
from regvq_fast.data.transforms import Box, center_box, crop_rgb, image_to_tensor, upright_size
from regvq_fast.models.hub import local_folder
from regvq_fast.models.pretrained import TOKENIZER
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import choose_precision, inference_device
from regvq_fast.scenes.embedded import embedded_model
from regvq_fast.settings import Section, check_at_least

logger = logging.getLogger("regvq_fast")


class Sized(Protocol):
    """Anything with the height and width of an image, in pixels."""

    @property
    def size(self) -> tuple[int, int]: ...


Item = TypeVar("Item", bound=Sized)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Tokenizer."""

    run: Annotated[str | None, arg(metavar="RUN")] = None
    """Tokenizer: run (of a prior, too), checkpoint, folder or name on the hub. Default: the embedded scenes'."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(DeviceConfig):
    """Device, and how much goes through the networks at once."""

    batch_size: int = 16
    """Images of the tokenizer's size per batch; fewer if they are larger."""
    tile: Annotated[int | None, arg(metavar="INT")] = None
    """Side of square tiles in pixels, for images larger than memory. Default: no tiles."""
    overlap: Annotated[int | None, arg(metavar="INT")] = None
    """Minimum overlap of blended tiles in pixels. Default: a quarter of a tile."""

    def check(self) -> None:
        super().check()
        check_at_least(1, {"--batch-size": self.batch_size})
        if self.tile is None and self.overlap is not None:
            raise ValueError(f"--overlap {self.overlap} applies to tiles: give their size with --tile")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Section):
    """Images."""

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH [PATH ...]")]
    """Image files and folders, searched recursively."""
    square: bool = False
    """Crop the central square and resize it to the tokenizer's image size."""


class UsedTokenizer(NamedTuple):
    """A tokenizer on its device, with tiling, autocast and batch size."""

    model: VQGAN
    tiling: Tiling | None
    autocast: torch.autocast
    batch_pixels: int
    """Largest number of pixels in a batch."""

    @classmethod
    def load(cls, run: str | None, config: ComputeConfig) -> Self:
        """Load the tokenizer of a run.

        Raises:
            ValueError, OSError: invalid settings, or no tokenizer; the message is one sentence.
        """
        config.check()
        precision = choose_precision(config.amp, inference_device(config.device))
        model = load_tokenizer(run)
        factor = model.downsampling_factor
        tiling = None if config.tile is None else checked_tiling(factor, config.tile, config.overlap)
        model.to(precision.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model, tiling, precision.autocast(), config.batch_size * model.image_size**2)

    def batches(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """Yield batches of consecutive items of one size, of at most `batch_pixels` or a single item."""
        batch: list[Item] = []
        for item in items:
            height, width = item.size
            if self.tiling is not None:
                height, width = min(height, self.tiling.tile), min(width, self.tiling.tile)
            full = (len(batch) + 1) * height * width > self.batch_pixels
            if batch and (full or item.size != batch[0].size):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


def load_tokenizer(run: str | None) -> VQGAN:
    """Load a tokenizer as :meth:`VQGAN.from_pretrained`, or from a prior's run; None: the embedded one."""
    folder = embedded_model("tokenizer") if run is None else local_folder(run)
    own = folder / TOKENIZER
    return VQGAN.from_pretrained(own if own.is_dir() else folder)


# ------------------------------------------------------------------------------------------------------- images in, out


class ImageFile(NamedTuple):
    """An image file, given directly or found in a given folder."""

    path: Path
    name: str
    """Name of the file, or its path in the folder, with slashes."""


class OpenedImage(NamedTuple):
    """An image read from a file."""

    name: str
    pixels: Tensor
    """(3, H, W) uint8."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[1], self.pixels.shape[2]


def output_name(name: str) -> str:
    """Return the name of an image's PNG file in the output."""
    return str(Path(name).with_suffix(".png"))


def find_images(paths: Sequence[Path]) -> list[ImageFile]:
    """Return the image files that paths name: files, and folders of them.

    Raises:
        FileNotFoundError: no such path, or no image in a folder.
        ValueError: no path, a file that is not an image, or two images with the same output name.
    """
    if not paths:
        raise ValueError("no images given: name files or folders")
    found: dict[str, ImageFile] = {}
    for path in paths:
        if path.is_dir():
            inside = [Path(file) for file in find_files(path, EXTENSIONS) if is_image(file)]
            if not inside:
                kinds = " ".join(sorted(extension.removeprefix(".") for extension in EXTENSIONS))
                raise FileNotFoundError(f"no images in {path} or its subfolders ({kinds})")
            files = [ImageFile(file, file.relative_to(path).as_posix()) for file in inside]
        else:
            with opened_image(path, str(path), lambda why, path=path: f"{path}: {why}"):  # type: ignore[misc]
                files = [ImageFile(path, path.name)]
        for file in files:
            other = found.setdefault(output_name(file.name), file)
            if other is not file:
                raise ValueError(
                    f"{other.path} and {file.path} would both become {output_name(file.name)}: rename one, or give "
                    "them in two calls"
                )
    return list(found.values())


def read_images(files: Iterable[ImageFile], square: int | None = None) -> Iterator[OpenedImage]:
    """Yield the images of files, upright and in RGB; unreadable ones are skipped with a warning.

    Args:
        files: see `find_images`.
        square: side in pixels of the central square to take; None: images as they are.

    Raises:
        ValueError: none of the images can be read. OSError: the storage fails.
    """
    any_read = False
    for path, name in files:
        try:
            with (
                warnings.catch_warnings(),
                opened_image(path, str(path), lambda why, path=path: f"{path}: {why}") as image,  # type: ignore[misc]
            ):
                warnings.filterwarnings("ignore", module="PIL")  # about oddities in files that it reads
                width, height = upright_size(image)
                box = Box(0, 0, width, height) if square is None else center_box(width, height)
                size = (width, height) if square is None else (square, square)
                pixels = image_to_tensor(crop_rgb(image, box, *size, OVERSAMPLING["val"]))
        except (ValueError, FileNotFoundError) as error:
            logger.warning("skipped unreadable image %s", error)
            continue
        any_read = True
        yield OpenedImage(name, pixels)
    if not any_read:
        raise ValueError("none of the images can be read: give others; the warnings above name each")
