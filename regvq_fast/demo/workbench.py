"""Models of the demo page: from an image to its reconstruction and codes, from a condition to images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.reconstruction_metrics import image_psnr
from regvq_fast.image_grids import color_map
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.precision import Precision
from regvq_fast.priors.conditions import no_conditions
from regvq_fast.priors.diffusion.text import words_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import SamplingConfig
from regvq_fast.priors.sampler import Progress, decode_images
from regvq_fast.priors.trained_on import TrainedOn

MAX_IMAGES = 8
"""Largest number of images per request."""
MAX_CAPTION = 500
"""Largest number of characters of a caption."""

_MAP_SIDE = 64  # side of a painted map in cells, unless the prior's grid is larger
_SHOWN_CODES = 48


class UsedCode(NamedTuple):
    """A code of an image."""

    code: int
    """Index of the code."""
    positions: int
    """Number of positions with this code."""
    patch: Tensor
    """(3, f, f) uint8, decoded from a token map filled with this code."""


class Reconstruction(NamedTuple):
    """An image, its reconstruction and its tokens."""

    image: Tensor
    """(3, S, S) uint8, input of the tokenizer."""
    reconstruction: Tensor
    """(3, S, S) uint8."""
    token_map: Tensor
    """(3, h, w) uint8: tokens as colours; similar codes have similar colours."""
    codes: list[UsedCode]
    """The most frequent codes, at most 48."""
    used: int
    """Number of different codes."""
    psnr: float
    """dB; infinite if the reconstruction is exact."""


class Reconstructor:
    """A tokenizer that returns reconstructions with tokens and codes.

    Args:
        tokenizer: of RGB images, in evaluation mode, on the device of the precision.
        precision: of its networks.

    Raises:
        ValueError: the tokenizer is not of RGB images.
    """

    def __init__(self, tokenizer: VQGAN, precision: Precision) -> None:
        if tokenizer.in_channels != 3:
            raise ValueError(f"the demo shows RGB images, this tokenizer takes {tokenizer.in_channels} channels")
        self.tokenizer, self.precision = tokenizer, precision
        self.size = tokenizer.image_size
        self.num_codes = tokenizer.quantize.num_codes
        self.token_shape = tokenizer.token_shape
        self._colors = self._code_colors()

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode an image (3, S, S) uint8."""
        device, factor = self.precision.device, self.tokenizer.downsampling_factor
        with self.precision.autocast():
            tokens = self.tokenizer.tokenize(to_float(pixels[None].to(device)))
        decoded = decode_images(self.tokenizer, tokens, self.precision)[0].cpu()
        ids, counts = tokens.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:_SHOWN_CODES]
        alike = ids[order].view(-1, 1, 1).expand(-1, 3, 3).contiguous()
        patches = decode_images(self.tokenizer, alike, self.precision)[..., factor : 2 * factor, factor : 2 * factor]
        shown = zip(ids[order].tolist(), counts[order].tolist(), patches.cpu(), strict=True)
        return Reconstruction(
            image=pixels,
            reconstruction=decoded,
            token_map=self._colors[tokens[0].cpu()].permute(2, 0, 1),
            codes=[UsedCode(*code) for code in shown],
            used=len(ids),
            psnr=image_psnr(decoded, pixels),
        )

    @torch.no_grad()
    def _code_colors(self) -> Tensor:
        """Return colours (N, 3) uint8 of the codes, from their ranks along three principal components."""
        ids = torch.arange(self.num_codes, device=self.precision.device)
        codes = self.tokenizer.quantize.codes_of(ids.view(1, -1, 1))[0, :, :, 0].T.cpu().double()
        centered = codes - codes.mean(0)
        _, axes = torch.linalg.eigh(centered.T @ centered)
        ranks = (centered @ axes.flip(1)[:, :3]).argsort(0).argsort(0) / max(1, self.num_codes - 1)
        if ranks.shape[1] < 3:
            ranks = torch.cat([ranks, ranks.new_full((len(ranks), 3 - ranks.shape[1]), 0.5)], 1)
        return to_uint8(1.7 * ranks - 0.8)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of one request for images."""

    count: int = 4
    """Number of images, 1 to MAX_IMAGES."""
    seed: int = 0
    """Seed of the noise."""
    temperature: float = 1.0
    """Temperature of the choice of a token."""
    guidance: float = 1.0
    """Weight of classifier-free guidance."""
    top_p: float = 1.0
    """Autoregressive: probability of the codes to choose from."""
    steps: int | None = None
    """Diffusion: denoising steps; None: all."""

    @classmethod
    def of(cls, **values: Any) -> "Request":
        """Return a request from untrusted values of a page.

        Raises:
            ValueError: a value is not a number, or out of range.
        """
        count = _number("The number of images", values.pop("count", cls.count), 1, MAX_IMAGES)
        seed = _number("The seed", values.pop("seed", cls.seed), 0, 2**53)  # exact integers in JavaScript
        steps = values.pop("steps", None)
        checked = {name: _number(f"The {name.replace('_', '-')}", value, 0, 100) for name, value in values.items()}
        return cls(
            count=int(count),
            seed=int(seed),
            steps=None if steps is None else int(_number("Steps", steps, 1, 1e6)),
            **checked,
        )


class Painter:
    """A prior with its tokenizer, which samples images.

    Args:
        run: folder of a prior.
        precision: of the networks.

    Attributes:
        condition: kind of condition.
        guided: True if the prior supports guidance.
        class_names: names of the class ids in maps; their numbers if the names are unknown.
        map_side: side in cells of the maps that :meth:`map_of` takes.

    Raises:
        FileNotFoundError, ValueError: as `ImageSampler.from_run`.
    """

    def __init__(self, run: Path, precision: Precision) -> None:
        self.run = run
        self.sampler = ImageSampler.from_run(run, SamplingConfig(), precision)
        self.condition = self.sampler.condition
        self.trained_on = TrainedOn.of(run, self.sampler.entry.config)
        self.guided = self._can_be_guided()
        self.class_names: list[str] = []
        self.map_side = 0
        self.words: frozenset[str] = frozenset()
        if self.condition == "segmentation":
            names, number = self.trained_on.class_names, self.sampler.prior.num_classes
            self.class_names = [names[k] if k < len(names) else f"class {k}" for k in range(number)]
            self.map_side = max(_MAP_SIDE, *self.sampler.prior.condition_shape)
        elif self.condition == "caption":
            self.words = self.trained_on.words()

    def examples(self, count: int) -> list[Any]:
        """Return conditions to start from: maps (map_side, map_side) uint8, or captions; none if unknown."""
        found = self.trained_on.examples(self.condition, self.map_side or self.sampler.tokenizer.image_size, count)
        if self.condition == "caption":
            return list(dict.fromkeys(found))
        shape = (self.map_side, self.map_side)
        return [torch.nn.functional.interpolate(ids[None, None], shape)[0, 0] for ids in found]

    def colors(self) -> list[str]:
        """Return the colours of the classes in maps, as "#rrggbb"."""
        ids = torch.arange(len(self.class_names)).view(-1, 1, 1)
        return ["#" + bytes(color.flatten().tolist()).hex() for color in color_map(ids, (1, 1))]

    def read(self, given: Any) -> Tensor | str:
        """Return an untrusted condition from a page as `sample` takes it.

        Raises:
            ValueError: it is not a condition.
        """
        if self.condition == "segmentation":
            return self.map_of(given)
        if self.condition == "caption":
            return self.caption_of(given)
        return self.label_of(given) if self.condition == "label" else no_conditions(1)

    def map_of(self, text: str) -> Tensor:
        """Read a painted map, (1, map_side, map_side) uint8.

        Args:
            text: two hexadecimal digits a cell, row by row.

        Raises:
            ValueError: another length, other characters, or an unknown class.
        """
        try:
            content = bytes.fromhex(text)
        except (TypeError, ValueError):
            content = b""
        if len(content) != self.map_side**2:
            raise ValueError("The map can't be read: reload the page, and paint it anew.")
        ids = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(self.map_side, self.map_side)
        if int(ids.max()) >= len(self.class_names):
            raise ValueError(f"The map has the class {int(ids.max())}; there are {len(self.class_names)}.")
        return ids[None]

    def caption_of(self, text: Any) -> str:
        """Return a caption on one line.

        Raises:
            ValueError: no text, or too long.
        """
        caption = " ".join(text.encode(errors="replace").decode().split()) if isinstance(text, str) else ""
        if not caption:
            raise ValueError("There is no caption: type one.")
        if len(caption) > MAX_CAPTION:
            raise ValueError(f"The caption has {len(caption)} characters, the limit is {MAX_CAPTION}: shorten it.")
        return caption

    def label_of(self, text: Any) -> str:
        """Return a label of the prior.

        Raises:
            ValueError: not a label of the prior.
        """
        names = self.sampler.prior.label_names
        if text not in names:
            some = ", ".join(map(repr, names[:3]))
            raise ValueError(f"{str(text)[:60]!r} is none of the prior's {len(names)} labels, such as {some}.")
        return str(text)

    def unknown_words(self, caption: str) -> list[str]:
        """Return the words of a caption that are in no training caption, each once; empty if those are unknown."""
        return [word for word in dict.fromkeys(words_of(caption)) if word not in self.words] if self.words else []

    def sample(self, condition: Tensor | str, request: Request, progress: Progress | None = None) -> Tensor:
        """Sample images (count, 3, S, S) uint8 on the CPU under a map (1, H, W), caption, label or no condition (1, 0).

        Raises:
            ValueError: a setting out of range; a caption of too many words; an unknown label.
        """
        kind = self.sampler.entry.sampler
        sampler = kind(self.sampler.prior, self._settings(request))
        sampler.check(self.run)
        conditions: Any = [condition] * request.count
        if isinstance(condition, Tensor):
            conditions = condition.expand(request.count, *condition.shape[1:])
        conditions = sampler.prepare(conditions, "The map" if self.condition == "segmentation" else "text", strict=True)
        return self.sampler.decode(sampler.sample(conditions, progress=progress)).cpu()

    def _settings(self, request: Request) -> Any:
        kind = self.sampler.entry.sampler.settings_type
        values = {name: getattr(request, name) for name in kind.names() if hasattr(request, name)}
        return kind(**values)

    def _can_be_guided(self) -> bool:
        kind = self.sampler.entry.sampler
        try:
            kind(self.sampler.prior, kind.settings_type(guidance=2.0)).check(self.run)
        except ValueError:
            return False
        return True


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:20]!r}.")
    return value
