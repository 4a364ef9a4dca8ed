"""The chain, its posterior and the bound beside explicit matrices; the draws beside their probabilities."""

import math

import pytest
import torch
from torch import Tensor

from regvq_fast.priors.diffusion import loss as module
from regvq_fast.priors.diffusion.loss import DiffusionTerms, MaskAndReplace, diffusion_terms

N, T = 5, 10
# VQ-Diffusion's hardly replaces a code; the other one does so often.
CHAINS = {
    "vq-diffusion": MaskAndReplace(N, T),
    "replacing": MaskAndReplace(N, T, alpha_bar=(0.9, 0.05), gamma_bar=(0.05, 0.8)),
}
SEED = torch.tensor(5)


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> MaskAndReplace:
    return CHAINS[request.param]


def explicit_matrix(stay: Tensor, replace: Tensor, mask: Tensor) -> Tensor:
    """[to, from], (N + 1, N + 1), of the chances to stay (besides replacement), to be any code, to be masked."""
    matrix = torch.zeros(N + 1, N + 1, dtype=torch.float64)
    matrix[:N, :N] = stay * torch.eye(N, dtype=torch.float64) + replace
    matrix[N, :N] = mask
    matrix[N, N] = 1
    return matrix


def product(chain: MaskAndReplace, s: int, t: int) -> Tensor:
    """q(x_t | x_s) as the product of the matrices of its single steps."""
    matrix = torch.eye(N + 1, dtype=torch.float64)
    for step in range(s + 1, t + 1):
        matrix = explicit_matrix(*chain.between(torch.tensor(step - 1), torch.tensor(step))) @ matrix
    return matrix


def explicit_posterior(chain: MaskAndReplace, s: int, t: int) -> Tensor:
    """q(x_s = k | x_t = i, x_0 = y) as [i, y, k], (N + 1, N, N + 1), by Bayes' rule on the products."""
    from_start, step, whole = product(chain, 0, s), product(chain, s, t), product(chain, 0, t)
    return step[:, None, :] * from_start.T[None, :N, :] / whole[:, :N, None]


def noisy_tokens() -> Tensor:
    """Each value of x_t once, (1, N + 1)."""
    return torch.arange(N + 1)[None]


# --- the chain -------------------------------------------------------------------------------------------------------


def test_schedule_hits_its_end_points() -> None:
    chain = MaskAndReplace(1024)
    alpha, beta, gamma = chain.cumulative(torch.tensor([0, 1, 100]))
    assert alpha.tolist() == [1, 0.99999, pytest.approx(0.000009, rel=1e-10)]
    assert gamma.tolist() == [0, 0.000009, pytest.approx(0.99999, rel=1e-12)]
    torch.testing.assert_close(alpha + 1024 * beta + gamma, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_marginals_are_products_of_the_steps_matrices(chain: MaskAndReplace) -> None:
    for t in range(T + 1):
        closed = explicit_matrix(*chain.cumulative(torch.tensor(t)))
        torch.testing.assert_close(closed, product(chain, 0, t), rtol=0, atol=1e-14)
        torch.testing.assert_close(closed.sum(0), torch.ones(N + 1, dtype=torch.float64), rtol=0, atol=1e-14)


def test_posterior_is_bayes_rule_on_the_matrices_for_any_two_steps(chain: MaskAndReplace) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, N + 1, N, dtype=torch.float64)
    start = logits.softmax(-1)[0]
    for t in range(1, T + 1):
        for s in range(t):
            expected = torch.einsum("iy,iyk->ik", start, explicit_posterior(chain, s, t))
            posterior = chain.log_posterior(logits, noisy_tokens(), torch.tensor(s), torch.tensor(t)).exp()[0]
            torch.testing.assert_close(posterior, expected, rtol=0, atol=1e-13)


def test_posterior_of_a_certain_start_is_the_true_one(chain: MaskAndReplace) -> None:
    certain = torch.full((1, N + 1, N), -torch.inf, dtype=torch.float64)
    certain[..., 2] = 0
    posterior = chain.log_posterior(certain, noisy_tokens(), torch.tensor(3), torch.tensor(7)).exp()[0]
    torch.testing.assert_close(posterior, explicit_posterior(chain, 3, 7)[:, 2], rtol=0, atol=1e-14)


def test_terminal_kl(chain: MaskAndReplace) -> None:
    marginal = product(chain, 0, T)[:, 0]
    prior = torch.cat([((1 - marginal[N]) / N).expand(N), marginal[N:]])
    assert chain.terminal_kl() == pytest.approx((marginal * (marginal / prior).log()).sum().item(), rel=1e-6)


# --- the bound -------------------------------------------------------------------------------------------------------


