"""The VQGAN autoencoder: encoder, any quantizer, decoder.

Architecture, module names and tensor layouts are those of taming-transformers' `VQModel` (Esser, Rombach, Ommer,
"Taming Transformers for High-Resolution Image Synthesis", CVPR 2021), whose checkpoints load with
`VQGAN.from_taming`.

Shapes: images (B, in_channels, H, W); latents, codes (B, D, h, w) and tokens (B, h, w) with h = H / f, w = W / f and
the down-sampling factor f = 2 ** (len(ch_mult) - 1). Values of images lie in [-1, 1]; reconstructions aren't clamped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.layers import Downsample, Level, Middle, Upsample, group_norm
from regvq_fast.models.model import Model, evaluating
from regvq_fast.models.pretrained import describe_quantizer, restore_quantizer
from regvq_fast.models.taming_weights import NORM_GROUPS, TamingCheckpoint, fitting, read_taming
from regvq_fast.models.transformer import flat_ids
from regvq_fast.models.weights import LoadedWeights
from regvq_fast.quantizers import Quantizer, QuantizerOutput

_LARGEST_PIXEL = 10.0  # images in [0, 255] are taken for what they are, normal noise passes


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
        norm_groups: int | None,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, multiple in enumerate(ch_mult):
            widths = [width, *[ch * multiple] * num_res_blocks]
            attention = image_size >> i in attn_resolutions
            level = Level(widths, attention=attention, dropout=dropout, norm_groups=norm_groups)
            width = widths[-1]
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, dropout, norm_groups)
        self.norm_out = group_norm(width, norm_groups)
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
        norm_groups: int | None,
        out_channels: int,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, kernel_size=3, padding=1)
        self.mid = Middle(width, dropout, norm_groups)
        levels = []
        for i in reversed(range(len(ch_mult))):
            widths = [width, *[ch * ch_mult[i]] * (num_res_blocks + 1)]
            attention = image_size >> i in attn_resolutions
            level = Level(widths, attention=attention, dropout=dropout, norm_groups=norm_groups)
            width = widths[-1]
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # taming numbers the levels by resolution: up.0 is the finest
        self.norm_out = group_norm(width, norm_groups)
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
    """Output of one pass through the autoencoder."""

    reconstruction: Tensor
    """(B, in_channels, H, W), not clamped."""
    features: Tensor
    """(B, ch * ch_mult[0], H, W), the input of decoder.conv_out, detached."""
    quantizer: QuantizerOutput
    """Output of the quantizer."""


class VQGAN(Model):
    """Convolutional autoencoder around a vector quantizer; the defaults are taming's `custom_vqgan`.

    Args:
        quantizer: module with `code_dim`, `num_codes`, `forward(z (B, D, h, w)) -> QuantizerOutput` and
            `codes_of(indices (B, h, w)) -> (B, D, h, w)`. Kept as `self.quantize`.
        image_size: side of the images, in pixels; a multiple of 2 ** (len(ch_mult) - 1). It decides which levels
            have attention; images of another size that is such a multiple are processed all the same.
        ch: base width.
        ch_mult: width of each level as a multiple of `ch`, from full resolution downwards.
        num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
        attn_resolutions: resolutions, in pixels of an `image_size` image, at which residual blocks are followed by
            attention. Resolutions that no level has are ignored, as in taming.
        z_channels: width of the latents outside the quantizer's 1x1 convolutions.
        dropout: probability, in [0, 1), inside residual blocks.
        norm_groups: groups of each GroupNorm, 32 in taming's models. None: 32, or fewer where they would have under 4
            channels each.
        in_channels: channels of the images.

    Raises:
        ValueError: a size that is not positive, a dropout outside [0, 1), an `image_size` that is not a multiple of
            the down-sampling factor, `norm_groups` that do not divide a width.
    """

    title = "Image tokenizer"
    example = """images = torch.rand(1, {in_channels}, {image_size}, {image_size}) * 2 - 1  # yours, in [-1, 1]
