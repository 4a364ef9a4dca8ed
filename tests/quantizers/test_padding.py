"""Padding counts in nothing: each quantizer does what it does without the padded positions."""

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.quantizer_cases import BUILDERS, D, N, equal, seed
from torch import Tensor

from regvq_fast.losses.prior import prior_kl
from regvq_fast.padding import Padding
from regvq_fast.quantizers import (
    QUANTIZERS,
    EMAQuantizer,
    GumbelQuantizer,
    NearestQuantizer,
    Quantizer,
    RegularizedQuantizer,
    ResidualQuantizer,
)
from regvq_fast.quantizers.mask import stochastic_mask
from regvq_fast.quantizers.statistics import softmax_of_some_rows

LENGTHS = [20, 13, 5]
VALID = torch.arange(20) < torch.tensor(LENGTHS).unsqueeze(1)


def sequences(batch: int = 3, length: int = 20) -> Tensor:
    return torch.randn(batch, D, length, generator=torch.Generator().manual_seed(1))


def padded(z: Tensor, valid: Tensor) -> Tensor:
    """Latents with nan where they are padding."""
    return z.masked_fill(~valid.unsqueeze(1), math.nan)


def test_all_quantizers_are_here() -> None:
    assert {type(build()) for build in BUILDERS.values()} == set(QUANTIZERS.values())


def test_a_padded_sequence_does_what_the_shorter_one_does(quantizer: Quantizer) -> None:
    """In steps of training and in evaluation, with noise by the same row numbers."""
    other = copy.deepcopy(quantizer)
    short = sequences(batch=1, length=13)
    valid = torch.arange(20) < 13
    long = torch.cat([short, torch.full((1, D, 7), math.nan)], dim=2)
    for step in range(3):
        if step == 2:
            quantizer.eval(), other.eval()
        z, padded_z = short.clone().requires_grad_(), long.clone().requires_grad_()
        expected, out = other(z, seed(step)), quantizer(padded_z, seed(step), valid=valid.unsqueeze(0))
        assert torch.equal(out.indices, torch.cat([expected.indices, torch.full((1, 7), -1)], dim=1))
        torch.testing.assert_close(out.quantized[..., :13], expected.quantized)
        assert (out.quantized[..., 13:] == 0).all()
        torch.testing.assert_close((out.loss, out.metrics), (expected.loss, expected.metrics))
        torch.testing.assert_close(out.perturbation[:, :13], expected.perturbation)
        assert torch.equal(out.mask[:, :13], expected.mask)
        assert not out.perturbation[:, 13:].any()
        assert not out.mask[:, 13:].any()

        def gradients(module: Quantizer, z: Tensor, out) -> list[Tensor]:
            leaves = [z, *(p for p in module.parameters() if p.requires_grad)]
            return list(torch.autograd.grad(out.quantized.square().sum() + out.loss, leaves, materialize_grads=True))

        of_z, *of_parameters = gradients(quantizer, padded_z, out)
        expected_of_z, *expected_of_parameters = gradients(other, z, expected)
        torch.testing.assert_close(of_z[..., :13], expected_of_z)
        assert (of_z[..., 13:] == 0).all()
        torch.testing.assert_close(of_parameters, expected_of_parameters)
        torch.testing.assert_close(quantizer.state_dict(), other.state_dict())


def test_a_batch_of_lengths_is_all_its_positions(quantizer: Quantizer) -> None:
    quantizer.eval()
    z = sequences().requires_grad_()
    together = z.movedim(1, 2)[VALID]  # (M, D)
    expected, out = quantizer(together), quantizer(padded(z, VALID), valid=VALID)
    assert torch.equal(out.indices[VALID], expected.indices)
    torch.testing.assert_close(out.quantized.movedim(1, 2)[VALID], expected.quantized)
    torch.testing.assert_close(out.loss, expected.loss)
    losses = [result.quantized.square().sum() + result.loss for result in (out, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in losses))


