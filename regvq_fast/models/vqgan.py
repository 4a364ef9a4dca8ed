"""The VQGAN autoencoder: encoder, any quantizer, decoder.

Architecture, module names and tensor layouts are those of taming-transformers' `VQModel` (Esser, Rombach, Ommer,
"Taming Transformers for High-Resolution Image Synthesis", CVPR 2021), whose checkpoints load with
`VQGAN.from_taming`.

Shapes: images (B, in_channels, H, W); latents and codes (B, D, h, w), tokens (B, h, w), with h = H / f, w = W / f and
the down-sampling factor f = 2 ** (len(ch_mult) - 1). Images are in [-1, 1]; reconstructions are not clamped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from regvq_fast.models.layers import Decoder, Encoder
from regvq_fast.models.model import Model, evaluating
from regvq_fast.models.pretrained import describe_quantizer, restore_quantizer
from regvq_fast.models.taming_weights import NORM_GROUPS, TamingCheckpoint, fitting, read_taming
from regvq_fast.models.transformer import flat_ids
from regvq_fast.models.weights import LoadedWeights
from regvq_fast.quantizers import Quantizer, QuantizerOutput

_LARGEST_PIXEL = 10.0  # above any normal noise, below images in [0, 255]


class VQGANOutput(NamedTuple):
    """Output of one pass through the autoencoder."""

    reconstruction: Tensor
    """(B, in_channels, H, W), not clamped."""
    features: Tensor
    """(B, ch * ch_mult[0], H, W), input of `decoder.conv_out`, detached."""
    quantizer: QuantizerOutput
    """Output of the quantizer."""


class VQGAN(Model):
    """Convolutional autoencoder around a vector quantizer; the defaults are taming's `custom_vqgan`.

    Args:
        quantizer: module with `code_dim`, `num_codes`, `forward(z (B, D, h, w)) -> QuantizerOutput` and
            `codes_of(indices (B, h, w)) -> (B, D, h, w)`. Kept as `self.quantize`.
        image_size: side of the images in pixels, a multiple of 2 ** (len(ch_mult) - 1). It determines which levels have
            attention; images of other sizes that are such multiples work, too.
        ch: base width.
        ch_mult: width of each level as a multiple of `ch`, from full resolution downwards.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: resolutions, in pixels of an `image_size` image, at which residual blocks are followed by
            attention. Resolutions that no level has are ignored, as in taming.
        z_channels: width of the latents outside the quantizer's 1x1 convolutions.
        dropout: probability, in [0, 1), inside residual blocks.
        norm_groups: groups of each GroupNorm, 32 in taming's models. None: 32, or fewer so that groups have at least 4
            channels.
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
        """Return latents (B, D, h, w), not yet quantized, of images (B, in_channels, H, W) in [-1, 1].

        Images are cast to the type of the weights, or of autocast.

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
        """Return images (B, in_channels, H, W), not clamped, of quantized latents (B, D, h, w).

        Raises:
            TypeError: latents that are not floating point, such as tokens.
            ValueError: another shape.
        """
        return self.decoder.conv_out(self.decoder_features(quantized))

    def decoder_features(self, quantized: Tensor) -> Tensor:
        """Return the input (B, ch * ch_mult[0], H, W) of `decoder.conv_out` for quantized latents (B, D, h, w).

        It gives the gradient of the last layer's weight, for the adaptive weight of the adversarial loss, from a
        gradient at the reconstruction, without a backward through the decoder. Raises as `decode`.
        """
        if not quantized.is_floating_point():
            raise TypeError(f"latents must be floating point, got {quantized.dtype}: give tokens to decode_indices")
        if quantized.ndim != 4 or quantized.shape[1] != self.quantize.code_dim:
            raise ValueError(f"latents must be (B, {self.quantize.code_dim}, h, w), got {tuple(quantized.shape)}")
        return self.decoder.features(self.post_quant_conv(self._as_convolved(quantized)))

    def _as_convolved(self, value: Tensor) -> Tensor:
        """Cast to the type that convolutions compute in, that of autocast or of the weights."""
        kind = value.device.type
        autocast = torch.is_autocast_enabled(kind)
        return value.to(torch.get_autocast_dtype(kind) if autocast else self.last_layer.dtype)

    def forward(self, images: Tensor, *quantizer_args: Any) -> VQGANOutput:
        """Reconstruct images (B, in_channels, H, W) in [-1, 1]; raises as `encode`.

        Further arguments (seed, row_offset) go to the quantizer.
        """
        quantizer = self.quantize(self.encode(images), *quantizer_args)
        # Under autocast on a GPU, GroupNorm gives fp32: this cast halves the features that leave a compiled graph.
        features = self._as_convolved(self.decoder_features(quantizer.quantized))
        # Detached: otherwise a compiled backward has a gradient of zeros for it, as large as the map.
        return VQGANOutput(self.decoder.conv_out(features), features.detach(), quantizer)

    @torch.no_grad()
    def initialize_quantizer(self, images: Tensor) -> None:
        """Fit the quantizer of a new model to its latents of these images, if it needs that.

        Raises:
            ValueError: a single position; otherwise as `encode`.
        """
        self.quantize.initialize(self.encode(images))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return tokens (B, h, w) int64 of images (B, in_channels, H, W) in [-1, 1].

        No noise, mask or dropout, in any mode of the model. Raises as `encode`, and on a CPU ValueError for values far
        outside [-1, 1].
        """
        checks = images.device.type == "cpu" and images.is_floating_point() and not torch.compiler.is_compiling()
        if checks and images.numel():
            largest = images.abs().max().item()
            if largest > _LARGEST_PIXEL:
                raise ValueError(
                    f"images must lie in [-1, 1], got values up to {largest:g}: divide by 127.5, subtract 1"
                )
        with evaluating(self):
            return self.quantize(self.encode(images)).indices

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return images (B, in_channels, H, W) of tokens (B, h, w) int64 in [0, num_codes), without dropout.

        Raises:
            ValueError: not three dimensions; on a CPU also tokens out of range.
            TypeError: not int64.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}")
        flat_ids("indices", indices, (indices.shape[1], indices.shape[2]), self.quantize.num_codes)
        with evaluating(self):
            return self.decode(self.quantize.codes_of(indices))

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, with those of the quantizer as "quantizer".

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
        """Build the model of a taming-transformers checkpoint: a `VQModel`, a `GumbelVQ`, or one as a first stage.

        The architecture follows from the tensors' shapes; GroupNorm has taming's 32 groups at any width. No code in the
        file is run.

        Args:
            path: .ckpt of Lightning, .pth, .pt or .safetensors, with or without `loss.*`; one prefix is stripped.
            config: taming's yaml, for the size of the images. None: one beside the file, or in `configs/` of its run,
                if PyYAML is installed.
            image_size: side of the images in pixels. None: the yaml's, or 256 without one. The levels with attention
                stay the same.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file can't be read or is another kind of model, or the yaml is of another model.
        """
        found = read_taming(Path(path), None if config is None else Path(config), image_size)
        return cls.from_taming_checkpoint(found)[0]

    @classmethod
    def from_taming_checkpoint(cls, found: TamingCheckpoint) -> tuple[Self, LoadedWeights]:
        """Build the model of a checkpoint that was read, as :meth:`from_taming`; also return what was loaded."""
        try:
            model = cls._build(**found.architecture)
            loaded = model.load_taming_state_dict(found.state_dict)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{found.path}: {error}") from None
        return model.eval(), LoadedWeights(loaded.taken, loaded.left_out + found.outside, found.prefix)

    def load_taming_state_dict(self, state_dict: Mapping, strict: bool = True) -> LoadedWeights:
        """Load a checkpoint of taming-transformers: its state dict, or a dict with it as "state_dict".

        A common prefix of all names, such as "module.", is stripped. Training losses (`loss.*`) are left out. Buffers
        of the quantizer, training statistics that taming does not have, may be missing.

        Args:
            state_dict: names to tensors.
            strict: missing or unexpected names are an error; otherwise what fits by name is loaded.

        Returns:
            The number of tensors loaded, the names left out, and the prefix.

        Raises:
            ValueError: no name fits; or missing or unexpected names or wrong shapes, all of them listed. Then nothing
                is loaded.
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
