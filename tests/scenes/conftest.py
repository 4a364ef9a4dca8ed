import pytest

from regvq_fast.scenes import RegionClassifier, ScenesDataset


@pytest.fixture(scope="session")
def classifier() -> RegionClassifier:
    """A classifier of regions, which no test changes."""
    return RegionClassifier.fit(ScenesDataset("train", 64), samples=384)
