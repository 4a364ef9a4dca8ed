"""Checkpoints of taming-transformers (Esser, Rombach, Ommer, CVPR 2021): its `VQModel` and its `GumbelVQ`.

The architecture follows from the shapes of the tensors, except for the size of the images, which is in taming's yaml:
beside the file, or in `configs/` of its run.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regvq_fast.models.weights import (
    LoadedWeights,
    check_state_dict,
    nested_state_dict,
    read_state_dict,
    strip_prefix,
)

NORM_GROUPS = 32
"""Groups of each GroupNorm in taming's models, at any width."""
DEFAULT_IMAGE_SIZE = 256
_ENDS = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight")
# Losses, averages of the weights, a buffer of segmentation models, and lists of the codes in use.
_LEFT_OUT = re.compile(r"(loss|model_ema)\.|colorize$|quantize\.used$|quantize\.embedding\.(cluster_size|embed_avg)$")
_DISCRIMINATOR = "loss.discriminator."


class TamingCheckpoint(NamedTuple):
    """Contents of a checkpoint of taming's."""

    path: Path
    """The file."""
    kind: str
    """Taming's class, "VQModel" or "GumbelVQ"."""
    architecture: dict[str, Any]
    """The result of `VQGAN.architecture`, without "type"."""
    state_dict: dict[str, Tensor]
    """Tensors by taming's names, without the prefix."""
    prefix: str
    """Prefix stripped from the names."""
    outside: tuple[str, ...]
    """Names in the file without the prefix."""
    config: Path | None
    """The yaml with the size of the images, if any."""


def read_taming(path: Path, config: Path | None = None, image_size: int | None = None) -> TamingCheckpoint:
    """Read a checkpoint of a `VQModel` or a `GumbelVQ`, or of a model with one as its first stage.

    Args:
        path: .ckpt of Lightning, .pth, .pt or .safetensors.
        config: its yaml, which must fit. None: a fitting one near the file, if PyYAML is installed.
        image_size: side of the images in pixels. None: the yaml's, or 256 without one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, another kind of model, or a yaml of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    state = read_state_dict(path)
    try:
        given, prefix, outside = strip_prefix(state, _ENDS, "a VQGAN of taming-transformers")
        architecture, levels = _architecture({name: value.shape for name, value in given.items()})
    except (ValueError, ArithmeticError, LookupError) as error:  # tensors without the dimensions or values of taming's
        raise ValueError(f"{path}: {error}") from None
    found = None
    for source, described in _descriptions(path, config):
        if _agrees(described, architecture, levels):
            found = source
            image_size = image_size or int(described["resolution"])
            architecture["dropout"] = float(described.get("dropout", 0.0))
            break
    if config is not None and found is None:
        raise ValueError(f"{config} describes another model than the tensors in {path}: give its own yaml, or none")
    architecture["image_size"] = size = image_size or DEFAULT_IMAGE_SIZE
    architecture["attn_resolutions"] = [size >> level for level in levels]
    kind = "GumbelVQ" if "quantize.embed.weight" in given else "VQModel"
    return TamingCheckpoint(path, kind, architecture, given, prefix, outside, found)


def fitting(
    state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size], optional: set[str], *, strict: bool = True
) -> tuple[dict[str, Tensor], LoadedWeights]:
    """Return the tensors of a taming checkpoint that a VQGAN takes, by the VQGAN's names.

    Args:
        state_dict: names to tensors, or a dict with such a dict as "state_dict".
        shapes: shapes of the VQGAN's tensors by name.
        optional: names that may be missing.
        strict: refuse missing and unexpected names.

    Raises:
        ValueError: no name fits; missing and unexpected names, unless not `strict`; wrong shapes.
    """
    names, prefix, outside = strip_prefix(nested_state_dict(state_dict), shapes.keys(), "this VQGAN")
    given = {}
    for name, value in names.items():
        name = name.replace("quantize.embed.", "quantize.embedding.")
        given[name] = value.flatten(1) if name == "quantize.proj.weight" and value.ndim == 4 else value
    left_out = [name for name in given if name not in shapes and (not strict or _LEFT_OUT.match(name))]
    given = {name: value for name, value in given.items() if name in shapes or name not in left_out}
    needed = given.keys() if not strict else shapes.keys() - (optional - given.keys())
    check_state_dict(given, {name: shape for name, shape in shapes.items() if name in needed}, "this VQGAN")
    return given, LoadedWeights(len(given), (*left_out, *outside), prefix)


def discriminator_in(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the arguments and weights of the `PatchDiscriminator` in a checkpoint's losses, by its names.

    None if there is none, or one of another kind, such as with ActNorm.
    """
    weights = {
        name.removeprefix(_DISCRIMINATOR): value
        for name, value in state_dict.items()
        if name.startswith(_DISCRIMINATOR)
    }
    convolutions = [value for name, value in weights.items() if name.endswith(".weight") and value.ndim == 4]
    if len(convolutions) < 3 or "main.3.running_mean" not in weights:
        return None
    first = convolutions[0]
    sizes = {"in_channels": first.shape[1], "filters": first.shape[0], "num_layers": len(convolutions) - 2}
    return sizes, weights


