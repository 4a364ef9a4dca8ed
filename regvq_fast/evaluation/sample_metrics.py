"""Inception Score, and precision and recall, of the features of images.

Inception Score: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", NeurIPS
2016. Precision and recall: Kynkäänniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric for
Assessing Generative Models", NeurIPS 2019. Both as the evaluation suite of ADM (Dhariwal and Nichol, "Diffusion Models
Beat GANs on Image Synthesis", NeurIPS 2021) defines them. All sums are float64.
"""

import math

import torch
from torch import Tensor

NEIGHBORS = 3
"""k of the balls of precision and recall."""
SPLIT = 5000
"""Images of one Inception Score; the score of more images is the mean over splits of this size."""
_BLOCK = 4096
"""Rows and columns of a block of distances: 128 MiB in float64, and as much for 2048 features of both sides."""


def inception_score(features: Tensor, classifier: Tensor, split: int = SPLIT) -> float:
    """Return the mean, over splits of consecutive images, of exp(mean KL divergence of p(y|x) from p(y)).

    Images sorted by class score lower, since each split then has few classes.

    Args:
        features: (M, K), M >= 1.
        classifier: (C, K), weights of the classes' logits, without a bias.
        split: images per split; the last one may have fewer.
    """
    scores = []
    for rows in features.split(split):
        log_p = torch.cat([(part.double() @ classifier.double().T).log_softmax(1) for part in rows.split(_BLOCK)])
        p = log_p.exp()
        marginal = torch.special.entr(p.mean(0)).sum()
        scores.append(math.exp(float(marginal - torch.special.entr(p).sum(1).mean())))
    return sum(scores) / len(scores)


def precision_and_recall(
    reference: Tensor, samples: Tensor, neighbors: int = NEIGHBORS, block: int = _BLOCK
) -> tuple[float, float]:
    """Return the fraction of samples in the reference's manifold, and of the reference in the samples' manifold.

    The manifold of a set is a union of balls: around each feature vector, up to its k-th nearest neighbour in the set.
    Distances are computed in blocks, so memory is linear in the number of images.

    Args:
        reference: (M, K).
        samples: (N, K), on the same device.
        neighbors: k.
        block: rows and columns of a block of distances.

    Raises:
        ValueError: a set of at most ``neighbors`` rows.
    """
    if (fewest := min(len(reference), len(samples))) <= neighbors:
        raise ValueError(f"precision and recall need at least {neighbors + 1} images on both sides, got {fewest}")
    precision = _covered(samples, reference, _radii(reference, neighbors, block), block)
    recall = _covered(reference, samples, _radii(samples, neighbors, block), block)
    return precision, recall


def _radii(features: Tensor, neighbors: int, block: int) -> Tensor:
    """Return the squared distances (M,) float64 to the k-th nearest of the other rows."""
    radii = []
    for rows in features.split(block):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=features.device)
        for columns in features.split(block):
            nearest = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            nearest = nearest.topk(min(neighbors + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, neighbors])  # the first is a row's distance to itself
    return torch.cat(radii)


def _covered(points: Tensor, centers: Tensor, radii: Tensor, block: int) -> float:
    """Return the fraction of points that lie in a ball."""
    count = 0
    for rows in points.split(block):
        covered = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, reach in zip(centers.split(block), radii.split(block), strict=True):
            covered |= (_squared_distances(rows, columns) <= reach).any(dim=1)
        count += int(covered.sum())
    return count / len(points)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the squared distances (B, C) float64 of rows (B, K) and columns (C, K)."""
    rows, columns = rows.double(), columns.double()
    products = torch.addmm(columns.square().sum(1), rows, columns.T, alpha=-2)
    return products.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)