def test_all_valid_positions_give_the_bits_of_none(quantizer: Quantizer) -> None:
    other = copy.deepcopy(quantizer)
    for step in range(3):
        a, b = quantizer(sequences(), seed(step)), other(sequences(), seed(step), valid=torch.ones_like(VALID))
        assert equal(a, b)
        torch.testing.assert_close(a.metrics, b.metrics, rtol=0, atol=0)
        torch.testing.assert_close(quantizer.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_padding_alone_gives_nothing_and_moves_nothing(quantizer: Quantizer) -> None:
    other = copy.deepcopy(quantizer)
    for module in (quantizer, other):
        module(sequences(), seed(0))
    z = padded(sequences(), torch.zeros_like(VALID)).requires_grad_()
    out = quantizer(z, seed(1), valid=torch.zeros_like(VALID))
    assert (out.indices == -1).all()
    assert out.loss == 0
    (out.quantized.sum() + out.loss).backward()
    assert z.grad is not None
    assert not z.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())
    a, b = (module(sequences(), seed(1)) for module in (quantizer, other))
    assert equal(a, b)
    torch.testing.assert_close(quantizer.state_dict(), other.state_dict())


def test_padded_tokens_have_no_codes(quantizer: Quantizer) -> None:
    indices = quantizer.eval()(sequences(), valid=VALID).indices
    codes = quantizer.codes_of(indices).movedim(1, 2)
    assert not codes[~VALID].any()
    torch.testing.assert_close(codes[VALID], quantizer.codes_of(indices[VALID]))


