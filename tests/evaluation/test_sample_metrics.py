"""Inception Score, precision and recall against their definitions, written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from regvq_fast.evaluation.sample_metrics import inception_score, precision_and_recall


def features(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_inception_score_is_the_suites() -> None:
    images, classifier = features(23, 6, seed=0), features(5, 6, seed=1)
    logits = images.double().numpy() @ classifier.double().numpy().T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):  # the last split is a small one
        divergences = (part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    assert inception_score(images, classifier, split=10) == pytest.approx(np.mean(scores), rel=1e-12)


def test_extreme_inception_scores() -> None:
    sure = 1000 * torch.eye(4)  # probabilities of 0 and 1, of which the logarithm is infinite
    assert inception_score(sure.repeat(3, 1), torch.eye(4)) == pytest.approx(4)
    assert inception_score(sure[:1].repeat(3, 1), torch.eye(4)) == pytest.approx(1)
    assert inception_score(sure.repeat_interleave(3, dim=0), torch.eye(4), split=3) == pytest.approx(1)  # sorted


def literally(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """Every distance from a difference, one at a time."""

    def fraction(points: np.ndarray, centers: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(c - other) for other in centers)[k] for c in centers]
        inside = [any(np.linalg.norm(x - c) <= r for c, r in zip(centers, radii, strict=True)) for x in points]
        return float(np.mean(inside))

    return fraction(samples, reference), fraction(reference, samples)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(block: int, k: int) -> None:
    reference, samples = features(40, 3, seed=2), 0.6 * features(31, 3, seed=3) + 1
    found = precision_and_recall(reference, samples, k, block)
    assert found == literally(reference.double().numpy(), samples.double().numpy(), k)
    assert 0 < found[1] < found[0] < 1


def test_precision_and_recall_by_hand() -> None:
    line = torch.arange(6.0)[:, None]  # k = 3: the balls of the ends reach to 3, the others' radius is 2
    assert precision_and_recall(line, line + 0.5) == (1, 1)
    assert precision_and_recall(line, 3.5 + line) == (5 / 6, 5 / 6)  # 8.5 > 5 + 3
    assert precision_and_recall(line, 100 + line) == (0, 0)
    assert precision_and_recall(line, torch.full((4, 1), 2.5)) == (1, 0)  # equal samples: balls of radius 0
    # Far from the origin, float32 can't distinguish these.
    assert precision_and_recall(line + 1e4, line + 1e4 + 8.5) == (0, 0)
    with pytest.raises(ValueError, match=r"at least 4 images.*\b3$"):
        precision_and_recall(line, line[:3])
