import math

import pytest
import torch

from regvq_fast import ranks
from regvq_fast.losses import prior_kl
from regvq_fast.losses.prior import posterior_groups, scoped_posterior
from regvq_fast.ops import vector_quantize


def test_kl_of_hand_worked_posteriors() -> None:
    uniform, certain, half = [0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]
    posterior = torch.tensor([uniform, certain, half], dtype=torch.float64)
    values = [prior_kl(row.unsqueeze(0), rows=4).item() for row in posterior]
    assert values == pytest.approx([0, math.log(4), math.log(2)])
    assert prior_kl(posterior, rows=4).item() == pytest.approx(
        math.log(2)
    )  # the mean over groups: (0 + 2 + 1) log 2 / 3


def test_gradient_is_the_formulas_where_codes_are_used_and_that_of_half_a_row_where_not() -> None:
    posterior = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(prior_kl(posterior, rows=8), posterior)
    shares = torch.tensor([0.5, 0.25, 0.25, 1 / 16], dtype=torch.float64)
    expected = torch.log(4 * shares) + 1
    torch.testing.assert_close(gradient[0], expected)


def test_descending_the_kl_through_the_op_spreads_the_codes() -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(256, 4), torch.cat([torch.zeros(1, 4), 2 + torch.randn(15, 4)]).requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.05)
    before = prior_kl(vector_quantize(x, codes).posterior, rows=256).item()
    for _ in range(100):
        optimizer.zero_grad()
        prior_kl(vector_quantize(x, codes).posterior, rows=256).backward()
        optimizer.step()
    assert prior_kl(vector_quantize(x, codes).posterior, rows=256).item() < 0.5 * before


def test_scopes() -> None:
    assert [posterior_groups(scope, 6) for scope in ("image", "batch", "global")] == [6, 1, 1]
    posterior = torch.rand(1, 5)
    assert scoped_posterior(posterior, "global", 4) == (posterior, 4)  # one process


def _global_posterior(rank: int, file: str, results) -> None:  # type: ignore[no-untyped-def]
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    posterior = torch.tensor([[1.0 - rank, float(rank)]], requires_grad=True)
    mean, rows = scoped_posterior(posterior, "global", 1)
    prior_kl(mean, rows).backward()
    results[rank] = (mean.tolist(), posterior.grad.tolist())
    torch.distributed.destroy_process_group()


def test_global_scope_averages_the_posterior_over_ranks(tmp_path) -> None:  # type: ignore[no-untyped-def]
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_global_posterior, (str(tmp_path / "store"), results), nprocs=2)
    for rank in (0, 1):
        mean, gradient = results[rank]
        assert mean == [[0.5, 0.5]]
        # Both ranks' losses read every posterior: (log(2 * 0.5) + 1) / 2 from each.
        assert gradient == [[1.0, 1.0]]


@pytest.mark.parametrize("over_ranks", [ranks.mean_over_ranks, ranks.sum_over_ranks, ranks.gather_rows])
def test_what_ranks_tell_each_other_has_no_gradient_though_there_be_one_rank(over_ranks):
    value = torch.rand(2, 3, requires_grad=True)
    assert not over_ranks(value).requires_grad
    assert torch.equal(over_ranks(value), value)
