"""Compare tokens sampled on the CPU with those sampled on the pretend GPU in a CUDA graph."""

import copy

import torch
from torch import Tensor

from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.priors.diffusion import VQDiffusion, sample_diffusion
from regvq_fast.priors.maskgit import MaskGIT, sample_maskgit


def spread(prior: torch.nn.Module) -> None:
    """Scale the weights so that a prior distinguishes conditions and tokens."""
    for parameter in prior.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)


def to_gpu(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(tensor.cuda() for tensor in value)
    return value.cuda() if isinstance(value, Tensor) else value


torch.manual_seed(0)
sizes = {"token_shape": (4, 4), "width": 32, "depth": 2, "heads": 2}
kept = (torch.randint(64, (3, 4, 4)), torch.rand(3, 4, 4) < 0.3)
for draw, prior, condition, settings in (
    (
        sample_autoregressive,
        TokenTransformer(64, 10, **sizes),
        torch.randint(10, (3, 16)),
        ({}, {"top_k": 5}, {"top_p": 0.7, "guidance": 2.0}, {"keep": kept}),
    ),
    (
        sample_diffusion,
        VQDiffusion(64, num_steps=8, **sizes),
        torch.randn(3, 77, 512),
        ({}, {"guidance": 2.0}, {"steps": 4}, {"keep": kept}),
    ),
    (
        sample_maskgit,
        MaskGIT(64, 10, **sizes),
        torch.randint(10, (3, 16)),
        ({}, {"guidance": 2.0}, {"steps": 4}, {"keep": kept}),
    ),
):
    spread(prior)
    twin = copy.deepcopy(prior).cuda()
    for setting in settings:
        expected = draw(prior, condition, seed=3, **setting)
        found = draw(twin, to_gpu(condition), seed=3, **{name: to_gpu(value) for name, value in setting.items()})
        assert found.is_cuda
        assert torch.equal(found.cpu(), expected), (draw.__name__, list(setting))
        assert expected.unique().numel() > 10
