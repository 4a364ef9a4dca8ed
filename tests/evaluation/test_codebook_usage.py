import math

import pytest
import torch

from regvq_fast.evaluation.codebook import CodebookUsage, entropy_bits, perplexity, utilization


def test_counts_worked_by_hand():
    usage = CodebookUsage(4)
    usage.update(torch.tensor([[0, 0], [1, 3]]))
    usage.update(torch.tensor([0, 0, 1, 3]))
    assert usage.counts.tolist() == [4, 2, 0, 2]
    assert usage.counts.dtype == torch.int64
    assert float(usage.utilization()) == 0.75
    # Frequencies 1/2, 1/4, 1/4: entropy 1.5 log 2.
    assert float(usage.perplexity()) == pytest.approx(2**1.5, rel=1e-12)


def test_reset_begins_a_new_window():
    usage = CodebookUsage(3)
    usage.update(torch.tensor([2, 2]))
    usage.reset()
    assert usage.counts.tolist() == [0, 0, 0]
    usage.update(torch.tensor([1]))
    assert (float(usage.utilization()), float(usage.perplexity())) == (pytest.approx(1 / 3), 1.0)


def test_extremes():
    assert float(perplexity(torch.full((1000,), 7))) == pytest.approx(1000, rel=1e-12)
    assert float(perplexity(torch.tensor([0, 9, 0]))) == 1
    assert (float(perplexity(torch.zeros(5, dtype=torch.int64))), float(utilization(torch.zeros(5)))) == (0, 0)
    large = torch.tensor([2**40, 2**40])
    assert float(perplexity(large)) == pytest.approx(2, rel=1e-12)


def test_entropy_in_bits_by_hand():
    counts = torch.tensor([[2, 1, 1], [0, 4, 0], [0, 0, 0]])
    assert entropy_bits(counts).tolist() == pytest.approx([1.5, 0, 0])


def test_random_counts_against_bincount():
    indices = torch.randint(0, 50, (8, 16, 16), generator=torch.Generator().manual_seed(0))
    usage = CodebookUsage(64)
    usage.update(indices)
    assert torch.equal(usage.counts, indices.flatten().bincount(minlength=64))
    frequencies = [count / indices.numel() for count in usage.counts.tolist() if count]
    assert float(usage.perplexity()) == pytest.approx(math.exp(-sum(f * math.log(f) for f in frequencies)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"num_codes .*\b0$"):
        CodebookUsage(0)
    with pytest.raises(RuntimeError):
        CodebookUsage(4).update(torch.tensor([4]))
