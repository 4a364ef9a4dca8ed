"""Columns of Hugging Face data sets: labels, captions and maps, by type, by name or as stated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flat_images import encode_flat, level_of, levels_of

from regvq_fast.data import HuggingFaceImages
from regvq_fast.data.datasets import dataset_class
from regvq_fast.data.loading import collate

datasets = pytest.importorskip("datasets")
from helpers.hugging_face import ANIMALS, IMAGE, NUMBER, TEXT, saved, source, table  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


def test_labels_of_a_class_label_column_whatever_its_name(tmp_path: Path) -> None:
    one = table([0, 10, 20], kind=(ANIMALS, [2, 0, 1]))
    path = saved(tmp_path, train=one, test=one.select([1]))
    train = HuggingFaceImages(path, "train", 8, fields=["label"])
    assert train.label_names == ("cat", "dog", "owl")
    assert {level_of(train[k]): train[k]["label"] for k in range(3)} == {0: 2, 10: 0, 20: 1}
    assert collate([train[0], train[1]])["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("feature", "training", "validation", "names", "ids"),
    [
        (NUMBER, [4, 0], [6], tuple("0123456"), ([4, 0], [6])),
        (TEXT, ["dog", "ape"], ["cat"], ("ape", "cat", "dog"), ([2, 0], [1])),
    ],
)
def test_numbers_and_texts_are_labels_whose_ids_both_splits_share(
    tmp_path: Path, feature: Any, training: list[Any], validation: list[Any], names: Any, ids: Any
) -> None:
    splits = {"train": table([0, 10], label=(feature, training)), "test": table([0], label=(feature, validation))}
    path = saved(tmp_path, **splits)
    train, val = (HuggingFaceImages(path, split, 8, fields=["label"]) for split in ("train", "val"))
    assert train.label_names == val.label_names == names
    assert [train[k]["label"] for k in np.argsort(levels_of(train))] == ids[0]
    assert [val[0]["label"]] == ids[1]


def test_rows_without_a_label_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(
        tmp_path, train=table([0, 10, 20], label=(ANIMALS, [1, -1, None])), test=table([5], label=(ANIMALS, [-1]))
    )
    assert levels_of(HuggingFaceImages(path, "train", 8, fields=["label"])) == [0]
    assert "left out 2 of 3" in caplog.text
    with pytest.raises(ValueError, match=r"none of the 1 rows.*test.*label"):
        HuggingFaceImages(path, "val", 8, fields=["label"])
    with pytest.raises(ValueError, match="one is 70,000,000"):
        HuggingFaceImages(saved(tmp_path / "b", train=table([0], label=(NUMBER, [70_000_000]))), fields=["label"])


def test_a_label_beyond_the_names_is_refused(tmp_path: Path) -> None:
    one = table([0, 10, 20], label=(ANIMALS, [2, 0, 1]))
    path = saved(tmp_path, train=one, test=one)
    for split in ("train", "test"):
        described = path / split / "dataset_info.json"
        names = json.loads(described.read_text())
        names["features"]["label"]["names"] = ["cat", "dog"]
        described.write_text(json.dumps(names))
    with pytest.raises(ValueError, match=rf"{path} has a label 2 and only 2 names"):
        HuggingFaceImages(path, "train", 8, fields=["label"])


def test_captions_of_a_row_are_those_of_a_folder(tmp_path: Path) -> None:
    several = datasets.List(TEXT)
    texts = [["a cat", "a\ncat", "", "one  cat"], ["an owl"], [], None]
    path = saved(
        tmp_path,
        train=table([0, 10, 20, 30], captions=(several, texts)),
        test=table([0], captions=(several, texts[:1])),
    )
    train, val = (HuggingFaceImages(path, split, 8, fields=["caption"]) for split in ("train", "val"))
    assert len(train) == 2
    cats = {train[k]["caption"] for k in range(100) if level_of(train[k]) == 0}
    assert cats == {"a cat", "one cat"}
    assert [train[k]["caption"] for k in range(20)] == [train[k]["caption"] for k in range(20)]
    assert val[0]["caption"] == "a cat"


def test_maps_are_cropped_and_mirrored_with_their_images(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    rows = {"image": [Image.fromarray(ramp).convert("RGB")] * 2, "annotation": [Image.fromarray(ramp)] * 2}
    one = datasets.Dataset.from_dict(rows, datasets.Features(image=IMAGE, annotation=IMAGE))
    train = HuggingFaceImages(saved(tmp_path, train=one, test=one), "train", 16, fields=["segmentation"])
    samples = [train[k] for k in range(20)]
    assert all((s["image"][0].int() - s["segmentation"].int()).abs().max() <= 5 for s in samples)
    assert 2 < sum(bool(s["segmentation"][0, -1] > s["segmentation"][0, 0]) for s in samples) < 18


def test_columns_are_told_apart_or_stated(tmp_path: Path) -> None:
    other = (IMAGE, [{"bytes": encode_flat(50, mode="L"), "path": None}] * 2)
    one = table(
        [1, 2], "left", right=other, title=(TEXT, ["a", "b"]), text=(TEXT, ["c", "d"]), caption=(TEXT, ["e", "f"])
    )
    path = saved(tmp_path / "a", train=one, test=one)
    with pytest.raises(ValueError, match=r"several columns that could be the image: left, right.*\?image=left"):
        HuggingFaceImages(path)
    with pytest.raises(ValueError, match="several columns that could be the caption: text, caption"):
        HuggingFaceImages(source(path, image="left"), fields=["caption"])
    val = HuggingFaceImages(
        source(path, image="left", caption="title", segmentation="right"), "val", 8, fields=["caption"]
    )
    assert (level_of(val[1]), val[1]["caption"]) == (2, "b")
    for options, message in (
        ({"image": "gone"}, "no column 'gone'; its columns are left, right"),
        ({"image": "title"}, "'title' .* has no images"),
    ):
        with pytest.raises(ValueError, match=message):
            HuggingFaceImages(source(path, **options))
    with pytest.raises(ValueError, match=r"no column of class labels.*left \(.*title \(string\).*\?label="):
        HuggingFaceImages(source(path, image="left"), fields=["label"])
    # pixel_values and label, as segmentation sets are published: both are images.
    two = table([1, 2], "pixel_values", label=other)
    val = HuggingFaceImages(saved(tmp_path / "b", train=two, test=two), "val", 8, fields=["segmentation"])
    assert (level_of(val[0]), int(val[0]["segmentation"][0, 0])) == (1, 50)
    none = datasets.Dataset.from_dict({"a": [1], "b": ["x"]})
    with pytest.raises(ValueError, match=r"no column of images.*a \(int64\), b \(string\)"):
        HuggingFaceImages(saved(tmp_path / "c", train=none))


def test_fields_are_counted(tmp_path: Path) -> None:
    one = table(range(4), label=(ANIMALS, [0, 1, -1, 2]), caption=(TEXT, ["a", "", None, "d"]))
    path = saved(tmp_path / "a", train=one, test=one)
    counts = dataset_class(path).count_fields(path)
    assert (counts.images, counts.having) == (4, {"caption": 2, "label": 3, "segmentation": 0})
    ambiguous = table(range(3), text=(TEXT, ["a"] * 3), caption=(TEXT, ["b"] * 3))
    path = saved(tmp_path / "b", train=ambiguous)
    assert not any(HuggingFaceImages.count_fields(path).having.values())
    counts = HuggingFaceImages.count_fields(source(path, caption="text"))
    assert counts.having["caption"] == counts.images
    assert counts.images == len(HuggingFaceImages(path, "train", 8)) == 2
    hidden = saved(tmp_path / "c", train=one, test=table([9], label=(ANIMALS, [-1]), caption=(TEXT, ["e"])))
    assert HuggingFaceImages.count_fields(hidden).having["label"] == 0
