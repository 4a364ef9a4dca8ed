"""The stochastic mask: its ratio, its uniformity over positions, and ranks that split a batch."""

import math

import pytest
import torch
from helpers.quantizer_cases import D, N, maps, seed

from regvq_fast.quantizers import RegularizedQuantizer
from regvq_fast.quantizers.mask import stochastic_mask


def test_reg_vq_masks_exactly_the_share_of_every_image_and_redraws_it() -> None:
    quantizer = RegularizedQuantizer(N, D, mask_ratio=0.4)
    first, second = quantizer(maps(), seed(1)), quantizer(maps(), seed(2))
    assert (first.mask.flatten(1).sum(1) == math.floor(0.4 * 20)).all()
    assert not torch.equal(first.mask[0], first.mask[1])
    assert not torch.equal(first.mask, second.mask)
    assert (first.perturbation[~first.mask] == 0).all()


def test_a_mask_of_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode .*'random'$"):
        stochastic_mask(2, 20, 0.4, seed(), mode="random")


def test_bernoulli_mask_has_its_ratio_on_average() -> None:
    mask = stochastic_mask(100, 1000, 0.3, seed(), mode="bernoulli")
    assert abs(mask.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1e5)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_a_batch_split_over_ranks_draws_the_same_mask(mode: str) -> None:
    whole = stochastic_mask(4, 20, 0.4, seed(), mode=mode)
    parts = [stochastic_mask(2, 20, 0.4, seed(), mode=mode, row_offset=offset) for offset in (0, 40)]
    assert torch.equal(whole, torch.cat(parts))


def test_every_position_is_masked_equally_often() -> None:
    counts = torch.stack([stochastic_mask(50, 16, 0.25, seed(s)).view(50, 16).sum(0) for s in range(40)]).sum(0)
    expected = 2000 * 0.25
    # Chi-square with 15 degrees of freedom; draws without replacement vary less than independent ones.
    assert float(((counts - expected) ** 2 / (expected * 0.75)).sum()) < 37.7
