"""Layers of the convolutional autoencoder: normalisation, residual block, attention, resampling, encoder, decoder.

Module and parameter names are those of taming-transformers (`taming/modules/diffusionmodules/model.py`), so that its
checkpoints load by name. All layers map (B, C, H, W) to (B, C', H', W') and keep the memory format of their input.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.model import Checkpointed

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, replaced by :func:`written_out_group_norm` if compiled for a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W); under autocast on a GPU in fp32, as torch's."""
        if not (x.is_cuda and torch.compiler.is_compiling()):
            return super().forward(x)
        normalized = written_out_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normalized if torch.is_autocast_enabled("cuda") else normalized.to(x.dtype)


def written_out_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `F.group_norm` by elementary operations, in the memory format of the input.

    On a GPU `F.group_norm` uses NCHW: compiled, it keeps each result twice, in that layout for backward and in
    channels_last for the next convolution.

    Args:
        x: (B, C, H, W); computed in at least fp32.
        groups: number of groups, a divisor of C.
        weight, bias: (C,).
        eps: added to the variance.

    Returns:
        (B, C, H, W), float32 for 16-bit input.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Reduce each channel first, then the channels of a group: in channels_last, adjacent threads then read adjacent
    # channels. Reduced at once, a group of 4 channels would use 8 of the 32 bytes that a GPU reads at a time. Affine
    # parameters are expanded over the batch for the same reason: their gradients share this reduction in backward.
    variances, means = (
        value.unflatten(1, (groups, -1)) for value in torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    )
    between, mean = torch.var_mean(means, dim=2, correction=0, keepdim=True)
    scale = torch.rsqrt(variances.mean(2, keepdim=True) + between + eps)
    mean, scale = (value.expand_as(means).flatten(1, 2) for value in (mean, scale))
    return (x - mean) * (scale * weight[:, None, None]) + bias[:, None, None].expand_as(mean)


def group_norm(channels: int, groups: int | None = None) -> GroupNorm:
    """Return a GroupNorm with taming's 32 groups, or fewer, so that groups have at least 4 channels and are equal.

    Taming's own models have at least 4 channels per group. Groups of one channel, as 32 groups of 32 channels would be,
    erase the mean of every channel, and with it the colour of a region.

    Args:
        channels: number of channels.
        groups: another number of groups, a divisor of the channels.
    """
    if groups is None:
        most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on the skip path where the width changes."""

    def __init__(
        self, in_channels: int, out_channels: int, dropout: float = 0.0, norm_groups: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """x + single-head self-attention over the H * W positions, scaled by 1/sqrt(C)."""

    def __init__(self, channels: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1, H*W, C), as views without a copy in channels_last.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve H and W by a 3x3 convolution of stride 2, padded by zeros below and to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H // 2, W // 2)."""
        # Conv2d pads symmetrically; taming's checkpoints were trained with this padding.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        # F.interpolate(x, scale_factor=2.0, mode="nearest"), whose backward torch 2.13 compiles wrongly for a CPU in
        # bf16 after a residual block: the gradient of all layers below may be 0.
        batch, channels, height, width = x.shape
        blocks = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(batch, height, 2, width, 2, channels)
        return self.conv(blocks.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2))


class Level(Checkpointed):
    """The blocks of one resolution; with ``attention``, each residual block is followed by an attention block."""

    def __init__(
        self, widths: Sequence[int], *, attention: bool, dropout: float, norm_groups: int | None = None
    ) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(c_in, c_out, dropout, norm_groups) for c_in, c_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(c_out, norm_groups) for _, c_out in pairs if attention)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def layers(self, h: Tensor) -> Tensor:
        """Map (B, widths[0], H, W) to (B, widths[-1], H', W'), with H and W halved, doubled or the same."""
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

    def __init__(self, channels: int, dropout: float, norm_groups: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, norm_groups)
        self.attn_1 = AttnBlock(channels, norm_groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, norm_groups)

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Encoder of a VQGAN, from images to latents; arguments as in `regvq_fast.models.VQGAN`."""

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
        """Map images (B, in_channels, H, W) to (B, z_channels, h, w)."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Decoder of a VQGAN, from quantized latents to images; arguments as in `regvq_fast.models.VQGAN`."""

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
        """Map (B, z_channels, h, w) to the input (B, ch * ch_mult[0], H, W) of the last convolution, `conv_out`."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.silu(self.norm_out(h))

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, z_channels, h, w) to images (B, out_channels, H, W)."""
        return self.conv_out(self.features(z))