tokens = model.tokenize(images)  # (B, h, w) int64
reconstructions = model.decode_indices(tokens)
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
        norm_groups: int | None = None,
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
        if norm_groups is not None and (norm_groups < 1 or any(ch * m % norm_groups for m in (1, *ch_mult))):
            widths = sorted({ch * multiple for multiple in (1, *ch_mult)})
            raise ValueError(f"norm_groups {norm_groups} does not divide the widths {', '.join(map(str, widths))}")
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
            "norm_groups": norm_groups,
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

        Images are computed in the type of the weights, or in autocast's.

        Raises:
            TypeError: images that are not floating point.
            ValueError: not four dimensions, another number of channels, or a side that is not a multiple of
                `downsampling_factor`.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point in [-1, 1], got {images.dtype}: divide by 127.5, subtract 1"
            )
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        self._check_multiple("image height", images.shape[2])
        self._check_multiple("image width", images.shape[3])
        return self.quant_conv(self.encoder(self._as_convolved(images)))

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized latents (B, D, h, w) to images (B, in_channels, H, W), not clamped.

        Raises:
            TypeError: latents that are not floating point, such as tokens.
            ValueError: another shape.
        """
        return self.decoder.conv_out(self.decoder_features(quantized))

    def decoder_features(self, quantized: Tensor) -> Tensor:
        """Quantized latents (B, D, h, w) to the input (B, ch * ch_mult[0], H, W) of `decoder.conv_out`.

        With it the gradient of the last layer's weight, which the adaptive weight of the adversarial loss needs,
        follows from a gradient at the reconstruction alone, without a walk through the decoder. Raises as `decode`.
        """
        if not quantized.is_floating_point():
            raise TypeError(f"latents must be floating point, got {quantized.dtype}: give tokens to decode_indices")
        if quantized.ndim != 4 or quantized.shape[1] != self.quantize.code_dim:
            raise ValueError(f"latents must be (B, {self.quantize.code_dim}, h, w), got {tuple(quantized.shape)}")
        return self.decoder.features(self.post_quant_conv(self._as_convolved(quantized)))

    def _as_convolved(self, value: Tensor) -> Tensor:
        """Cast to the type that convolutions compute in: autocast's, or that of the weights."""
        kind = value.device.type
        autocast = torch.is_autocast_enabled(kind)
        return value.to(torch.get_autocast_dtype(kind) if autocast else self.last_layer.dtype)

    def forward(self, images: Tensor, *quantizer_args: Any) -> VQGANOutput:
        """Images (B, in_channels, H, W) in [-1, 1] to their reconstruction; raises as `encode`.

        Further arguments (seed, row_offset) go to the quantizer.
        """
        quantizer = self.quantize(self.encode(images), *quantizer_args)
        # Autocast's GroupNorm is fp32 on a GPU: cast once here, the features leave a compiled graph at half the size.
        features = self._as_convolved(self.decoder_features(quantizer.quantized))
        # Detached: a compiled backward would carry a gradient of zeros for it otherwise, as large as the map.
        return VQGANOutput(self.decoder.conv_out(features), features.detach(), quantizer)

    @torch.no_grad()
    def initialize_quantizer(self, images: Tensor) -> None:
        """Fit the quantizer of a new model to the model's latents of these images, where it needs such a start.

        Raises:
            ValueError: a single position in all; otherwise as `encode`.
        """
        self.quantize.initialize(self.encode(images))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] to tokens (B, h, w) int64.

        No noise, mask or dropout, whatever mode the model is in. Raises as `encode`, and ValueError for values far
        outside [-1, 1], which a CPU looks for.
        """
        looks = images.device.type == "cpu" and images.is_floating_point() and not torch.compiler.is_compiling()
        if looks and images.numel():
            largest = images.abs().max().item()
            if largest > _LARGEST_PIXEL:
                raise ValueError(
                    f"images must lie in [-1, 1], got values up to {largest:g}: divide by 127.5, subtract 1"
                )
        with evaluating(self):
            return self.quantize(self.encode(images)).indices

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Tokens (B, h, w) int64 in [0, num_codes) to images (B, in_channels, H, W), without dropout.

        Raises:
            ValueError: not three dimensions; on a CPU, tokens that name no code.
            TypeError: not int64.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}")
        flat_ids("indices", indices, (indices.shape[1], indices.shape[2]), self.quantize.num_codes)
        with evaluating(self):
            return self.decode(self.quantize.codes_of(indices))

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, and under "quantizer" those of the quantizer.

        Raises:
            ValueError: the quantizer's class is not in `regvq_fast.quantizers.QUANTIZERS`.
        """
        return {**super().architecture(), "quantizer": describe_quantizer(self.quantize)}

    @classmethod
    def _build(cls, quantizer: Mapping[str, Any] | None = None, **arguments: Any) -> Self:
        return cls(restore_quantizer(quantizer or {}), **arguments)

    @classmethod
    def from_taming(
        cls,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        image_size: int | None = None,
    ) -> Self:
        """Build the model in a file of taming-transformers: a `VQModel`, a `GumbelVQ`, or one that is a first stage.

        The architecture is read from the tensors' shapes; GroupNorm has taming's 32 groups at any width. Nothing in the
        file is run.

        Args:
            path: .ckpt of Lightning, .pth, .pt or .safetensors, with or without `loss.*`; one prefix is stripped.
            config: taming's yaml, for the size of the images. None: one beside the file, or in `configs/` of its run,
                if PyYAML is installed.
            image_size: side of the images in pixels. None: the yaml's, or 256 without one. Levels keep their attention.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file can't be read or is no such model, or the yaml is of another one.
        """
        found = read_taming(Path(path), None if config is None else Path(config), image_size)
        return cls.from_taming_checkpoint(found)[0]

    @classmethod
    def from_taming_checkpoint(cls, found: TamingCheckpoint) -> tuple[Self, LoadedWeights]:
        """Build the model of a file that was read, as :meth:`from_taming`, and return what was loaded beside it."""
        try:
            model = cls._build(**found.architecture)
            loaded = model.load_taming_state_dict(found.state_dict)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{found.path}: {error}") from None
        return model.eval(), LoadedWeights(loaded.taken, loaded.left_out + found.outside, found.prefix)

    def load_taming_state_dict(self, state_dict: Mapping, strict: bool = True) -> LoadedWeights:
        """Load a checkpoint of taming-transformers: its state dict, or a dict that has it as "state_dict".

        One prefix before all names is stripped, such as "module.". The training losses (`loss.*`) are left out, and
        buffers of the quantizer (statistics of training, which taming does not have) are not asked for.

        Args:
            state_dict: names to tensors.
            strict: names that are missing or unexpected are an error; otherwise what fits by name is loaded.

        Returns:
            The number of tensors loaded, the names left out, and the prefix.

        Raises:
            ValueError: no name fits, or with all missing and unexpected names and wrong shapes; nothing has been loaded
                then.
        """
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        optional = {f"quantize.{name}" for name, _ in self.quantize.named_buffers()}
        given, loaded = fitting(state_dict, shapes, optional, strict=strict)
        if any(norm.num_groups != NORM_GROUPS for norm in self.modules() if isinstance(norm, nn.GroupNorm)):
            warnings.warn(
                f"this VQGAN has fewer than taming's {NORM_GROUPS} groups in a GroupNorm: the weights fit but compute "
                f"something else; build it with norm_groups={NORM_GROUPS}",
                stacklevel=2,
            )
        self.load_state_dict(given, strict=False)
        return loaded

    def _check_multiple(self, name: str, size: int) -> None:
        if size < 1 or size % self.downsampling_factor:
            raise ValueError(f"{name} {size} is not a multiple of the down-sampling factor {self.downsampling_factor}")
