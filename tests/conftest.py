"""Fixtures that tests of several modules share. Plain functions that they share are in `helpers`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")


@pytest.fixture
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in place of the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of feature networks neither from the user's cache nor from the network; the empty cache's folder."""
    from regvq_fast.evaluation import feature_nets
    from regvq_fast.models import features
    from regvq_fast.models.weights import RemoteWeights

    nowhere = RemoteWeights("http://127.0.0.1:9/weights.pth", "0000")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for net in features.IMAGENET_WEIGHTS:
        monkeypatch.setitem(features.IMAGENET_WEIGHTS, net, nowhere)
    monkeypatch.setattr(feature_nets, "INCEPTION_WEIGHTS", nowhere)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def few_regions() -> Iterator[None]:
    """Fit the classifier of regions to 128 scenes, enough for every class: 768 of them take twelve seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regvq_fast.scenes.evaluation.FITTED_TO", 128)
        yield
