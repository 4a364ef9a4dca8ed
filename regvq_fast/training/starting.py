"""Start of a tokenizer's run from weights: of a run, a folder, a hub id, or a file of taming-transformers.

read_weights    reads what --init-from names
begin           gives the configuration the architecture of the weights; contradicting flags are errors
start_model     copies encoder, decoder and codebook into a new model, whose quantizer may be of another kind
freeze          excludes parts from training
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.config import VQGANConfig, override, read_config
from regvq_fast.models.model import evaluating
from regvq_fast.models.pretrained import CONFIG, WEIGHTS, read_folder, step_folders
from regvq_fast.models.taming_weights import discriminator_in, read_taming
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.quantizers import QUANTIZERS, Quantizer
from regvq_fast.settings import flag_of
from regvq_fast.training.checkpoint import TRAINING, training_state

_DISC_FIELDS = ("disc_filters", "disc_layers", "disc_norm")


class Discriminator(NamedTuple):
    """Weights of a trained discriminator."""

    settings: dict[str, Any]
    """Fields of `ModelConfig`."""
    state_dict: dict[str, Tensor]


class StartingWeights(NamedTuple):
    """Weights that a run starts from, on the CPU."""

    model: VQGAN
    discriminator: Discriminator | None
    report: str
    """Kind of the weights, and the number of tensors loaded."""


def read_weights(source: str) -> StartingWeights:
    """Read the weights that ``--init-from`` names.

    Raises:
        OSError, ValueError: there are no weights, or they can't be used; the message is one sentence.
    """
    path = Path(source).expanduser()
    if path.is_file() and not (path.name == WEIGHTS and path.with_name(CONFIG).is_file()):
        checkpoint = read_taming(path)
        model, loaded = VQGAN.from_taming_checkpoint(checkpoint)
        found, discriminator = discriminator_in(checkpoint.state_dict), None
        if found is not None and found[0]["in_channels"] == 3:
            sizes, weights = found
            settings = {"disc_filters": sizes["filters"], "disc_layers": sizes["num_layers"], "disc_norm": "batch"}
            discriminator = Discriminator(settings, weights)
        return StartingWeights(model, discriminator, f"{checkpoint.kind} of taming-transformers, {loaded}")
    folder = path.parent if path.is_file() else path
    model = VQGAN.from_pretrained(folder if folder.exists() else source)  # which may be a hub id
    if model.in_channels != 3:
        raise ValueError(
            f"the weights of {source} take images of {model.in_channels} channels, but runs have 3: give others"
        )
    return StartingWeights(model, _discriminator_of(folder), f"{len(model.state_dict())} tensors loaded")


def _discriminator_of(folder: Path) -> Discriminator | None:
    """Return the discriminator of a checkpoint, or of a run's newest one; None if it has not been trained."""
    checkpoint = [folder, *step_folders(folder).values()][-1]
    if not (checkpoint / TRAINING).is_file():
        return None
    config = read_config(checkpoint, VQGANConfig)
    state = training_state(read_folder(checkpoint, (TRAINING,))[TRAINING], checkpoint / TRAINING)
    if config.loss.disc_start is None or state["step"] <= config.loss.disc_start:
        return None
    return Discriminator({name: getattr(config.model, name) for name in _DISC_FIELDS}, state["others"][0])


def begin(
    config: VQGANConfig, source: str, quantizer: str | None
) -> tuple[VQGANConfig, Callable[[VQGANConfig], VQGANConfig]]:
    """Return the defaults of a run that starts from weights, and a function that completes the parsed settings.

    The function raises ValueError if they contradict the weights. Images may have another size than those of the
    weights: attention stays at the same levels.
    """
    weights = read_weights(source)
    path = Path(source).expanduser()
    described = weights.model.architecture()
    theirs = next(name for name, kind in QUANTIZERS.items() if type(weights.model.quantize) is kind)
    chosen = quantizer or theirs
    if chosen == theirs:
        own = asdict(weights.model.quantize.settings)
    else:  # reg-vq keeps the given codes with distance logits
        own = {"logits": "distance"} if chosen == "reg-vq" else {}
    defaults = override(
        config,
        init_from=str(path.resolve()) if path.exists() else source,
        image_size=described["image_size"],
        dropout=described["dropout"],
        attn_resolutions=tuple(described["attn_resolutions"]),
        **_fixed(weights.model),
        quantizer=chosen,
        **own,
        **(weights.discriminator.settings if weights.discriminator else {}),
    )

    def complete(given: VQGANConfig) -> VQGANConfig:
        levels = _attention(weights.model)
        given = override(given, init_from=defaults.model.init_from)
        if given.model.attn_resolutions == defaults.model.attn_resolutions:
            given = override(given, attn_resolutions=tuple(given.data.image_size >> level for level in levels))
        check_architecture(given, weights.model)
        return given

    return defaults, complete


