"""diffusers' schedulers, which the benchmarks sample our networks with, beside the priors' own chain."""

import peers
import pytest
import torch

from regvq_fast.priors.diffusion import VQDiffusion
from regvq_fast.priors.diffusion.loss import MaskAndReplace
from regvq_fast.priors.maskgit import MaskGIT

diffusers = pytest.importorskip("diffusers")
SIZES = {"token_shape": (4, 4), "width": 32, "depth": 1, "heads": 2}
DIFFUSION = VQDiffusion(5, text_shape=(1, 8), null_condition=True, num_steps=7, **SIZES).eval()
MASKED = MaskGIT(5, 5, label_names="abcde", **SIZES).eval()


def test_the_chain_is_the_same():
    scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=6, num_train_timesteps=7)
    ours = MaskAndReplace(5, 7).cumulative(torch.arange(1, 8))
    for value, name in zip(ours, ("log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct"), strict=True):
        torch.testing.assert_close(getattr(scheduler, name)[:7].exp().double(), value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("prior", "sample"),
    [
        (DIFFUSION, lambda: peers.diffusers_diffusion(DIFFUSION, torch.randn(6, 1, 8), 7, 2.0, 0.9)),
        (MASKED, lambda: peers.diffusers_masked(MASKED, torch.randint(5, (6, 1)), 4, 2.0)),
    ],
    ids=["diffusion", "masked"],
)
def test_they_sample_what_the_network_says(prior, sample, monkeypatch):
    free = sample()
    assert free.shape == (6, 16)
    assert set(free.flatten().tolist()) == set(range(5))  # codes, no masks
    forward = prior.forward
    monkeypatch.setattr(prior, "forward", lambda *inputs: forward(*inputs) + 50 * torch.eye(5)[3])
    assert (sample() == 3).all()