def test_bound_is_the_kl_of_explicit_posteriors_and_the_decoders_likelihood(chain: MaskAndReplace) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(N + 1, 1, N, dtype=torch.float64)
    noisy = noisy_tokens().T
    start = logits.softmax(-1)[:, 0]
    for t in range(1, T + 1):
        posterior = explicit_posterior(chain, t - 1, t)
        predicted = torch.einsum("iy,iyk->ik", start, posterior)
        for y in range(N):
            terms = diffusion_terms(chain, logits, torch.full_like(noisy, y), noisy, torch.full((N + 1,), t))
            true = posterior[:, y]
            expected = (torch.special.xlogy(true, true) - torch.special.xlogy(true, predicted)).sum(-1)
            torch.testing.assert_close(terms.bound, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(terms.cross_entropy, -start[:, y].log(), rtol=1e-12, atol=1e-12)
            if t == 1:
                torch.testing.assert_close(terms.bound, terms.cross_entropy, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bound_is_zero_for_a_perfect_prediction_and_never_negative(dtype: torch.dtype) -> None:
    chain, length = MaskAndReplace(512, 100), 4
    t = torch.arange(1, 101)
    tokens = torch.randint(512, (100, length), generator=torch.Generator().manual_seed(0))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    noises = {
        "drawn": chain.corrupt(tokens, t, SEED),
        "masked": torch.full_like(tokens, 512),
        "right": tokens,
        "wrong": (tokens + 1) % 512,
    }
    for name, noisy in noises.items():
        certain = torch.full((100, length, 512), -torch.inf, dtype=dtype).scatter_(2, tokens[..., None], 0.0)
        terms = diffusion_terms(chain, certain, tokens, noisy, t)
        assert terms.bound.abs().max() <= tolerance, name
        assert terms.cross_entropy.abs().max() <= tolerance
        for scale in (0.1, 5.0, 50.0):
            logits = scale * torch.randn(100, length, 512, dtype=dtype, generator=torch.Generator().manual_seed(1))
            bound = diffusion_terms(chain, logits, tokens, noisy, t).bound
            assert bound.isfinite().all()
            assert bound.min() >= -tolerance, (name, scale)


def hard_case(num_codes: int = 1024) -> tuple[MaskAndReplace, Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, L, N) from flat to near certain, right and wrong, at early, middle and late steps."""
    chain = MaskAndReplace(num_codes)
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 2, 50, 99, 100, 30])
    tokens = torch.randint(num_codes, (6, 8), generator=generator)
    logits = torch.randn(6, 8, num_codes, generator=generator) * torch.logspace(-1, 1, 8)[None, :, None]
    logits.scatter_(2, tokens[..., None], 12.0)
    noisy = chain.corrupt(tokens, t, SEED)
    noisy[:, :2] = tokens[:, :2]
    noisy[:, 2] = (tokens[:, 2] + 1) % num_codes
    return chain, logits, tokens, noisy, t


def test_fp32_and_bf16_logits_have_fp32_grade_terms_and_gradients() -> None:
    chain, logits, tokens, noisy, t = hard_case()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = logits.to(dtype)
        results = []
        for given in (inputs, inputs.double()):
            given = given.requires_grad_()
            terms = diffusion_terms(chain, given, tokens, noisy, t)
            loss = terms.bound.sum() + terms.cross_entropy.sum()
            results.append((terms.bound.double(), terms.cross_entropy.double(), *torch.autograd.grad(loss, given)))
        (bound, entropy, gradient), (true_bound, true_entropy, true_gradient) = results
        torch.testing.assert_close(bound, true_bound, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, true_entropy, rtol=1e-5, atol=1e-5)
        assert gradient.dtype == dtype
        rounding = 0.0 if dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4 + rounding, atol=1e-6)


def test_gradient_is_that_of_the_log_posteriors_kl(chain: MaskAndReplace) -> None:
    torch.manual_seed(1)
    t = torch.tensor([1, 2, 4, 7, 9, 10])
    tokens = torch.randint(N, (6, 8))
    noisy = torch.randint(N + 1, (6, 8))
    logits = torch.randn(6, 8, N, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, dtype=torch.float64)
    terms = diffusion_terms(chain, logits, tokens, noisy, t)
    (gradient,) = torch.autograd.grad((weights * terms.bound).sum() + terms.cross_entropy.sum(), logits)

    certain = torch.full_like(logits, -torch.inf).scatter_(2, tokens[..., None], 0.0)
    true = chain.log_posterior(certain, noisy, t - 1, t).exp()
    predicted = chain.log_posterior(logits, noisy, t - 1, t)
    bound = -(torch.where(true > 0, true, 0.0) * torch.where(true > 0, predicted, 0.0)).sum(-1).mean(1)
    entropy = -logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0].mean(1)
    (expected,) = torch.autograd.grad((weights * torch.where(t == 1, entropy, bound)).sum() + entropy.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_double_backward_is_refused() -> None:
    chain, logits, tokens, noisy, t = hard_case()
    loss = diffusion_terms(chain, logits.requires_grad_(), tokens, noisy, t).bound.sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_keeps_the_logits_and_nothing_else_of_their_size() -> None:
    chain, logits, tokens, noisy, t = hard_case()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        diffusion_terms(chain, logits.requires_grad_(), tokens, noisy, t)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()}
    assert large == {logits.data_ptr()}


def test_loss_weighs_by_probability_and_adds_the_auxiliary_term() -> None:
    terms = DiffusionTerms(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 5.0]))
    loss = terms.loss(torch.tensor([1, 6]), torch.tensor([0.5, 0.25]), num_steps=10, auxiliary_weight=0.1)
    assert loss.item() == pytest.approx(((2 + 0.1 * 2 * 3) / 0.5 + (4 + 0.1 * 1.5 * 5) / 0.25) / 2)


# --- draws -----------------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Return chi-square over its 1e-6 quantile (below 1 passes), for classes expected at least five times."""
    expected = probabilities * counts.sum()
    tested = expected >= 5
    assert counts[~tested].sum() <= 5 * (~tested).sum() + 10
    statistic = ((counts - expected).square() / expected)[tested].sum().item()
    freedom = int(tested.sum()) - 1
    return statistic / (freedom + 7 * math.sqrt(2 * freedom) + 20)


def test_corruption_has_the_marginals_probabilities(chain: MaskAndReplace) -> None:
    tokens = torch.full((T, 4000), 3)
    t = torch.arange(1, T + 1)
    noisy = chain.corrupt(tokens, t, SEED)
    for row, step in zip(noisy, t, strict=True):
        expected = explicit_matrix(*chain.cumulative(step))[:, 3]
        assert chi_square(row.bincount(minlength=N + 1).double(), expected) < 1


def test_draws_of_the_posterior_have_its_probabilities(chain: MaskAndReplace) -> None:
    s, t, count = 3, 8, 4000
    posterior = explicit_posterior(chain, s, t)
    for start in (0, 4):
        tokens = torch.full((N + 1, count), start)
        noisy = noisy_tokens().T.expand(-1, count)
        drawn = chain.sample_posterior(tokens, noisy, torch.tensor(s), torch.tensor(t), SEED)
        for i in range(N + 1):
            assert chi_square(drawn[i].bincount(minlength=N + 1).double(), posterior[i, start]) < 1


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_draws_at_the_start_are_the_tokens_whatever_the_words(
    chain: MaskAndReplace, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q(x_0 | x_t, x_0) has no other; the outermost words must not round beyond it."""
    monkeypatch.setattr(module, "row_words", lambda seed, rows, stream: torch.full_like(rows, word))
    tokens = torch.tensor([[2] * (N + 1)])
    for t in range(1, T + 1):
        drawn = chain.sample_posterior(tokens, noisy_tokens(), torch.tensor(0), torch.tensor(t), SEED)
        assert torch.equal(drawn, tokens)


def test_draws_depend_on_the_image_and_not_on_its_batch(chain: MaskAndReplace) -> None:
    tokens = torch.randint(N, (6, 9), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 3, 5, 7, 9, 10])
    whole = chain.corrupt(tokens, t, SEED)
    again = chain.sample_posterior(tokens, whole, t - 1, t, SEED)
    for part in (slice(0, 2), slice(2, 6)):
        noisy = chain.corrupt(tokens[part], t[part], SEED, first_image=part.start)
        torch.testing.assert_close(noisy, whole[part])
        back = chain.sample_posterior(tokens[part], noisy, t[part] - 1, t[part], SEED, first_image=part.start)
        torch.testing.assert_close(back, again[part])
    assert not torch.equal(chain.corrupt(tokens, t, SEED + 1), whole)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 1}, r"num_codes .*\b1$"),
        ({"num_steps": 1}, r"num_steps .*\b1$"),
        ({"alpha_bar": (0.1, 0.9)}, "alpha_bar must fall"),
        ({"gamma_bar": (0.0, 0.9)}, "gamma_bar rise"),
        ({"alpha_bar": (0.9, 0.2), "gamma_bar": (0.05, 0.9)}, "below 1"),
        ({"alpha_bar": (0.5, 0.09), "gamma_bar": (0.1, 0.9)}, "must not fall"),
    ],
)
def test_impossible_chains_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskAndReplace(**{"num_codes": 8, "num_steps": 10, **arguments})


def test_wrong_shapes_are_refused() -> None:
    chain, logits, tokens, noisy, t = hard_case(32)
    with pytest.raises(ValueError, match=r"logits .*\(B, L, 32\).*\(6, 8, 31\)"):
        diffusion_terms(chain, logits[..., 1:], tokens, noisy, t)
    with pytest.raises(ValueError, match=r"\(1,\)"):
        diffusion_terms(chain, logits, tokens, noisy, t[:1])