def _fixed(model: VQGAN) -> dict[str, Any]:
    """Return the settings that the weights determine, by field."""
    described = model.architecture()
    found = {name: described[name] for name in ("ch", "num_res_blocks", "z_channels", "norm_groups")}
    sizes = {"num_codes": model.quantize.num_codes, "code_dim": model.quantize.code_dim}
    return {**found, "ch_mult": tuple(described["ch_mult"]), **sizes}


def _attention(model: VQGAN) -> list[int]:
    """Return the indices of the levels with attention, finest first."""
    described = model.architecture()
    sizes = [described["image_size"] >> level for level in range(len(described["ch_mult"]))]
    return [level for level, size in enumerate(sizes) if size in described["attn_resolutions"]]


def check_architecture(config: VQGANConfig, model: VQGAN) -> None:
    """Raise ValueError if the run's architecture is not that of its starting weights."""
    source, quantizer = config.model.init_from, config.quantizer
    kind = QUANTIZERS[quantizer.quantizer]
    if kind.adopt is Quantizer.adopt and (config.model.reset_codebook or type(model.quantize) is not kind):
        raise ValueError(
            f"--quantizer {quantizer.quantizer} has fixed codes and can't start from the codebook of {source}: leave "
            "out --quantizer and --reset-codebook"
        )
    sizes = quantizer.num_codes, quantizer.code_dim
    known = model.quantize.num_codes, model.quantize.code_dim
    if kind.adopt is Quantizer.adopt and sizes != known:
        raise ValueError(
            f"--quantizer {quantizer.quantizer} has {sizes[0]} codes of {sizes[1]} channels with these settings, the "
            f"weights of {source} have {known[0]} of {known[1]}: leave its settings out"
        )
    for name, theirs in _fixed(model).items():
        section = config.model if hasattr(config.model, name) else config.quantizer
        value, flag = getattr(section, name), flag_of(type(section), name)
        if value == theirs or (name == "num_codes" and config.model.reset_codebook):
            continue
        hint = ", or add --reset-codebook" if name == "num_codes" else ""
        raise ValueError(
            f"{flag} {_spelled(value)} contradicts the weights of {source}, which have {_spelled(theirs)}: "
            f"leave it out{hint}"
        )
    size, levels = config.data.image_size, _attention(model)
    if [
        level for level in range(len(config.model.ch_mult)) if size >> level in config.model.attn_resolutions
    ] != levels:
        theirs = _spelled(tuple(size >> level for level in levels)) or "none"
        raise ValueError(
            f"--attn-resolutions {_spelled(config.model.attn_resolutions)} contradicts the weights of {source}, which "
            f"have {theirs} for images of {size} px: leave it out"
        )


