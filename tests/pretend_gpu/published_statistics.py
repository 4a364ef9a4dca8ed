"""Compares features on the pretend GPU with published statistics, which are on the CPU, as on the CPU alone."""

import torch

from regvq_fast.evaluation.fid import FeatureStatistics, Moments, frechet_distance

torch.manual_seed(0)
features, reference = torch.rand(2, 20, 4, dtype=torch.float64)
published = Moments(reference.mean(0), reference.T.cov())
distances = []
for device in ("cpu", "cuda"):
    statistics = FeatureStatistics.zeros(4, device)
    statistics.add(features.to(device))
    distances.append(frechet_distance(statistics, published))
assert distances[0] == distances[1] > 0
