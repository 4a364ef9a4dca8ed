"""Residual quantization with each quantizer of the package, and beside vector-quantize-pytorch's ResidualVQ."""

import copy
import itertools
import random

import pytest
import torch
from helpers.quantizer_cases import BUILDERS, D, N, equal, seed
from test_padding import VALID, padded, sequences
from torch import Tensor

from regvq_fast.quantizers import (
    EMAQuantizer,
    NearestQuantizer,
    QuantizerOutput,
    RegularizedQuantizer,
    ResidualQuantizer,
)


@pytest.fixture(params=BUILDERS, ids=str)
def residual(request: pytest.FixtureRequest) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer([BUILDERS[request.param]() for _ in range(3)])


@pytest.fixture
def three() -> list[NearestQuantizer]:
    torch.manual_seed(0)
    quantizers = [NearestQuantizer(N, D) for _ in range(3)]
    for quantizer in quantizers:
        torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizers


def test_output_is_the_sum_of_the_codes_of_the_residuals(residual: ResidualQuantizer) -> None:
    residual.initialize(sequences())
    residual.eval()
    z = sequences()
    out = residual(z)
    assert out.quantized.shape == z.shape
    assert out.indices.shape == out.mask.shape == out.perturbation.shape == (3, 3, 20)
    rest, loss = z, torch.zeros(())
    for number, quantizer in enumerate(residual.quantizers):
        one = quantizer(rest)
        rest, loss = rest - one.quantized, loss + one.loss
        assert torch.equal(out.indices[:, number], one.indices)
        for name, value in one.metrics.items():
            torch.testing.assert_close(out.metrics[f"{name}/{number}"], value)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.quantized, z - rest)
    torch.testing.assert_close(residual.codes_of(out.indices), out.quantized)
    coarse = out.indices.clone()
    coarse[:, 1:] = -1
    assert torch.equal(residual.codes_of(coarse), residual.codes_of(out.indices[:, :1]))


@pytest.mark.parametrize("name", ["reg-vq-distance", "vq-gan", "vq-vae"])
def test_more_quantizers_come_closer(name: str) -> None:
    torch.manual_seed(0)
    residual = ResidualQuantizer([BUILDERS[name]() for _ in range(4)])
    z = sequences(batch=8)
    residual.initialize(z)
    indices = residual.eval()(z).indices
    errors = [float((residual.codes_of(indices[:, :q]).detach() - z).square().mean()) for q in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_trains_with_gradients_to_all_parameters(residual: ResidualQuantizer) -> None:
    z = sequences().requires_grad_()
    out = residual(z, seed())
    (out.quantized.square().mean() + out.loss).backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in residual.parameters() if p.requires_grad)
    assert not any(metric.requires_grad for metric in out.metrics.values())


def test_the_seed_decides_and_quantizers_have_noise_of_their_own() -> None:
    torch.manual_seed(0)
    residual = ResidualQuantizer([RegularizedQuantizer(N, D, mask_ratio=0.5)] * 3)
    a, b, c = (copy.deepcopy(residual)(sequences(), seed(value)) for value in (5, 5, 6))
    assert equal(a, b)
    assert not torch.equal(a.mask, c.mask)
    assert not torch.equal(a.mask[:, 0], a.mask[:, 1])
    step = residual.quantizers[0].last_seed
    residual(sequences(), seed(5))
    assert step == 5  # a shared quantizer takes its calls for micro-batches of one step


def test_a_batch_split_over_ranks_gives_the_same_codes(residual: ResidualQuantizer) -> None:
    residual = ResidualQuantizer(list(residual.quantizers), dropout=(1, 3))
    residual.freeze()  # averages are those of what a process sees
    z = sequences(batch=4)
    halves = [copy.deepcopy(residual)(z[k : k + 2], seed(), 20 * k).indices for k in (0, 2)]
    assert torch.equal(torch.cat(halves), copy.deepcopy(residual)(z, seed()).indices)