def _spelled(value: Any) -> str:
    """Return a value as it is typed after its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@torch.no_grad()
def start_model(
    model: VQGAN, source: VQGAN, images: Tensor, *, reset_codebook: bool = False, micro_batch: int = 16
) -> str:
    """Copy the encoder, decoder and codebook of a trained model into a new one.

    A quantizer of the same kind is copied. A quantizer of another kind adopts the codes, and its scales are fitted to
    latents of the images. If either quantizer rescales latents or codes, the 1x1 convolutions beside it absorb that, so
    that reconstructions stay the same.

    Args:
        model: of the same architecture as `source`, apart from the quantizer and the size of the images.
        source: the trained model, on the same device.
        images: (B, 3, H, W) in [-1, 1].
        reset_codebook: fit a new codebook to latents of the images.
        micro_batch: images per forward pass.

    Returns:
        A report: what happened to the codebook, and the PSNR of the reconstructions before and after.

    Raises:
        ValueError: `source` does not select codes by distance, and `model` does.
    """
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        getattr(model, name).load_state_dict(getattr(source, name).state_dict())
    old, new, form = source.quantize, model.quantize, source.quantize.nearest_codes()
    chunks = images.split(micro_batch)
    if reset_codebook or not _selects_alike(old, new):
        if form is not None:  # the latents become (z - shift) * gain
            _then_scale(model.quant_conv, form.gain, -form.shift * form.gain)
        elif not reset_codebook:
            name = next(name for name, kind in QUANTIZERS.items() if type(old) is kind)
            raise ValueError(
                f"{name} of the weights does not select codes by distance: use --quantizer {name} with the logits or "
                "levels that it has, or --reset-codebook"
            )
        with evaluating(model):
            z = torch.cat([model.encode(chunk) for chunk in chunks])
        known = None if form is None else form.codes
        codes = _fitted_codes(z, new.num_codes, known) if reset_codebook or known is None else known
        mapped = new.adopt(codes, z)
        if mapped is not None:
            _first_scale(model.post_quant_conv, *mapped)
        done = "fitted to latents" if reset_codebook else f"of {type(old).__name__} taken over"
    else:
        new.load_state_dict(old.state_dict())
        done = "taken"
    before, after = _psnr(source, chunks), _psnr(model, chunks)
    return f"{new.num_codes} codes {done}; {after:.1f} dB on {len(images)} training images, {before:.1f} dB before"


def _then_scale(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Change a 1x1 convolution so that it returns ``scale * output + shift``, by channel."""
    assert convolution.bias is not None
    convolution.weight.mul_(scale.view(-1, 1, 1, 1))
    convolution.bias.mul_(scale).add_(shift)


def _first_scale(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Change a 1x1 convolution so that it reads ``scale * input + shift``, by channel."""
    assert convolution.bias is not None
    convolution.bias.add_(convolution.weight.flatten(1) @ shift)
    convolution.weight.mul_(scale.view(1, -1, 1, 1))


def _selects_alike(old: Quantizer, new: Quantizer) -> bool:
    """Return whether a quantizer can load another one's state dict."""
    kinds = [[getattr(quantizer.settings, name, None) for name in ("logits", "levels")] for quantizer in (old, new)]
    return type(old) is type(new) and kinds[0] == kinds[1] and old.num_codes == new.num_codes


def _psnr(model: VQGAN, chunks: Sequence[Tensor]) -> float:
    """Return the PSNR in dB over all pixels, with the best codes."""
    with evaluating(model):
        errors = [(model(chunk).reconstruction.float().clamp(-1, 1) - chunk).square().sum() for chunk in chunks]
    pixels = sum(chunk.numel() for chunk in chunks)
    return 10 * math.log10(4 * pixels / max(float(sum(errors)), 1e-12))


def _fitted_codes(z: Tensor, count: int, known: Tensor | None) -> Tensor:
    """Return codes (N, D) from latents (B, D, H, W).

    Args:
        z: the latents.
        count: N.
        known: codes (N', D) that the decoder was trained with. If they all have one norm, the new ones get it, too.
    """
    rows = z.permute(0, 2, 3, 1).flatten(0, 2).float()
    if known is not None:
        lengths = known.norm(dim=1)
        if lengths.std() < 1e-3 * lengths.mean():
            rows = F.normalize(rows, dim=1) * lengths.mean()
    order = torch.randperm(len(rows)).repeat(-(-count // len(rows)))[:count].to(rows.device)
    return rows[order]


def freeze(model: VQGAN, parts: Sequence[str]) -> list[nn.Module]:
    """Freeze parts of a model.

    Args:
        model: the autoencoder.
        parts: "encoder" with quant_conv, "decoder" with post_quant_conv, "codebook" with the weights that select codes.

    Returns:
        Modules to keep in evaluation mode, without dropout.

    Raises:
        ValueError: no parameter with a gradient is left.
    """
    frozen: list[nn.Module] = []
    if "encoder" in parts:
        frozen += [model.encoder, model.quant_conv]
    if "decoder" in parts:
        frozen += [model.decoder, model.post_quant_conv]
    for module in frozen:
        module.requires_grad_(False)
    if "codebook" in parts:
        model.quantize.freeze()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' '.join(parts)} leaves no parameter to train: leave out one part")
    return frozen
