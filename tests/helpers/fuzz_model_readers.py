"""Small valid files of the readers of priors, statistics and Hugging Face tables, as in :mod:`helpers.fuzz_readers`."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.fuzz_readers import SIDE, Reader, _check
from helpers.hostile_images import encoded, gradient
from helpers.tiny_models import TinyNet
from torch import Tensor

from regvq_fast.data import HuggingFaceImages, HuggingFaceStream
from regvq_fast.evaluation.fid import FeatureStatistics, frechet_distance, make_reference
from regvq_fast.evaluation.suite import ReferenceBatch
from regvq_fast.models.model import read_model
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.scenes import ScenesDataset

_SIZES: dict[str, Any] = {"token_shape": (2, 2), "width": 8, "depth": 1, "heads": 2}
_FEATURES = 4


def _make_prior(folder: Path) -> None:
    """Priors without manifests, which check no file before it is parsed."""
    torch.manual_seed(0)
    encoder = WordEncoder(width=8, depth=1, heads=2, max_words=3, buckets=8)
    for name, model in {
        "ar": TokenTransformer(4, 3, **_SIZES),
        "diffusion": VQDiffusion(4, text_encoder=encoder, num_steps=5, **_SIZES),
        "maskgit": MaskGIT(4, 3, **_SIZES),
    }.items():
        model.save_pretrained(folder / name)
        (folder / name / "manifest.json").unlink()


def _read_prior(folder: Path) -> None:
    for name in ("ar", "diffusion", "maskgit"):
        model = read_model(folder / name, TokenTransformer, VQDiffusion, MaskGIT)
        assert model.num_codes >= 1
        assert all(size >= 1 for size in model.token_shape)


def _make_reference(folder: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, _FEATURES))
    moments = {"mu": values.mean(0), "sigma": np.cov(values.T)}
    spatial = {"mu_s": values.mean(0), "sigma_s": np.cov(values.T)}
    images = np.arange(5 * 4 * 3 * 3, dtype=np.uint8).reshape(5, 4, 3, 3)
    np.savez(folder / "reference.npz", arr_0=images, **moments, **spatial)
    np.savez_compressed(folder / "moments.npz", **moments)


def _read_reference(folder: Path) -> None:
    ours = FeatureStatistics.zeros(_FEATURES)
    ours.add(torch.randn(9, _FEATURES, generator=torch.Generator().manual_seed(1)))
    for name in ("reference.npz", "moments.npz"):
        reference = ReferenceBatch(folder / name)
        assert reference.images is None or reference.images[0]["image"].shape == (3, *reference.images.image_size)
        for moments in (reference.pooled, reference.spatial):
            if moments is not None and len(moments.mean) == _FEATURES:  # which the command checks
                assert 0 <= frechet_distance(ours, moments) < float("inf")


class _Seen(TinyNet):
    """A feature network of two numbers an image."""

    num_features = 2

    def features(self, images: Tensor) -> Tensor:
        return super().features(images)[:, :2]


def _statistics(folder: Path) -> tuple[Any, ...]:
    reference = make_reference(ScenesDataset("val", 16, length=3), _Seen(), cache=folder / "cache")
    found = reference.statistics
    return found.count, found.total.tolist(), found.products.tolist(), reference.unreadable


def _read_statistics(folder: Path) -> None:
    assert _statistics(folder) == _TRUE
    assert _statistics(folder) == _TRUE  # as it was made anew


_TRUE = (3,)


def _make_statistics(folder: Path) -> None:
    global _TRUE
    _TRUE = _statistics(folder)


def _rows() -> Any:
    import datasets

    rows = {
        "image": [{"bytes": encoded(gradient(24, 20), kind), "path": None} for kind in ("PNG", "JPEG") * 4],
        "caption": [f"caption {k} é" for k in range(8)],
        "label": [k % 3 for k in range(8)],
    }
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    return datasets.Dataset.from_dict(
        rows, datasets.Features({**features, "label": datasets.ClassLabel(names=["a", "b", "c"])})
    )


def _quiet(folder: Path) -> None:
    """Let ``datasets`` ask no hub, show no progress, and keep nothing of the file before."""
    import datasets

    cache = folder.parent / f"{folder.name}-cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets.config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    datasets.config.HF_DATASETS_CACHE = str(cache)  # type: ignore[assignment]
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s at the end of a stream
    datasets.disable_progress_bars()


def _make_parquet(folder: Path) -> None:
    _quiet(folder)
    for split in ("train", "validation"):
        _rows().to_parquet(folder / "data" / f"{split}.parquet")


def _make_saved(folder: Path) -> None:
    import datasets

    _quiet(folder)
    datasets.DatasetDict({"train": _rows(), "validation": _rows()}).save_to_disk(folder / "data")


def _read_table(folder: Path) -> None:
    _quiet(folder)
    for split in ("train", "val"):
        data = HuggingFaceImages(f"hf:{folder / 'data'}", split, SIDE, fields=("caption", "label"))
        _check((data[k] for k in range(min(len(data), 8))), "caption label", None, len(data.label_names))


def _read_stream(folder: Path) -> None:
    _quiet(folder)
    for split in ("train", "val"):
        source = f"hf:{folder / 'data'}?stream=&length=8"
        data = HuggingFaceStream(source, split, SIDE, fields=("caption", "label"))
        _check((data[k] for k in range(min(len(data), 8))), "caption label", None, len(data.label_names))


MODEL_READERS = {
    "priors alone": Reader(_make_prior, _read_prior),
    "reference.npz": Reader(_make_reference, _read_reference),
    "statistics": Reader(_make_statistics, _read_statistics, writes=True),
    "parquet": Reader(_make_parquet, _read_table),
    "parquet, streamed": Reader(_make_parquet, _read_stream),
    "save_to_disk": Reader(_make_saved, _read_table),
}