@pytest.mark.parametrize(
    ("valid", "kind", "message"),
    [
        (VALID[:, :19], ValueError, r"valid .*\(3, 20\), got \(3, 19\)"),
        (VALID.float(), TypeError, "valid must be bool"),
        ([[True]], TypeError, "valid must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_valid_of_another_form_is_refused(valid, kind, message, channels_last) -> None:
    z = sequences().movedim(1, 2) if channels_last else sequences()
    with pytest.raises(kind, match=message):
        NearestQuantizer(N, D, channels_last=channels_last)(z, valid=valid)


# ------------------------------------------------------------------------------------------- by image, of reg-vq


def test_the_mask_selects_its_share_of_the_valid_positions_of_every_image() -> None:
    quantizer = RegularizedQuantizer(N, D, mask_ratio=0.4)
    out = quantizer(padded(sequences(), VALID), seed(), valid=VALID)
    assert out.mask.sum(1).tolist() == [math.floor(0.4 * length) for length in LENGTHS]
    assert not out.mask[~VALID].any()
    assert torch.equal(out.mask[0], stochastic_mask(1, 20, 0.4, seed()))  # the first image has no padding


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_a_mask_of_all_valid_positions_is_that_of_none(mode: str) -> None:
    arguments = (4, 29, 0.29, seed())
    expected = stochastic_mask(*arguments, mode=mode)
    assert torch.equal(stochastic_mask(*arguments, mode=mode, valid=torch.ones(4 * 29, dtype=torch.bool)), expected)
    some = torch.arange(4 * 29) % 3 > 0
    assert not stochastic_mask(*arguments, mode=mode, valid=some)[~some].any()


def test_posteriors_of_images_are_of_their_valid_positions_and_those_of_padding_alone_are_left_out() -> None:
    quantizer = RegularizedQuantizer(N, D, prior_weight=1.0, prior_scope="image", mask_ratio=0)
    valid = torch.cat([VALID, torch.zeros(1, 20, dtype=torch.bool)])
    out = quantizer(sequences(batch=4), seed(), valid=valid)
    kls = []
    for indices, length in zip(out.indices, LENGTHS, strict=False):
        counts = torch.bincount(indices[:length], minlength=N)
        kls.append(prior_kl((counts / length).unsqueeze(0), rows=length))
    torch.testing.assert_close(out.loss.detach(), torch.stack(kls).mean())


def test_statistics_are_of_some_valid_positions_of_each_image() -> None:
    rows, weight, bias = sequences().movedim(1, 2), torch.randn(N, D), torch.randn(N)
    numbers = [8, 8, 5]  # of rows that are looked at
    alone = [softmax_of_some_rows(rows[i : i + 1, :length], weight, bias) for i, length in enumerate(LENGTHS)]
    found = softmax_of_some_rows(rows, weight, bias, Padding(VALID.flatten()))
    for name, value in enumerate(found):
        expected = sum(number * values[name] for number, values in zip(numbers, alone, strict=True)) / sum(numbers)
        torch.testing.assert_close(value, expected)


# ----------------------------------------------------------------------------------------- several ranks, compiled

VALID_OF_RANKS = torch.arange(20) < torch.tensor([20, 17, 2, 0]).unsqueeze(1)
ON_RANKS = {
    "vq-gan": lambda: NearestQuantizer(N, D),
    "vq-vae": lambda: EMAQuantizer(N, D),
    "gumbel-vq": lambda: GumbelQuantizer(N, D, kl_weight=1.0),
    "reg-vq global": lambda: RegularizedQuantizer(N, D, prior_weight=1.0, prior_scope="global"),
    "residual": lambda: ResidualQuantizer([NearestQuantizer(N, D), *[EMAQuantizer(N, D)] * 2], dropout=(1, 2, 3)),
    "reg-vq image": lambda: RegularizedQuantizer(N, D, prior_weight=1.0, prior_scope="image"),
}


def _steps(z: Tensor, valid: Tensor, row_offset: int = 0, ranks: int = 1) -> dict[str, list]:
    """Two steps of each quantizer: indices, loss, gradients, and what the quantizer is then."""
    results = {}
    for name, build in ON_RANKS.items():
        torch.manual_seed(0)
        quantizer, z = build(), z.detach().requires_grad_()
        for step in (0, 1):
            out = quantizer(z, seed(step), row_offset, valid)
            leaves = [z, *(p for p in quantizer.parameters() if p.requires_grad)]
            gradients = torch.autograd.grad(ranks * out.quantized.square().sum() + out.loss, leaves)
        results[name] = [out.indices, out.loss.detach(), *gradients, dict(quantizer.state_dict())]
    return results


def _on_a_rank(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    part = slice(2 * rank, 2 * rank + 2)
    torch.save(_steps(sequences(batch=4)[part], VALID_OF_RANKS[part], 40 * rank, ranks=2), f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_with_unequal_padding_do_what_one_does_with_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_a_rank, (str(tmp_path / "store"),), nprocs=2)
    ranks = [torch.load(tmp_path / f"store.{rank}") for rank in (0, 1)]
    whole = _steps(sequences(batch=4), VALID_OF_RANKS)
    for name, (indices, loss, of_z, *of_parameters, state) in whole.items():
        parts = [rank[name] for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), indices), name
        torch.testing.assert_close(sum(part[1] for part in parts) / 2, loss)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]) / 2, of_z)
        for first, second, expected in zip(parts[0][3:-1], parts[1][3:-1], of_parameters, strict=True):
            torch.testing.assert_close((first + second) / 2, expected)
        for part in parts:
            torch.testing.assert_close(part[-1], state)


@pytest.mark.parametrize("name", ["reg-vq", "vq-vae"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    quantizer = BUILDERS[name]()
    z = padded(sequences(), VALID).requires_grad_()
    expected = copy.deepcopy(quantizer)(z, seed(), valid=VALID)
    compiled = torch.compile(copy.deepcopy(quantizer), backend="aot_eager", fullgraph=True)
    out = compiled(z, seed(), valid=VALID)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close((out.quantized, out.loss), (expected.quantized, expected.loss))
    (out.quantized.sum() + out.loss).backward()
    assert z.grad is not None
    assert not z.grad.movedim(1, 2)[~VALID].any()
