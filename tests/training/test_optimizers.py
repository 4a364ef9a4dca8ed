"""Muon for the matrices of a prior, beside AdamW for the rest."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from regvq_fast.config import OptimizerConfig
from regvq_fast.models.llama import LlamaBlock
from regvq_fast.priors.config import PriorConfig, PriorOptimizerConfig, PriorRunConfig, TokensConfig
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.training import optimizers
from regvq_fast.training.optimizers import Muon, block_matrices, build_optimizers, orthogonalized

SHAPES = ((12, 12), (12, 36), (48, 12), (12, 36))


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def with_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48), (2, 48, 16)])
def test_directions_stay_and_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(given, full_matrices=False)
    found = u.mT @ orthogonalized(given) @ vh.mT
    sizes = found.diagonal(dim1=-2, dim2=-1)
    kept = s > 0.01 * s[..., :1]  # smaller ones need more iterations
    assert kept.float().mean() > 0.9
    assert sizes[kept].min() > 0.5
    assert sizes.max() < 1.3
    torch.testing.assert_close(found, torch.diag_embed(sizes), rtol=0, atol=1e-10)


def test_a_matrix_of_zeros_stays() -> None:
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_steps_are_those_of_pytorch_up_to_its_rounding() -> None:
    """PyTorch's iterations are in bfloat16."""
    ours, theirs = matrices(), matrices()
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for parameters, optimizer in ((ours, Muon(ours, lr=1e-2, weight_decay=0.1)), (theirs, reference)):
        for step in range(3):
            with_gradients(parameters, step)
            optimizer.step()
    for before, a, b in zip(matrices(), ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()


@torch.no_grad()
def test_a_step_has_the_size_of_one_of_adamw() -> None:
    for parameter in (nn.Parameter(torch.zeros(shape)) for shape in SHAPES):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=1e-2, weight_decay=0.0).step()
        assert 0.15e-2 < parameter.square().mean().sqrt() < 0.25e-2


def test_a_skipped_step_changes_nothing() -> None:
    parameters, continued = matrices(), matrices()
    optimizers = [Muon(parameters, lr=1e-2, weight_decay=0.1), Muon(continued, lr=1e-2, weight_decay=0.1)]
    skip = torch.zeros(())
    for optimizer in optimizers:
        optimizer.found_inf = skip
    for step in range(2):
        for each, optimizer in zip((parameters, continued), optimizers, strict=True):
            with_gradients(each, step)
            optimizer.step()
    skip.fill_(1.0)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizers[0].step()
    skip.fill_(0.0)
    for each, optimizer in zip((parameters, continued), optimizers, strict=True):
        with_gradients(each, 2)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, continued, strict=True))


def test_batches_of_matrices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, single = matrices(), matrices()
    batches = []

    def watched(batch: torch.Tensor) -> torch.Tensor:
        batches.append(len(batch))
        return orthogonalized(batch)

    monkeypatch.setattr(optimizers, "orthogonalized", watched)
    for parameters, limit in ((whole, 2**24), (single, 2 * 12 * 36 - 1)):
        monkeypatch.setattr(optimizers, "_ELEMENTS", limit)
        with_gradients(parameters, 0)
        Muon(parameters, lr=1e-2, weight_decay=0.1).step()
    assert batches == [1, 2, 1] + [1] * 4
    torch.testing.assert_close(single, whole)


def test_a_step_reads_no_value() -> None:
    """It would make the host wait for the device; tensors of the meta device have none."""
    parameter = nn.Parameter(torch.empty(8, 4, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    muon = Muon([parameter], lr=1e-2, weight_decay=0.1)
    muon.found_inf = torch.empty((), device="meta")
    muon.step()


def test_a_loaded_optimizer_continues_to_the_bit() -> None:
    parameters = matrices()
    optimizer = Muon(parameters, lr=1e-2, weight_decay=0.1)
    with_gradients(parameters, 0)
    optimizer.step()
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    loaded = Muon(others, lr=1e-2, weight_decay=0.1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, one in ((parameters, optimizer), (others, loaded)):
        with_gradients(each, 1)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_matrices_of_a_prior_are_those_of_its_blocks() -> None:
    prior = VQDiffusion(
        4,
        token_shape=(2, 2),
        width=8,
        depth=1,
        heads=2,
        num_steps=5,
        text_encoder=WordEncoder(width=8, depth=1, heads=2),
    )
    names = {id(parameter): name for name, parameter in prior.named_parameters()}
    found = {names[id(parameter)] for parameter in block_matrices(prior)}
    block = {f"{name}.weight" for name in ("ln1.linear", "attn.qkv", "attn.proj", "ln_text.linear", "mlp.0", "mlp.2")}
    block |= {f"text_attn.{name}.weight" for name in ("query", "kv", "proj")}
    assert {name for name in found if name.startswith("blocks.")} == {f"blocks.0.{name}" for name in block}
    assert {name.rpartition(".blocks.")[0] for name in found} == {"", "text_encoder"}
    adamw, muon = build_optimizers(prior, OptimizerConfig(), block_matrices(prior))
    optimized = [[names[id(p)] for group in each.param_groups for p in group["params"]] for each in (adamw, muon)]
    assert sorted(optimized[0] + optimized[1]) == sorted(names.values())
    assert set(optimized[1]) == found


def test_frozen_matrices_are_left_out() -> None:
    block = LlamaBlock(8, 2, dropout=0.0)
    assert len(block_matrices(block)) == 4
    block.requires_grad_(False)
    assert block_matrices(block) == []


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=1.0, weight_decay=0.0)


def test_sharding_splits_matrices_so_it_is_refused() -> None:
    tokens = TokensConfig(cache=Path("tokens"))
    config = PriorConfig(run=PriorRunConfig(shard=True), optimizer=PriorOptimizerConfig(muon=True), tokens=tokens)
    with pytest.raises(ValueError, match=r"--shard .*--muon"):
        config.check()