def _architecture(shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Any], list[int]]:
    """Return the architecture and the levels with attention, finest first."""

    def shape(name: str) -> torch.Size:
        if name not in shapes:
            raise ValueError(f"it is not a VQGAN of taming-transformers, which has {name}")
        return shapes[name]

    def count(pattern: str) -> int:
        return len({match[0] for name in shapes if (match := re.match(pattern, name))})

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(count(r"encoder\.down\.\d+\.block"))]
    out_channels = shape("decoder.conv_out.weight")[0]
    if any(width % ch for width in widths):
        raise ValueError(f"the widths of its levels, {widths}, are not multiples of its base width, {ch}")
    if in_channels != out_channels:
        raise ValueError(f"it takes images of {in_channels} channels and gives {out_channels}: they must be equal")
    gumbel = "quantize.embed.weight" in shapes
    codebook = shapes.get("quantize.embed.weight" if gumbel else "quantize.embedding.weight")
    if codebook is None:
        raise ValueError("it has no codebook (quantize.embedding.weight), so it is not a tokenizer")
    num_codes, code_dim = codebook
    architecture = {
        "image_size": DEFAULT_IMAGE_SIZE,
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": count(r"encoder\.down\.0\.block\.\d+"),
        "attn_resolutions": [],
        "z_channels": shape("encoder.conv_out.weight")[0],
        "dropout": 0.0,
        "norm_groups": NORM_GROUPS,
        "in_channels": in_channels,
        "quantizer": {
            "type": "GumbelQuantizer" if gumbel else "NearestQuantizer",
            "num_codes": num_codes,
            "code_dim": code_dim,
        },
    }
    return architecture, [i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in shapes]


def _agrees(described: Mapping[str, Any], architecture: Mapping[str, Any], levels: list[int]) -> bool:
    """Return whether a `ddconfig` describes the model of the tensors."""
    names = ("ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels")
    try:
        resolution, attention = int(described["resolution"]), list(described["attn_resolutions"])
        float(described.get("dropout", 0.0))
        same = all(described[name] == architecture[name] for name in names)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    attended = [i for i in range(len(architecture["ch_mult"])) if resolution >> i in attention]
    return same and resolution > 0 and levels == attended


def _descriptions(path: Path, config: Path | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield each `ddconfig` of the given yaml, or of the yamls near the file, the likeliest first."""
    try:
        import yaml
    except ModuleNotFoundError:
        if config is not None:
            raise ValueError(f"reading {config} needs PyYAML: pip install pyyaml, or give image_size instead") from None
        return
    folders = (path.parent, path.parent / "configs", path.parent.parent / "configs")
    near = [path.with_suffix(".yaml"), *(file for folder in folders for file in sorted(folder.glob("*.yaml")))]
    for file in [config] if config is not None else dict.fromkeys(near):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            if config is not None:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"can't read {config} as a yaml of taming-transformers: {reason}") from None
            continue
        for described in _ddconfigs(content):
            yield file, described


def _ddconfigs(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping named `ddconfig` at any depth: a transformer's yaml has it in its first stage."""
    pending, seen = [content], set[int]()
    while pending:
        content = pending.pop()
        if isinstance(content, Mapping) and id(content) not in seen:  # a yaml may have aliases, even of itself
            seen.add(id(content))
            pending += reversed(list(content.values()))
            if isinstance(found := content.get("ddconfig"), Mapping):
                yield found
