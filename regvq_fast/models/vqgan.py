"""The VQGAN autoencoder: encoder, any quantizer, decoder.

Architecture, module names and tensor layouts are those of taming-transformers' `VQModel` (Esser, Rombach, Ommer,
"Taming Transformers for High-Resolution Image Synthesis", CVPR 2021), whose checkpoints load with
`VQGAN.load_taming_state_dict`.

Shapes: images (B, 3, H, W); latents, codes (B, D, h, w) and tokens (B, h, w) with h = H / f, w = W / f and the
down-sampling factor f = 2 ** (len(ch_mult) - 1). Values of images lie in [-1, 1]; reconstructions are not clamped.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regvq_fast.models.layers import (
    MAX_GROUPS,
    MIN_GROUP_CHANNELS,
    AttnBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
)
from regvq_fast.models.pretrained import (
    describe_quantizer,
    pretrained_files,
    read_pretrained,
    restore_quantizer,
    write_folder,
)
from regvq_fast.models.weights import check_state_dict

if TYPE_CHECKING:
    from regvq_fast.quantizers import Quantizer, QuantizerOutput


class Level(nn.Module):
    """The blocks of one resolution; each residual block is followed by attention where the level has attention."""

    def __init__(self, widths: Sequence[int], *, attention: bool, dropout: float) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(c_in, c_out, dropout) for c_in, c_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(c_out) for _, c_out in pairs if attention)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None
        self.checkpointing = False
        """Keep the level's input alone for backward, and run the level once more there."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, widths[0], H, W) to (B, widths[-1], H', W'), H' being H halved, doubled or kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._blocks, h, use_reentrant=False)
        return self._blocks(h)

    def _blocks(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to (B, z_channels, h, w); arguments as in `VQGAN`."""

    def __init__(
        self,
        *,
        image_size: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        z_channels: int,
        dropout: float,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, multiple in enumerate(ch_mult):
            widths = [width, *[ch * multiple] * num_res_blocks]
            level = Level(widths, attention=image_size >> i in attn_resolutions, dropout=dropout)
            width = widths[-1]
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, dropout)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, z_channels, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, z_channels, h, w)."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) to images (B, out_channels, H, W); arguments as in `VQGAN`."""

    def __init__(
        self,
        *,
        image_size: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        z_channels: int,
        dropout: float,
        out_channels: int,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, kernel_size=3, padding=1)
        self.mid = Middle(width, dropout)
        levels = []
        for i in reversed(range(len(ch_mult))):
            widths = [width, *[ch * ch_mult[i]] * (num_res_blocks + 1)]
            level = Level(widths, attention=image_size >> i in attn_resolutions, dropout=dropout)
            width = widths[-1]
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # taming numbers the levels by resolution: up.0 is the finest
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) to the input (B, ch * ch_mult[0], H, W) of the last convolution, `conv_out`."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.silu(self.norm_out(h))

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) to (B, out_channels, H, W)."""
        return self.conv_out(self.features(z))


class VQGANOutput(NamedTuple):
    """What one pass through the autoencoder yields."""

    reconstruction: Tensor  # (B, 3, H, W), not clamped
    features: Tensor  # (B, ch * ch_mult[0], H, W), the input of decoder.conv_out, detached
    quantizer: QuantizerOutput


class VQGAN(nn.Module):
    """Convolutional autoencoder around a vector quantizer; the defaults are taming's `custom_vqgan`.

    Args:
        quantizer: module with `code_dim`, `num_codes`, `embedding` (N, D), `forward(z (B, D, h, w)) ->
            QuantizerOutput` and `lookup(indices (B, h, w)) -> (B, D, h, w)`. Kept as `self.quantize`.
        image_size: side of the images, in pixels; a multiple of 2 ** (len(ch_mult) - 1). It decides which levels
            have attention; images of another size that is such a multiple are processed all the same.
        ch: base width. GroupNorm takes 32 groups, fewer where they would have under 4 channels each.
        ch_mult: width of each level as a multiple of `ch`, from full resolution downwards.
        num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
        attn_resolutions: resolutions, in pixels of an `image_size` image, at which residual blocks are followed by
            attention. Resolutions that no level has are ignored, as in taming.
        z_channels: width of the latents outside the quantizer's 1x1 convolutions.
        dropout: probability, in [0, 1), inside residual blocks.
        in_channels: channels of the images.

    Raises:
        ValueError: a size that is not positive, a dropout outside [0, 1), an `image_size` that is not a multiple of
            the down-sampling factor.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        image_size: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        z_channels: int = 256,
        dropout: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "ch": ch, "num_res_blocks": num_res_blocks, "z_channels": z_channels}
        for name, size in (sizes | {"in_channels": in_channels}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not ch_mult or min(ch_mult) < 1:
            raise ValueError(f"ch_mult must name at least one level, each at least 1, got {tuple(ch_mult)}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.image_size = image_size
        self.in_channels = in_channels
        self.downsampling_factor = 2 ** (len(ch_mult) - 1)
        self._check_multiple("image_size", image_size)

        shared: dict[str, Any] = {
            "image_size": image_size,
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": attn_resolutions,
            "z_channels": z_channels,
            "dropout": dropout,
        }
        self._arguments = {**shared, "in_channels": in_channels}
        self.encoder = Encoder(**shared, in_channels=in_channels)
        self.decoder = Decoder(**shared, out_channels=in_channels)
        self.quantize = quantizer
        self.quant_conv = nn.Conv2d(z_channels, quantizer.code_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(quantizer.code_dim, z_channels, kernel_size=1)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(h, w) of the tokens of an `image_size` image."""
        side = self.image_size // self.downsampling_factor
        return side, side

    @property
    def last_layer(self) -> Tensor:
        """Weight (in_channels, ch * ch_mult[0], 3, 3) of the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] to latents (B, D, h, w), not yet quantized.

        Raises:
            ValueError: not four dimensions, another number of channels, or a side that is not a multiple of
                `downsampling_factor`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        self._check_multiple("image height", images.shape[2])
        self._check_multiple("image width", images.shape[3])
        return self.quant_conv(self.encoder(images))

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized latents (B, D, h, w) to images (B, in_channels, H, W), not clamped."""
        return self.decoder.conv_out(self.decoder_features(quantized))

    def decoder_features(self, quantized: Tensor) -> Tensor:
        """Quantized latents (B, D, h, w) to the input (B, ch * ch_mult[0], H, W) of `decoder.conv_out`.

        With it the gradient of the last layer's weight, which the adaptive weight of the adversarial loss needs,
        follows from a gradient at the reconstruction alone, without a walk through the decoder.
        """
        return self.decoder.features(self.post_quant_conv(quantized))

    def forward(self, images: Tensor, *quantizer_args: Any) -> VQGANOutput:
        """Images (B, in_channels, H, W) in [-1, 1] to their reconstruction; raises as `encode`.

        Further arguments (seed, row_offset) go to the quantizer.
        """
        quantizer = self.quantize(self.encode(images), *quantizer_args)
        features = self.decoder_features(quantizer.quantized)
        # Detached: a compiled backward would carry a gradient of zeros for it otherwise, as large as the map.
        return VQGANOutput(self.decoder.conv_out(features), features.detach(), quantizer)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trade time for memory: each level of encoder and decoder runs a second time in backward, keeping its input.

        Gradients stay what they are.
        """
        for module in self.modules():
            if isinstance(module, Level):
                module.checkpointing = enabled

    @torch.no_grad()
    def standardize_latents(self, images: Tensor) -> None:
        """Rescale `quant_conv` so that the latents of these images have mean 0 and variance 1 in every channel.

        A data-dependent initialisation (Salimans and Kingma, 2016) for quantizers whose logits count on it; a fresh
        encoder's latents are many times smaller, and Gumbel noise would drown their logits.

        Raises:
            ValueError: a single position in all; otherwise as `encode`.
        """
        latents = self.encode(images).float()
        if latents[:, 0].numel() < 2:
            raise ValueError(f"one latent has no variance: give more or larger images than {tuple(images.shape)}")
        std, mean = torch.std_mean(latents, dim=(0, 2, 3))
        std = std.clamp(min=1e-6)
        self.quant_conv.weight.div_(std.view(-1, 1, 1, 1))
        self.quant_conv.bias.sub_(mean).div_(std)  # type: ignore[union-attr]

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] to tokens (B, h, w) int64.

        No noise, mask or dropout, whatever mode the model is in. Raises as `encode`.
        """
        with _evaluating(self):
            return self.quantize(self.encode(images)).indices

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Tokens (B, h, w) int64 in [0, num_codes) to images (B, in_channels, H, W), without dropout.

        Raises:
            ValueError: not three dimensions.
            TypeError: not int64.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}")
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64, got {indices.dtype}")
        with _evaluating(self):
            return self.decode(self.quantize.lookup(indices))

    def architecture(self) -> dict[str, Any]:
        """What the model was built with, as plain values: its arguments, and under "quantizer" those of the quantizer.

        Raises:
            ValueError: the quantizer is not one of this library's.
        """
        return {**self._arguments, "quantizer": describe_quantizer(self.quantize)}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the weights, and the architecture they need, to a folder that `from_pretrained` reads.

        It appears complete or not at all; one of the same name that this wrote earlier is replaced.

        Raises:
            ValueError: `folder` is something else, or the quantizer is not one of this library's.
            OSError: the folder can't be written.
        """
        write_folder(Path(folder), pretrained_files(self.architecture(), self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> VQGAN:
        """The model in a folder: one of `save_pretrained`, a checkpoint of a run, or a run.

        Of a run it is the final model, or that of the newest checkpoint where the run has not come to its end. Files
        that have checksums are compared with them, and nothing is unpickled.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder, or no weights in it.
            ValueError: a file is truncated, damaged or foreign; the message names it.
        """
        arguments, weights = read_pretrained(Path(folder))
        try:
            model = cls(restore_quantizer(arguments.pop("quantizer", {})), **arguments)
        except TypeError as error:
            raise ValueError(f"the architecture in {folder} doesn't fit this version: {error}") from None
        check_state_dict(weights, {name: value.shape for name, value in model.state_dict().items()}, "this VQGAN")
        model.load_state_dict(weights)
        return model.eval()

    def load_taming_state_dict(self, state_dict: Mapping, strict: bool = True) -> None:
        """Load a taming-transformers `VQModel` checkpoint: its state dict, or a dict that has it as "state_dict".

        The keys of the training losses (`loss.*`) are ignored. Buffers of the quantizer (statistics of training, which
        taming does not have) are not asked for.

        Args:
            state_dict: names to tensors.
            strict: names that are missing or unexpected are an error; otherwise what fits by name is loaded.

        Raises:
            ValueError: with all missing and unexpected names and wrong shapes; nothing has been loaded then.
        """
        nested = state_dict.get("state_dict", state_dict)
        given = {name: tensor for name, tensor in nested.items() if not name.startswith("loss.")}
        optional = {f"quantize.{name}" for name, _ in self.quantize.named_buffers()} - given.keys()
        expected = {name: tensor.shape for name, tensor in self.state_dict().items() if name not in optional}
        if not strict:
            given = {name: tensor for name, tensor in given.items() if name in expected}
            expected = {name: shape for name, shape in expected.items() if name in given}
        check_state_dict(given, expected, "this VQGAN")
        if any(norm.num_groups != MAX_GROUPS for norm in self.modules() if isinstance(norm, nn.GroupNorm)):
            warnings.warn(
                f"this VQGAN has fewer than taming's {MAX_GROUPS} groups in a GroupNorm, since its width is below "
                f"{MAX_GROUPS * MIN_GROUP_CHANNELS}: the weights fit but compute something else",
                stacklevel=2,
            )
        self.load_state_dict(given, strict=False)

    def _check_multiple(self, name: str, size: int) -> None:
        if size < 1 or size % self.downsampling_factor:
            raise ValueError(f"{name} {size} is not a multiple of the down-sampling factor {self.downsampling_factor}")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is back in its own mode."""
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
