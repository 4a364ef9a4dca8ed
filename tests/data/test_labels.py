"""Labels must have the same ids in both splits, in folders, shards and archives, and come with the right images."""

import json
import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import archive_trees as trees
from helpers.flat_images import encode_flat, level_of, write_flat
from scipy.io import savemat

from regvq_fast.cli.data import DataCommand, manage_data
from regvq_fast.data import ArchiveDataset, ImageFolder, ImageShards, find_archive, training_batches, write_shards
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.scenes import ScenesDataset

pytestmark = pytest.mark.usefixtures("cache_home")


def served(dataset) -> set[tuple[int, int]]:
    """Return the gray level, in steps of 10, and the label of each image."""
    return set(served_in_order(dataset))


def served_in_order(dataset) -> list[tuple[int, int]]:
    return [(10 * round(level_of(dataset[k]) / 10), dataset[k]["label"]) for k in range(len(dataset))]


def count(data) -> tuple[int, dict[str, int], tuple[str, ...]]:
    counts = dataset_class(data).count_fields(data)
    return counts.images, dict(counts.having), counts.usable


# ------------------------------------------------------------------------------------------------------------- folders


def test_the_first_folder_is_the_class_with_one_id_in_both_splits(tmp_path, caplog):
    for k, path in enumerate(["train/cow/0.png", "train/cow/deep/er/1.png", "train/ant/2.png", "train/3.png"]):
        write_flat(tmp_path / path, 10 * k)
    for k, path in enumerate(["val/cow/0.png", "val/bee/1.png"]):
        write_flat(tmp_path / path, 10 * k)
    (tmp_path / "val" / "empty").mkdir()
    with caplog.at_level(logging.WARNING, logger="regvq_fast"):
        train, val = (ImageFolder(tmp_path, split, 8, fields=["label"]) for split in ("train", "val"))
    assert train.label_names == val.label_names == ("ant", "bee", "cow")
    assert served(train) == {(0, 2), (10, 2), (20, 0)}
    assert served_in_order(val) == [(10, 1), (0, 2)]
    (said,) = caplog.messages
    assert re.search(r"left out 1 of 4 .*: no label", said)
    batch = next(training_batches(train, 3))
    assert sorted(batch["label"].tolist()) == [0, 2, 2]
    assert ImageFolder(tmp_path, "train", 8)[0].keys() == {"image"}
    assert count(tmp_path) == (4, {"caption": 0, "label": 3, "segmentation": 0}, ())


def test_a_hidden_split_has_all_the_names(tmp_path):
    for k in range(20):
        write_flat(tmp_path / f"class {k:02d}" / "0.png", 10 * k)
    splits = [ImageFolder(tmp_path, split, 8, fields=["label"]) for split in ("train", "val")]
    for dataset in splits:
        assert dataset.label_names == tuple(f"class {k:02d}" for k in range(20))
        assert all(level == 10 * label for level, label in served(dataset))
    assert {label for dataset in splits for _, label in served(dataset)} == set(range(20))
    assert count(tmp_path)[2] == ("label",)


@pytest.mark.parametrize("folder", [".", "all"])
def test_one_class_is_none(tmp_path, folder):
    for k in range(4):
        write_flat(tmp_path / folder / f"{k}.png", 10 * k)
    assert count(tmp_path)[1]["label"] == 0
    with pytest.raises(FileNotFoundError, match=r"none of the 4 images .* label: .* a folder for each of two classes"):
        ImageFolder(tmp_path, fields=["label"])


