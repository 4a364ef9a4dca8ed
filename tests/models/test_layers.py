"""Layers of the autoencoder: group norm, residual, attention and resampling blocks, by their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from regvq_fast.models.layers import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm, written_out_group_norm


@pytest.mark.parametrize(
    ("channels", "groups"), [(512, 32), (128, 32), (64, 16), (32, 8), (48, 12), (33, 3), (37, 1), (8, 2), (1, 1)]
)
def test_group_norm_groups(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (groups, channels, 1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_written_out_group_norm(memory_format):
    """The variant compiled for GPUs gives the same values and gradients and keeps the memory format."""
    shapes = {"x": (3, 12, 5, 4), "weight": (12,), "bias": (12,)}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    x, weight, bias = inputs
    given = (3 * x + 2).contiguous(memory_format=memory_format)
    found, expected = written_out_group_norm(given, 4, weight, bias, 1e-6), F.group_norm(given, 4, weight, bias, 1e-6)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert written_out_group_norm(given.bfloat16(), 4, weight.float(), bias.float(), 1e-6).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
def test_written_out_group_norm_keeps_its_precision_far_from_zero(dtype, tolerance):
    """A mean of 100 standard deviations; bf16 rounds the input and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(2, 32, 16, 16, generator=generator)).to(dtype)
    weight, bias = torch.randn(2, 32, generator=generator)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for norm, kind in ((written_out_group_norm, None), (F.group_norm, torch.float64)):
        inputs = [value.to(kind or value.dtype, copy=True).requires_grad_() for value in (x, weight, bias)]
        out = norm(inputs[0], 8, *inputs[1:], 1e-6).double()
        results.append([out, *(g.double() for g in torch.autograd.grad(out, inputs, upstream))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_written_out_group_norm_reduces_each_channel_by_itself():
    """All other reductions of a map read it in strides."""

    inputs = [torch.randn(shape, requires_grad=True) for shape in ((3, 12, 5, 4), (12,), (12,))]

    def gradients(x, weight, bias):
        return torch.autograd.grad(written_out_group_norm(x, 4, weight, bias, 1e-6).sin().sum(), (x, weight, bias))

    aten = torch.ops.aten
    reductions = [
        node.args[1]
        for node in make_fx(gradients, tracing_mode="fake")(*inputs).graph.nodes
        if node.target in (aten.var_mean.correction, aten.mean.dim, aten.sum.dim_IntList)
        and node.args[0].meta["val"].numel() == inputs[0].numel()
    ]
    assert len(reductions) >= 4
    assert all(dims == [2, 3] for dims in reductions)


@pytest.mark.parametrize("out_channels", [6, 10])
def test_resnet_block(out_channels):
    block = ResnetBlock(6, out_channels).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)

    def branch(h, norm, conv):
        h = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, 1e-6)
        return F.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)

    h = branch(branch(x, block.norm1, block.conv1), block.norm2, block.conv2)
    skip = x if out_channels == 6 else F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias)
    torch.testing.assert_close(block(x), skip + h)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_block(memory_format):
    block = AttnBlock(6).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64).to(memory_format=memory_format)
    h = F.group_norm(x, 1, eps=1e-6)

    def project(conv, values):
        return torch.einsum("oc,bcn->bon", conv.weight[:, :, 0, 0], values) + conv.bias[:, None]

    q, k, v = (project(conv, h.reshape(2, 6, 20)) for conv in (block.q, block.k, block.v))
    attention = (torch.einsum("bci,bcj->bij", q, k) / 6**0.5).softmax(2)
    attended = torch.einsum("bij,bcj->bci", attention, v)
    torch.testing.assert_close(block(x), x + project(block.proj_out, attended).reshape(2, 6, 5, 4))
    assert block(x).is_contiguous(memory_format=memory_format)


def test_downsample_pads_below_and_right():
    block = Downsample(1)
    nn.init.ones_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    assert block(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


@pytest.mark.slow
def test_compiled_resampling_has_the_eager_gradient_in_bf16():
    """F.interpolate behind a residual block has not: its compiled backward is wrong on CPUs (torch 2.13)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = torch.nn.Sequential(Downsample(8), ResnetBlock(8, 8), Upsample(8), ResnetBlock(8, 8))
    weight = torch.randn(2, 8, 16, 16)
    gradients = []
    for module in (block, torch.compile(block, fullgraph=True, dynamic=False)):
        x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        (gradient,) = torch.autograd.grad((out.float() * weight).sum(), x)
        gradients.append(gradient.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_upsample_repeats():
    block = Upsample(1)
    nn.init.dirac_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    assert block(torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]
