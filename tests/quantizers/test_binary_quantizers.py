"""LFQ and BSQ: codes of signs, and entropies of a soft assignment to all of them."""

import itertools
import math

import pytest
import torch
from helpers.same_steps import largest_tensor
from torch import Tensor
from torch.special import entr

from regvq_fast.quantizers import BSQQuantizer, LFQQuantizer

BOTH = pytest.mark.parametrize("kind", [LFQQuantizer, BSQQuantizer], ids=["lfq", "bsq"])


def maps(code_dim: int, seed: int = 0) -> Tensor:
    return torch.randn(3, code_dim, 4, 5, generator=torch.Generator().manual_seed(seed))


def assignment(quantizer: LFQQuantizer, rows: Tensor) -> Tensor:
    """Softmax (M, N) of the negative squared distances, by its definition."""
    return (-torch.cdist(rows, quantizer.codes()).square() / quantizer.settings.temperature).softmax(1)


def terms(quantizer: LFQQuantizer, rows: Tensor) -> tuple[Tensor, Tensor]:
    metrics = quantizer.train()(rows.T.reshape(1, quantizer.code_dim, -1)).metrics
    return metrics["entropy"], metrics["entropy_of_mean"]


def test_the_first_channel_is_the_highest_bit() -> None:
    quantizer = LFQQuantizer(8, 3).eval()
    z = torch.tensor([[0.3, -2.0, 0.1], [-0.1, -0.1, 5.0], [0.0, 1.0, -0.0]]).T.view(1, 3, 3)
    out = quantizer(z)
    assert out.indices.tolist() == [[0b101, 0b001, 0b010]]
    expected = torch.tensor([[1.0, -1, 1], [-1, -1, 1], [-1, 1, -1]]).T.view(1, 3, 3)
    assert torch.equal(out.quantized, expected)
    assert torch.equal(quantizer.codes_of(out.indices), expected)
    assert torch.equal(quantizer.codes()[5], torch.tensor([1.0, -1, 1]))
    torch.testing.assert_close(out.loss, 0.25 * (expected - z).square().mean())


def test_bsq_is_lfq_on_the_unit_sphere() -> None:
    quantizer = BSQQuantizer(16, 4, commitment=1.0, entropy_weight=0.0)
    z = maps(4).requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, LFQQuantizer(16, 4)(z).indices)
    torch.testing.assert_close(out.quantized, z.detach().sign() / 2)
    unit = z / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(out.loss, (z.detach().sign() / 2 - unit).square().mean())
    upstream = torch.randn_like(z)
    (found,) = torch.autograd.grad(out.quantized, z, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(unit, z, upstream)[0])


@BOTH
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_losses_and_gradients_are_those_of_vector_quantize_pytorch(kind, bits: int) -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    weights = {"entropy_weight": 0.3, "diversity": 0.7, "commitment": 0.6, "temperature": 1.5}
    ours = kind(2**bits, bits, group_bits=14, **weights)
    theirs = library.LFQ(
        dim=bits,
        entropy_loss_weight=0.3,
        diversity_gamma=0.7,
        commitment_loss_weight=0.6,
        spherical=kind is BSQQuantizer,
    )
    # So small that every probability is above 1e-5, where the library stops to take logarithms.
    z = (0.3 * maps(bits)).requires_grad_()
    out = ours(z)
    expected, parts = theirs(z, inv_temperature=1 / 1.5, return_loss_breakdown=True)
    torch.testing.assert_close(out.quantized, expected.quantized)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.loss, expected.entropy_aux_loss)
    torch.testing.assert_close(out.metrics["entropy"], parts.per_sample_entropy.detach())
    torch.testing.assert_close(out.metrics["entropy_of_mean"], parts.batch_entropy.detach())
    torch.testing.assert_close(out.metrics["commitment"], parts.commitment.detach())
    weight = torch.randn_like(z)
    found = torch.autograd.grad((out.quantized * weight).sum() + out.loss, z)
    torch.testing.assert_close(
        found, torch.autograd.grad((expected.quantized * weight).sum() + expected.entropy_aux_loss, z)
    )
    assert torch.equal(ours.codes_of(out.indices), theirs.indices_to_codes(out.indices))


