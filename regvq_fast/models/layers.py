"""Parts of the convolutional autoencoder: normalisation, residual block, attention, resampling, levels of them.

Module and parameter names are those of taming-transformers (`taming/modules/diffusionmodules/model.py`), so that its
checkpoints load by name. All of them map (B, C, H, W) to (B, C', H', W') and keep the memory format of their input.
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
    """torch's, but for :func:`written_out_group_norm` where it is compiled for a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W); under autocast on a GPU in fp32, as torch's."""
        if not (x.is_cuda and torch.compiler.is_compiling()):
            return super().forward(x)
        normalized = written_out_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normalized if torch.is_autocast_enabled("cuda") else normalized.to(x.dtype)


def written_out_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.group_norm` for a compiler, in the memory format of its input.

    PyTorch's own takes NCHW on a GPU: compiled, it leaves each result in memory twice, in that layout for backward and
    in channels_last for the convolution that follows.

    Args:
        x: (B, C, H, W); computed with in fp32 at least.
        groups: of channels, which they divide.
        weight, bias: (C,).
        eps: added to the variance.

    Returns:
        (B, C, H, W), float32 for 16-bit input.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Each channel by itself, then those of a group: in channels_last, neighbouring threads then read neighbouring
    # channels. Reduced at once, a group's 4 channels would be 8 of the 32 bytes that a GPU reads at a time. The affine
    # parameters are spread over the batch for the same reason: their gradients share backward's one such reduction.
    variances, means = (
        value.unflatten(1, (groups, -1)) for value in torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    )
    between, mean = torch.var_mean(means, dim=2, correction=0, keepdim=True)
    scale = torch.rsqrt(variances.mean(2, keepdim=True) + between + eps)
    mean, scale = (value.expand_as(means).flatten(1, 2) for value in (mean, scale))
    return (x - mean) * (scale * weight[:, None, None]) + bias[:, None, None].expand_as(mean)


def group_norm(channels: int, groups: int | None = None) -> GroupNorm:
    """GroupNorm with taming's 32 groups, or fewer where they would have under 4 channels each or not divide them.

    Taming's own models have 4 channels a group or more. Groups of one channel, which 32 groups of 32 would be, erase
    the mean of every channel, and with it the colour of a region.

    Args:
        channels: of the maps.
        groups: another number of groups, which divides them.
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
        # None rather than Identity: a registered module would not change the keys, but None says "no such weights".
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """x + single-head self-attention over the H * W places, scaled by 1/sqrt(C)."""

    def __init__(self, channels: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1, H*W, C); views, without a copy, where the memory format is channels_last.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve H and W: 3x3 convolution of stride 2 over an image padded by one zero row below and column to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H // 2, W // 2)."""
        # Conv2d pads symmetrically only; the checkpoints were trained with this lopsided padding.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        # F.interpolate(x, scale_factor=2.0, mode="nearest") in other words: compiled for a CPU in bf16, with a residual
        # block before it, torch 2.13 gives that a wrong backward, up to a gradient of zeros for all layers below.
        batch, channels, height, width = x.shape
        blocks = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(batch, height, 2, width, 2, channels)
        return self.conv(blocks.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2))


class Level(Checkpointed):
    """The blocks of one resolution; each residual block is followed by attention where the level has attention."""

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
        """(B, widths[0], H, W) to (B, widths[-1], H', W'), H' being H halved, doubled or kept."""
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
        """(B, C, h, w) to (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(h)))
