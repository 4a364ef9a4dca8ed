"""Data sets of Hugging Face's library ``datasets``, of flat images."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.flat_images import encode_flat

IMAGE, TEXT, NUMBER = datasets.Image(), datasets.Value("string"), datasets.Value("int64")
ANIMALS = datasets.ClassLabel(names=["cat", "dog", "owl"])


def quiet_datasets(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let ``datasets`` keep its files in a folder, ask no hub, and show no progress."""
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s at the end of a stream
    datasets.disable_progress_bars()


def table(levels: Any, image: str = "image", feature: Any = IMAGE, **columns: tuple[Any, list[Any]]) -> Any:
    """Return a data set of flat images, and of further columns: a feature and its values each."""
    images = [{"bytes": encode_flat(level), "path": None} for level in levels]
    values = {image: images, **{name: values for name, (_, values) in columns.items()}}
    features = datasets.Features({image: feature, **{name: feature for name, (feature, _) in columns.items()}})
    return datasets.Dataset.from_dict(values, features)


def saved(path: Path, **splits: Any) -> Path:
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def source(path: Path, **options: str) -> str:
    return f"hf:{path}?" + "&".join(f"{key}={value}" for key, value in options.items())
