"""`regvq data photos` makes the same folder of classes every time, whole or not at all."""

import hashlib
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from regvq_fast.cli.data import DataCommand, manage_data
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.photos import CLASSES


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "photos"
    with Console(quiet=True) as console:
        manage_data(DataCommand("photos", out=out), console)
    return out


def test_crops_are_always_the_same(photos):
    digest = hashlib.sha256()
    for path in sorted(photos.rglob("*.png")):
        if path.parent.name in ("hubble_deep_field", "rocket"):  # JPEG files, which each decoder rounds its own way
            continue
        digest.update(str(path.relative_to(photos)).encode())
        digest.update(np.asarray(Image.open(path)).tobytes())  # not the files' bytes, which depend on zlib
    assert digest.hexdigest() == "52f86f96161a17049cb19adf820b6e4afc9e38fdb51b92c5d04f47397de2d98d"


def test_it_is_a_folder_of_ten_classes_with_splits(photos):
    for split, count in (("train", 2000), ("val", 200)):
        dataset = build_dataset(photos, split=split, image_size=32, fields=["label"])
        assert len(dataset) == count
        assert dataset.label_names == CLASSES
    sizes = {Image.open(path).size for path in photos.glob("val/*/*.png")}
    assert all(width == height and 96 <= width <= 128 for width, height in sizes)


def test_training_and_validation_crops_share_no_pixels(photos):
    """The astronaut's left half is her flag and face, the right half a shuttle: no row of pixels is in both."""
    rows = {
        split: {
            row.tobytes()
            for path in (photos / split / "astronaut").glob("*.png")
            for row in np.asarray(Image.open(path))[:, :48]
        }
        for split in ("train", "val")
    }
    assert len(rows["val"]) > 100
    assert not rows["train"] & rows["val"]


def test_bad_flags_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    out = tmp_path / "photos"
    cases = [
        (DataCommand("photos"), ValueError, "photos needs a folder to write to.*--out"),
        (DataCommand("photos", tmp_path, out=out), ValueError, "--root .* leave it out"),
        (DataCommand("photos", out=out, size=32), ValueError, "--size 32 is for the archives"),
        (DataCommand("photos", out=tmp_path / "full"), FileExistsError, "full"),
    ]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for command, error, message in cases:
        with pytest.raises(error, match=message):
            manage_data(command, Console(quiet=True))
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(FileNotFoundError, match="scikit-image's: pip install"):
        manage_data(DataCommand("photos", out=out), Console(quiet=True))
    assert not out.exists()