@BOTH
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_entropies_are_those_of_the_softmax_over_all_codes(kind, temperature: float) -> None:
    quantizer = kind(64, 6, temperature=temperature).double()
    rows = torch.randn(50, 6, dtype=torch.float64)
    entropy, of_mean = terms(quantizer, rows)
    p = assignment(quantizer, quantizer._bounded(rows))
    torch.testing.assert_close(entropy, entr(p).sum(1).mean())
    torch.testing.assert_close(of_mean, entr(p.mean(0)).sum())


@pytest.mark.parametrize("group_bits", [1, 2, 4, 5])
def test_groups_keep_the_rows_entropy_and_bound_the_means(group_bits: int) -> None:
    rows = torch.randn(40, 6, dtype=torch.float64)
    whole, groups = (LFQQuantizer(64, 6, temperature=1.0, group_bits=bits).double() for bits in (6, group_bits))
    (entropy, of_mean), (found, bound) = terms(whole, rows), terms(groups, rows)
    torch.testing.assert_close(found, entropy)
    assert bound > of_mean + 1e-3  # the bits of these rows depend on each other
    independent = torch.tensor(list(itertools.product(*torch.randn(6, 2).tolist()))).double()
    torch.testing.assert_close(terms(groups, independent), terms(whole, independent))


def test_the_entropies_of_single_bits_are_the_papers() -> None:
    quantizer = BSQQuantizer(2**5, 5, group_bits=1, commitment=0.0, entropy_weight=1.0, diversity=2.0).double()
    rows = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    out = quantizer(rows.T.reshape(1, 5, 30))
    unit = rows / rows.norm(dim=1, keepdim=True)
    p = torch.sigmoid(4 * unit / math.sqrt(5))  # of a set bit: the softmax of 2 u c of two codes

    def entropy(p: Tensor) -> Tensor:
        return (entr(p) + entr(1 - p)).sum(-1)

    expected = entropy(p).mean() - 2 * entropy(p.mean(0))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, rows), torch.autograd.grad(expected, rows))


@BOTH
def test_far_latents_have_finite_gradients(kind) -> None:
    """Assignments of zero have no logarithm."""
    quantizer, z = kind(2**10, 10, temperature=1e-3), (1e3 * maps(10)).requires_grad_()
    assert (assignment(quantizer, quantizer._latents(z)).mean(0) == 0).any()
    (gradient,) = torch.autograd.grad(quantizer(z).loss, z)
    assert torch.isfinite(gradient).all()


@BOTH
def test_entropy_terms_are_of_training_and_of_their_weight_alone(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("regvq_fast.quantizers.lfq.softmax_statistics", lambda *_, **__: pytest.fail("computed"))
        off = kind(16, 4, entropy_weight=0.0)(maps(4))
        evaluated = kind(16, 4).eval()(maps(4))
    assert set(off.metrics) == set(evaluated.metrics) == {"commitment"}
    assert "entropy" in kind(16, 4)(maps(4)).metrics


@BOTH
def test_a_step_with_a_quarter_of_a_million_codes_has_no_row_for_each(kind) -> None:
    quantizer = kind(2**18, 18)
    assert largest_tensor(quantizer, maps(18)) <= 2**9 * 9
    out = quantizer.eval()(maps(18))
    torch.testing.assert_close(quantizer.codes_of(out.indices), out.quantized)
    assert torch.equal(quantizer.best_codes(maps(18)), out.indices)


@BOTH
def test_latents_that_are_not_finite_are_refused(kind) -> None:
    z = maps(4)
    z[1, 2, 3, 1] = math.nan
    with pytest.raises(FloatingPointError, match="non-finite"):
        kind(16, 4).eval()(z)


@BOTH
@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ((1000, 9), {}, "num_codes .*1000: use 512 or 1024$"),
        ((1, 1), {}, "1: use 2 or 4$"),
        ((16, 8), {}, "code_dim=4 .*16 and 8$"),
        ((16, 4), {"temperature": 0.0}, r"temperature .*\b0\.0$"),
        ((16, 4), {"temperature": math.nan}, "temperature .*nan$"),
        ((16, 4), {"entropy_weight": -1.0}, r"entropy_weight .*-1\.0$"),
        ((16, 4), {"diversity": math.nan}, "diversity .*nan$"),
        ((16, 4), {"commitment": -1.0}, r"commitment .*-1\.0$"),
        ((16, 4), {"group_bits": 0}, r"group_bits .*\b0$"),
    ],
)
def test_sizes_and_settings_that_do_not_fit_are_refused(kind, sizes, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*sizes, **arguments)