@pytest.mark.parametrize("name", BUILDERS)
def test_dropped_quantizers_do_nothing(name: str) -> None:
    torch.manual_seed(0)
    quantizers = [BUILDERS[name]() for _ in range(3)]
    first = ResidualQuantizer(copy.deepcopy(quantizers[:2]))
    residual = ResidualQuantizer(quantizers, dropout=(2,))
    before = copy.deepcopy(quantizers[2].state_dict())
    for step in (0, 1):
        out, expected = (module(padded(sequences(), VALID), seed(step), valid=VALID) for module in (residual, first))
        torch.testing.assert_close((out.quantized, out.loss), (expected.quantized, expected.loss))
        assert torch.equal(out.indices[:, :2], expected.indices)
        assert (out.indices[:, 2] == -1).all()
        assert out.metrics["num_used"] == 2
        torch.testing.assert_close(residual.codes_of(out.indices), residual.codes_of(out.indices[:, :2]))
    torch.testing.assert_close(first.state_dict(), ResidualQuantizer(quantizers[:2]).state_dict())
    after = quantizers[2].state_dict()
    of_a_step = {"last_seed", "micro_batches"}
    assert all(torch.equal(after[key], value) for key, value in before.items() if key not in of_a_step)
    assert (residual.eval()(sequences()).indices >= 0).all()


def test_steps_use_each_number_of_quantizers_as_often_as_it_is_given(three: list[NearestQuantizer]) -> None:
    residual = ResidualQuantizer(three, dropout=(1, 3, 3, 2))
    z = sequences(batch=1, length=1)
    numbers = [int(residual(z, seed(step)).metrics["num_used"]) for step in range(400)]
    counts = torch.tensor([numbers.count(number) for number in (1, 2, 3)])
    expected = torch.tensor([100, 100, 200])
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8  # chi-square of 2 degrees of freedom, 0.1 %
    assert torch.equal(
        (residual(z, seed(9)).indices[0, :, 0] >= 0).sum(), residual(z, seed(9)).metrics["num_used"].long()
    )


def test_16_bit_latents_leave_residuals_in_fp32(three: list[NearestQuantizer]) -> None:
    residual = ResidualQuantizer(three).eval()
    z = sequences().bfloat16()
    out = residual(z)
    assert out.quantized.dtype == torch.float32
    torch.testing.assert_close(out.quantized, residual.codes_of(out.indices))