def test_fields_are_counted_among_training_images(tmp_path):
    for k in range(6):
        write_flat(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", 10 * k)
        (tmp_path / "train" / "ab"[k % 2] / f"{k}.txt").write_text("a caption")
    (tmp_path / "train" / "a" / "0.txt").unlink()
    write_flat(tmp_path / "train" / "a" / "1.seg.png", mode="L")
    for k in range(2):
        write_flat(tmp_path / "val" / "ab"[k % 2] / f"{k}.png", 10 * k)
    # No validation image has a caption: nothing could be validated by one.
    assert count(tmp_path) == (6, {"caption": 0, "label": 6, "segmentation": 0}, ("label",))
    (tmp_path / "val" / "a" / "0.txt").write_text("a caption")
    assert count(tmp_path)[1]["caption"] == 5
    (tmp_path / "train" / "a" / "0.TXT").write_text("a caption")
    assert count(tmp_path)[2] == ("caption", "label")


def test_a_field_that_few_images_lack_is_usable(tmp_path):
    for k in range(40):
        write_flat(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", 10)
    for k in range(2):
        write_flat(tmp_path / "train" / f"{k}.png", 10)
    write_flat(tmp_path / "val" / "a" / "0.png", 10)
    assert count(tmp_path)[2] == ("label",)
    write_flat(tmp_path / "train" / "2.png", 10)
    assert count(tmp_path)[2] == (), "40 of 43 are 93 %"


def test_scenes_have_captions_and_maps():
    assert dataset_class(None).count_fields(None).usable == ("caption", "segmentation")
    assert count(None)[0] == len(ScenesDataset("train"))


# -------------------------------------------------------------------------------------------------------------- shards


def pack(folder: Path, texts: dict[str, list[str | None]]) -> Path:
    """Shards of each split with the labels given; levels are 10 times the position."""
    for split, labels in texts.items():
        samples = [
            {"__key__": str(k), "png": encode_flat(10 * k)} | ({} if text is None else {"cls": text})
            for k, text in enumerate(labels)
        ]
        write_shards(samples, f"{folder}/{split}-%d.tar", 4096)
    return folder


def test_numbers_in_shards_are_ids(tmp_path, caplog):
    pack(tmp_path, {"train": ["7", "0", " 3\n", None, "07"], "val": ["9", "0"]})
    assert count(tmp_path)[:2] == (5, {"caption": 0, "label": 4, "segmentation": 0})
    for _ in range(2):  # with a new index, and with a cached one
        train, val = (ImageShards(tmp_path, split, 8, fields=["label"]) for split in ("train", "val"))
        assert train.label_names == val.label_names == tuple(map(str, range(10)))
        assert served(train) == {(0, 7), (10, 0), (20, 3), (40, 7)}
        assert served_in_order(val) == [(0, 9), (10, 0)]
    assert "left out 1 of 5" in caplog.messages[0]
    assert ImageShards(tmp_path, "train", 8)[0].keys() == {"image"}


def test_names_in_shards_get_ids_by_their_rank_in_both_splits(tmp_path):
    pack(tmp_path, {"train": ["wolf", "ant", "7"], "val": ["bee", "wolf"]})
    train, val = (ImageShards(tmp_path, split, 8, fields=["label"]) for split in ("train", "val"))
    assert train.label_names == val.label_names == ("7", "ant", "bee", "wolf")
    assert served(train) == {(0, 3), (10, 1), (20, 0)}
    assert served_in_order(val) == [(0, 2), (10, 3)]


@pytest.mark.parametrize("text", ["-1", "1000001", "9" * 4000])
def test_numbers_that_are_no_ids_are_refused(tmp_path, text):
    pack(tmp_path, {"train": ["1", "0", "1"], "val": [text[:500]]})
    with pytest.raises(ValueError, match=rf"val-0\.tar has the label '{text[:500]}' .*0 to 1,000,000"):
        ImageShards(tmp_path, "train", 8, fields=["label"])
    assert len(ImageShards(tmp_path, "train", 8)) == 3  # which needs none


def test_a_file_too_long_for_a_label_is_none(tmp_path):
    pack(tmp_path, {"train": ["1", "x" * 513, "", "2"], "val": ["0", "1"]})
    assert served(ImageShards(tmp_path, "train", 8, fields=["label"])) == {(0, 1), (30, 2)}


def test_labels_are_read_between_headers_in_any_order(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for k in (2, 0, 1):
            for name, data in ((f"{k}.cls", str(k).encode()), (f"{k}.png", encode_flat(10 * k))):
                (tmp_path / name).write_bytes(data)
        for name in ("2.cls", "0.png", "1.cls", "2.png", "1.png", "0.cls"):
            archive.add(tmp_path / name, f"deep/{name}")
    options = {"image_size": 8, "fields": ["label"]}
    both = served(ImageShards(tmp_path / "s.tar", "train", **options))
    both |= served(ImageShards(tmp_path / "s.tar", "val", **options))
    assert both == {(0, 0), (10, 1), (20, 2)}


# ------------------------------------------------------------------------------------------------------------ archives


def test_cub_labels_are_species(tmp_path):
    trees.cub200(tmp_path)
    train, val = (build_dataset(tmp_path, split=split, image_size=8, fields=["label"]) for split in ("train", "val"))
    assert train.label_names == val.label_names == ("Black footed Albatross", "Café Swallow")
    assert {label for _, label in served(train)} == {1}  # birds 1, 3, 5 and 7
    assert {label for _, label in served(val)} == {0}
    assert count(tmp_path) == (4, {"caption": 4, "label": 4}, ("caption", "label"))


def test_ade20k_labels_are_scene_categories(tmp_path):
    top = trees.ade20k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image of ADE20K.* has its label"):
        build_dataset(top, split="val", image_size=8, fields=["label"])
    scenes = [f"ADE_train_{k:08d} living_room" for k in (1, 3)] + ["ADE_val_00000001 abbey", "ADE_val_00000002 street"]
    (top / "sceneCategories.txt").write_text("\n".join(scenes) + "\n")
    train, val = (build_dataset(top, split=split, image_size=8, fields=["label"]) for split in ("train", "val"))
    assert train.label_names == val.label_names == ("abbey", "living room", "street")
    assert served(train) == {(0, 1), (80, 1)}
    assert served_in_order(val) == [(0, 0), (40, 2)]
    assert count(top)[:2] == (4, {"caption": 0, "label": 2, "segmentation": 3})


LISTS = ["LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", None]


@pytest.mark.parametrize("flat", LISTS)
@pytest.mark.parametrize("kaggle", [False, True])
def test_imagenet_labels_are_ranks_of_synsets(tmp_path, kaggle, flat):
    top = trees.imagenet(tmp_path, kaggle, flat)
    for root in (tmp_path, top, top / "Data" if kaggle else top, top / "Data" / "CLS-LOC" if kaggle else top):
        train, val = (build_dataset(root, split=split, image_size=8, fields=["label"]) for split in ("train", "val"))
        assert isinstance(train, ArchiveDataset)
        assert train.archive.name == "imagenet"
        assert train.label_names == val.label_names == ("tench, Tinca tinca", "kit fox", "power drill")
        assert served(train) == {(level, level // 40) for level in (0, 10, 40, 50, 80, 90)}
        assert served(val) == {(0, 0), (40, 1), (80, 2)}
    assert count(tmp_path) == (6, {"label": 6}, ("label",))


def test_imagenet_without_names_and_lists(tmp_path):
    trees.imagenet(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    (tmp_path / "LOC_val_solution.csv").unlink()
    archive = find_archive(tmp_path)
    assert archive.label_names == tuple(sorted(trees.SYNSETS))
    assert archive.title == "ImageNet's 3 classes"
    assert len(build_dataset(tmp_path, split="val", image_size=8)) == 3  # which needs no labels
    with pytest.raises(FileNotFoundError, match=r"\(val\) has its label: get it from LOC_val_solution\.csv"):
        build_dataset(tmp_path, split="val", image_size=8, fields=["label"])


def test_the_development_kits_numbers_are_those_of_meta_mat(tmp_path):
    trees.imagenet(tmp_path, flat="ILSVRC2012_validation_ground_truth.txt")
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (tmp_path / "map_clsloc.txt").unlink()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").rename(kit / "ILSVRC2012_validation_ground_truth.txt")
    options = {"split": "val", "image_size": 8, "fields": ["label"]}
    with pytest.raises(FileNotFoundError, match=r"meta\.mat or map_clsloc\.txt"):
        build_dataset(tmp_path, **options)
    (kit / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"meta\.mat is damaged"):
        build_dataset(tmp_path, **options)
    rows = [(k, synset) for k, synset in enumerate(trees.SYNSETS, start=1)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(kit / "meta.mat", {"synsets": synsets})
    assert served(build_dataset(tmp_path, **options)) == {(0, 0), (40, 1), (80, 2)}
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n4\n3\n")
    with pytest.raises(ValueError, match=r"ground_truth\.txt has the class '4'"):
        build_dataset(tmp_path, **options)


def test_prepared_shards_have_the_archives_labels_and_names(tmp_path):
    for tree in (trees.imagenet, trees.cub200):
        root, out = tmp_path / tree.__name__, tmp_path / f"{tree.__name__}-shards"
        tree(root)
        manage_data(DataCommand("prepare", root, out=out, size=20, workers=0))
        manifest = json.loads((out / "regvq-data.json").read_text())
        for split in ("train", "val"):
            archive, shards = (build_dataset(data, split=split, image_size=8, fields=["label"]) for data in (root, out))
            assert isinstance(shards, ImageShards)
            assert shards.label_names == archive.label_names == tuple(manifest["label_names"])
            assert served(shards) == served(archive)
            assert manifest["splits"][split]["label"] == len(shards)
    manifest["label_names"] = manifest["label_names"][:1]
    (out / "regvq-data.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"has the label '1' .*from 0 to 0"):
        build_dataset(out, split="train", image_size=8, fields=["label"])
