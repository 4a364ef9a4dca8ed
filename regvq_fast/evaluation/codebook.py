"""Usage of a codebook."""

import math

import torch
from torch import Tensor


def utilization(counts: Tensor) -> Tensor:
    """Return the fraction of the codes that were counted at least once.

    Args:
        counts: (N,) integers >= 0.

    Returns:
        () float64, 0..1.
    """
    return (counts > 0).double().mean()


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of the code frequencies: the size of a uniformly used codebook with the same entropy.

    Args:
        counts: (N,) integers >= 0.

    Returns:
        () float64, 1..N; 0 if nothing has been counted.
    """
    total = counts.sum()
    frequencies = counts.double() / total.clamp(min=1)
    return torch.special.entr(frequencies).sum().exp() * (total > 0)


def entropy_bits(counts: Tensor) -> Tensor:
    """Return the entropy of code frequencies in bits.

    With few selections this underestimates: it is at most log2 of their number.

    Args:
        counts: (..., N) integers >= 0.

    Returns:
        (...) float64, 0..log2(N); 0 if nothing has been counted.
    """
    frequencies = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(frequencies).sum(-1) / math.log(2)


class CodebookUsage:
    """Counts how often each code is selected over a window of training or evaluation.

    Results are tensors on the device: only reading one, as by ``float(...)``, synchronizes. Counts are exact and
    deterministic (int64).

    Args:
        num_codes: N, at least 1; ValueError otherwise.
        device: of the indices.
    """

    def __init__(self, num_codes: int, device: torch.device | str = "cpu") -> None:
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1, got {num_codes}")
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        """(N,) int64, selections of each code since the last reset."""

    def update(self, indices: Tensor) -> None:
        """Count the codes in ``indices``: int64 of any shape, 0..N-1, on the device of the counts."""
        indices = indices.detach().reshape(-1)
        self.counts.scatter_add_(0, indices, torch.ones_like(indices))  # bincount would synchronize

    def utilization(self) -> Tensor:
        """Return the fraction of the codes selected in the window, () float64."""
        return utilization(self.counts)

    def perplexity(self) -> Tensor:
        """Return exp(entropy) of the frequencies in the window, () float64; 0 for an empty window."""
        return perplexity(self.counts)

    def reset(self) -> None:
        """Begin a new window."""
        self.counts.zero_()