@pytest.mark.parametrize("shared", [False, True])
def test_compiles_as_one_graph(shared: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    quantizers = [EMAQuantizer(N, D)] * 2 if shared else [EMAQuantizer(N, D), RegularizedQuantizer(N, D)]
    residual = ResidualQuantizer(quantizers, dropout=(1, 2))
    compiled = torch.compile(copy.deepcopy(residual), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (1, 2, 3):
            z = sequences().requires_grad_()
            out, expected = compiled(z, seed(step), valid=VALID), residual(z, seed(step), valid=VALID)
            assert torch.equal(out.indices, expected.indices)
            torch.testing.assert_close((out.quantized, out.loss), (expected.quantized, expected.loss))
            (out.quantized.sum() + out.loss).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantizers": []}, r"quantizers must be given.*\[\]"),
        ({"quantizers": [NearestQuantizer(N, D), NearestQuantizer(N, 4)]}, r"code_dim.*\(4, False\), \(8, False\)"),
        ({"dropout": (0, 1)}, r"dropout .*1, \.\.\., 1.*\(0, 1\)"),
        ({"dropout": (2,)}, r"dropout .*\(2,\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualQuantizer(**({"quantizers": [NearestQuantizer(N, D)]} | arguments))


@pytest.mark.parametrize("quantizers", [0, 4])
def test_tokens_of_more_quantizers_than_there_are_are_refused(three: list[NearestQuantizer], quantizers: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to 3.*\(2, {quantizers}, 5\)"):
        ResidualQuantizer(three).codes_of(torch.zeros(2, quantizers, 5, dtype=torch.int64))


# --------------------------------------------------------------------------------------- vector-quantize-pytorch


def theirs(**options):
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    settings = {"dim": D, "codebook_size": N, "num_quantizers": 3, "rotation_trick": False, "eps": 0.0}
    return library.ResidualVQ(**settings | options)


LEARNED = {"learnable_codebook": True, "ema_update": False}


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "padded"])
@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"quant_grad_frac": 1.0}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_learned_codebooks_are_those_of_residual_vq(options, training: bool, valid: Tensor | None) -> None:
    library = theirs(**LEARNED, **options).train(training)
    codebooks = [codes.detach().clone() for codes in library.codebooks]
    different = codebooks[:1] if "shared_codebook" in options else codebooks
    quantizers = [NearestQuantizer(N, D, commitment=1.0, channels_last=True) for _ in different]
    for quantizer, codes in zip(quantizers, different, strict=True):
        quantizer.embedding.weight.data.copy_(codes)
    ours = ResidualQuantizer(quantizers * (3 // len(quantizers)), chain_rule="quant_grad_frac" in options).train(
        training
    )

    z, x = (sequences().movedim(1, 2).clone().requires_grad_() for _ in range(2))
    out = ours(z, seed(), valid=valid)
    quantized, indices, losses = library(x, mask=valid)
    assert torch.equal(out.indices, indices.movedim(-1, 1))
    torch.testing.assert_close(out.quantized, quantized)
    weight = torch.randn_like(quantized)
    if training:  # their loss is ours once, without a detached side: half the value, the same gradients
        torch.testing.assert_close(out.loss, 2 * losses.sum())
    loss, their_loss = (out.quantized * weight).sum() + out.loss, (quantized * weight).sum()
    if training:
        their_loss = their_loss + losses.sum()
        (of_z, *of_codes), (of_x, *of_embed) = (
            torch.autograd.grad(loss, [z, *ours.parameters()]),
            torch.autograd.grad(their_loss, [x, *dict.fromkeys(library.parameters())]),
        )
        torch.testing.assert_close(of_z, of_x)
        torch.testing.assert_close(torch.stack(of_codes), torch.cat(of_embed))


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "padded"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("used", [2, 3])
def test_moving_averages_are_those_of_residual_vq(shared: bool, valid: Tensor | None, used: int) -> None:
    """In three steps; their sums count rows, ours have fractions of them. Dropout leaves out the same quantizer."""
    library = theirs(shared_codebook=shared, decay=0.8, quantize_dropout=used < 3, commitment_weight=0.25)
    rows = 60 if valid is None else int(valid.sum())
    quantizers = []
    for codes in library.codebooks[: 1 if shared else 3]:
        quantizer = EMAQuantizer(N, D, decay=0.8, dead_threshold=0, channels_last=True)
        quantizer.embedding.weight.data.copy_(codes)
        quantizer.cluster_share.fill_(1 / rows)
        quantizer.cluster_sum.copy_(codes / rows)
        quantizers.append(quantizer)
    ours = ResidualQuantizer(quantizers * (3 // len(quantizers)), dropout=(used,))
    dropping = next(number for number in itertools.count() if random.Random(number).randrange(0, 3) == used - 1)
    for step in range(3):
        z, x = (torch.randn(3, 20, D, generator=torch.Generator().manual_seed(step)).requires_grad_() for _ in range(2))
        out: QuantizerOutput = ours(z, seed(step), valid=valid)
        quantized, indices, losses = library(x, mask=valid, rand_quantize_dropout_fixed_seed=dropping)
        assert torch.equal(out.indices, indices.movedim(-1, 1))
        torch.testing.assert_close((out.quantized, out.loss), (quantized, losses.sum()))
        gradients = [
            torch.autograd.grad(q.square().sum() + loss.sum(), leaf)[0]
            for q, loss, leaf in ((out.quantized, out.loss, z), (quantized, losses, x))
        ]
        torch.testing.assert_close(*gradients)
        for quantizer, codes in zip(quantizers, library.codebooks, strict=False):
            torch.testing.assert_close(quantizer.embedding.weight.detach(), codes)
