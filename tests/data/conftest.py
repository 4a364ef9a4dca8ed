"""Fixtures that several tests of data sets share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def gradients(tmp_path):
    """Two wide images, red rising to the right and green to the bottom."""
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(128) * 2
    pixels[..., 1] = np.arange(64)[:, None] * 4
    for k in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    return tmp_path


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of ``datasets``, which asks no hub."""
    from helpers.hugging_face import quiet_datasets

    quiet_datasets(monkeypatch, tmp_path_factory.mktemp("cache"))
