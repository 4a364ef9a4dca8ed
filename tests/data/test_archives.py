"""The official layouts must be known as such, and serve what their own lists, captions and masks say."""

import errno
import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import archive_trees as trees
from helpers.flat_images import level_of, write_flat
from PIL import Image

from regvq_fast.data import ArchiveDataset, find_archive, reading, training_batches
from regvq_fast.data.archives.archive import MAP_FOLDER
from regvq_fast.data.datasets import build_dataset


def levels(dataset) -> list[int]:
    """Return the gray level of each image, rounded to steps of 20 because JPEG shifts it slightly."""
    return [20 * round(level_of(dataset[k]) / 20) for k in range(len(dataset))]


def build(root, split="val", size=8, **options):
    return build_dataset(root, split=split, image_size=size, **options)


@pytest.fixture(autouse=True)
def cache(cache_home):
    """Nothing of a test goes into the user's own cache."""
    return cache_home


@pytest.mark.parametrize(
    ("tree", "options", "name", "counts"),
    [
        (trees.cub200, {}, "cub200", (4, 4)),
        (trees.celebahq, {}, "celebahq", (3, 1)),
        (trees.ade20k, {}, "ade20k", (4, 2)),
        (trees.ade20k_full, {"year": 2016}, "ade20k", (2, 2)),
        (trees.ade20k_full, {"year": 2021}, "ade20k", (2, 2)),
        (trees.coco, {}, "coco", (4, 2)),
        (trees.coco, {"year": 2014, "images": "images"}, "coco", (4, 2)),
    ],
)
def test_a_layout_is_known_from_its_top_folder_and_from_the_one_around_it(tmp_path, tree, options, name, counts):
    top = tree(tmp_path, **options)
    for root in {top, tmp_path}:
        assert find_archive(root).name == name
        datasets = [build(root, split) for split in ("train", "val")]
        assert all(isinstance(dataset, ArchiveDataset) for dataset in datasets)
        assert tuple(map(len, datasets)) == counts
        assert str(top) in datasets[0].title
    drawn = [levels(dataset) for dataset in datasets]
    assert tuple(len(set(split)) for split in drawn) == counts  # all can be read, and none comes twice


# ----------------------------------------------------------------------------------------------------------- captions


def test_cub_has_its_official_split_and_ten_captions(tmp_path):
    trees.cub200(tmp_path)
    train = build(tmp_path, "train", fields=["caption"])
    val = build(tmp_path, "val", fields=["caption"])
    assert sorted(levels(train)) == [20, 60, 100, 140]
    assert sorted(levels(val)) == [0, 40, 80, 120]
    for k in range(4):
        bird = round(level_of(val[k]) / 20)
        assert val[k]["caption"] == f"bird {bird} caption 0"
    drawn = [train[k] for k in range(80)]
    assert all(sample["caption"].split()[1].rstrip("\ufffd") == str(round(level_of(sample) / 20)) for sample in drawn)
    assert {sample["caption"].split(" ", 2)[2] for sample in drawn} == {f"caption {j}" for j in range(5)} | {
        "s caption 1"
    }
    again = build(tmp_path, "train", fields=["caption"])
    assert [again[k]["caption"] for k in range(80)] == [sample["caption"] for sample in drawn]
    other = build(tmp_path, "train", fields=["caption"], seed=1)
    assert [other[k]["caption"] for k in range(80)] != [sample["caption"] for sample in drawn]


def test_one_caption_a_line_is_the_rule_of_plain_folders_too(tmp_path):
    for k in range(2):
        write_flat(tmp_path / f"{k}.jpg", 20 * k)
        (tmp_path / f"{k}.txt").write_text("\n one\ntwo \none\n\n\nthree\n")
    assert build(tmp_path, "val", fields=["caption"])[0]["caption"] == "one"
    train = build(tmp_path, "train", fields=["caption"])
    drawn = [train[k]["caption"] for k in range(300)]
    assert {caption: drawn.count(caption) > 75 for caption in drawn} == dict.fromkeys(["one", "two", "three"], True)


def test_coco_has_its_captions_by_file_name(tmp_path, caplog):
    for year in (2014, 2017):
        top = trees.coco(tmp_path / str(year), year)
        with caplog.at_level(logging.WARNING, logger="regvq_fast"):
            train, val = (build(top, split, fields=["caption"]) for split in ("train", "val"))
        (said,) = caplog.messages
        assert re.search(rf"\b1 of 4 .*{top}: .*caption", said)
        caplog.clear()
        assert [val[k]["caption"] for k in range(2)] == ["Photo 0.", "Photo 1."]
        seen = {(round(level_of(train[k]) / 40), train[k]["caption"]) for k in range(90)}
        assert seen == {(k, f"{photo} {k}{stop}") for k in range(3) for photo, stop in (("Photo", "."), ("photo", ""))}


def test_coco_2017_comes_before_2014_and_captions_reach_spawned_workers(tmp_path):
    trees.coco(tmp_path, 2014)
    trees.coco(tmp_path, 2017)
    archive = find_archive(tmp_path)
    assert archive.title == "MS-COCO 2017"
    names = archive.listed("val2017")
    assert archive.has("caption", names).all()
    assert pickle.loads(pickle.dumps(archive)).read(names[1], "caption") == b"Photo 1.\nphoto 1\nPhoto 1."


# --------------------------------------------------------------------------------------------------------------- maps


def test_celeba_parts_are_merged_in_order_once(tmp_path):
    top = trees.celebahq(tmp_path)
    (face,) = build(tmp_path, "val", 16, fields=["segmentation"])  # row 182638 of CelebA
    expected = torch.ones(16, 16, dtype=torch.uint8)
    expected[8:12, :8], expected[8:12, 8:], expected[:4] = 4, 5, 13
    assert torch.equal(face["segmentation"], expected)
    assert 70 < level_of(face) < 90
    shutil.rmtree(top / "CelebAMask-HQ-mask-anno" / "0")  # it need not be looked at again
    assert Image.open(top / MAP_FOLDER / "4.png").size == (16, 16)
    assert np.array_equal(np.asarray(Image.open(top / MAP_FOLDER / "4.png")), expected.numpy())
    assert find_archive(top).read("4.jpg", "segmentation") == (top / MAP_FOLDER / "4.png").read_bytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_mask_that_the_storage_fails_to_give_is_not_left_out(tmp_path, monkeypatch, number):
    trees.celebahq(tmp_path)
    expected = build(tmp_path, "val", 16, fields=["segmentation"])[0]["segmentation"]
    shutil.rmtree(tmp_path / "CelebAMask-HQ" / MAP_FOLDER)
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    real, failed = Image.open, []

    def fail_once(file, *rest):
        if str(file).endswith("_hair.png") and not failed:
            failed.append(file)
            raise OSError(number, os.strerror(number))
        return real(file, *rest)

    monkeypatch.setattr(Image, "open", fail_once)
    dataset = build(tmp_path, "val", 16, fields=["segmentation"])
    assert torch.equal(dataset[0]["segmentation"], expected)
    assert failed
    assert dataset.unreadable == 0


@pytest.mark.parametrize("time", [None, 0])
def test_a_map_made_of_half_the_masks_is_made_anew(tmp_path, time):
    """Unpacking goes on after the first look, and may give the folder of masks the time that it was packed at."""
    top = trees.celebahq(tmp_path)
    masks = top / "CelebAMask-HQ-mask-anno" / "0"
    hair = masks / "00004_hair.png"
    whole = find_archive(top).read("4.jpg", "segmentation")
    content = hair.read_bytes()
    hair.unlink()
    os.utime(masks, (10**9, 10**9))
    half = find_archive(top).read("4.jpg", "segmentation")
    assert half != whole
    hair.write_bytes(content)
    if time is not None:
        os.utime(masks, (time, time))
    archive = find_archive(top)
    assert archive.read("4.jpg", "segmentation") == whole
    made = (top / MAP_FOLDER / "4.png").stat().st_ino
    assert archive.read("4.jpg", "segmentation") == whole
    assert (top / MAP_FOLDER / "4.png").stat().st_ino == made  # kept again


def test_a_map_is_not_taken_for_one_of_masks_that_came_while_it_was_made(tmp_path, monkeypatch):
    top = trees.celebahq(tmp_path)
    hair = top / "CelebAMask-HQ-mask-anno" / "0" / "00004_hair.png"
    whole = find_archive(top).read("4.jpg", "segmentation")
    content = hair.read_bytes()
    hair.unlink()
    os.utime(hair.parent, (10**9, 10**9))
    archive = find_archive(top)
    merged = archive._merged

    def late(name):
        found = merged(name)
        hair.write_bytes(content)
        return found

    monkeypatch.setattr(archive, "_merged", late)
    assert archive.read("4.jpg", "segmentation") != whole
    assert find_archive(top).read("4.jpg", "segmentation") == whole


def test_a_map_of_colours_is_made_anew_when_they_are_replaced(tmp_path):
    top = trees.ade20k_full(tmp_path, 2016)
    archive = find_archive(top)
    name = archive.listed("validation")[0]
    first = archive.read(name, "segmentation")
    colours = Path(archive.path(name, "segmentation"))
    trees.labels(colours, np.zeros((20, 24, 3)))
    os.utime(colours, (10**9, 10**9))
    assert archive.read(name, "segmentation") != first


def test_a_mirrored_face_has_its_left_eye_on_its_left(tmp_path):
    trees.celebahq(tmp_path)
    dataset = build(tmp_path, "train", 16, crop="center", fields=["segmentation"])
    eyes = [dataset[k]["segmentation"][9].tolist() for k in range(60)]
    whole, lacking = [4] * 8 + [5] * 8, [4] * 8 + [1] * 8  # the mirror image of one eye is the other
    assert {tuple(eye) for eye in eyes} == {tuple(whole), tuple(lacking), tuple([1] * 8 + [5] * 8)}


def test_maps_that_cannot_be_kept_beside_the_archive_go_elsewhere(tmp_path, cache, monkeypatch, caplog):
    top = trees.celebahq(tmp_path)
    (top / MAP_FOLDER).write_text("no folder can be made here")
    first = find_archive(top).read("4.jpg", "segmentation")
    (kept,) = cache.glob("regvq_fast/maps/*/4.png")
    assert kept.read_bytes() == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [find_archive(top).read("4.jpg", "segmentation") for _ in range(2)] == [first, first]
    assert len(caplog.messages) == 1
    assert re.search(rf"maps .*{top} ", caplog.messages[0])
    caplog.clear()
    scenes = trees.ade20k_full(tmp_path, 2016)
    (scenes / MAP_FOLDER).write_text("")
    archive = find_archive(scenes)
    for name in archive.listed("validation"):  # each in a folder of its own
        archive.read(name, "segmentation")
    (said,) = caplog.messages
    assert re.search(rf"maps .*{scenes} .*Not a directory", said)


def test_ade20k_maps_are_the_files_or_the_benchmarks_classes_of_their_colours(tmp_path, caplog):
    trees.ade20k(tmp_path / "benchmark")
    val = build(tmp_path / "benchmark", fields=["segmentation"])
    assert [set(val[k]["segmentation"].flatten().tolist()) for k in range(2)] == [{150}, {149}]
    assert len(build(tmp_path / "benchmark", "train", fields=["segmentation"])) == 3
    assert len(caplog.messages) == 1
    for year in (2016, 2021):
        trees.ade20k_full(tmp_path / str(year), year)
        full = build(tmp_path / str(year), size=20, fields=["segmentation"])
        assert full[0]["segmentation"][7].tolist() == [1] * 4 + [15] * 6 + [137] * 6 + [0] * 4  # 20 of 24 columns


@pytest.mark.parametrize(
    ("stuff", "year"),
    [("stuffthingmaps/{}", 2017), ("annotations/{}", 2017), ("stuff_{}_pixelmaps", 2017), ("stuffthingmaps/{}", 2014)],
)
def test_coco_maps_have_cocos_ids(tmp_path, stuff, year):
    trees.coco(tmp_path, year, stuff=stuff)
    for split, count in (("train", 4), ("val", 2)):
        dataset = build(tmp_path, split, 20, crop="center", flip=False, fields=["segmentation"])
        assert len(dataset) == count
        assert dataset[0]["segmentation"][3].tolist() == [1] * 6 + [182] * 8 + [0] * 6
    assert find_archive(tmp_path).classes[182] == "wood"


def test_a_map_of_another_size_is_an_error_but_of_faces(tmp_path, caplog):
    top = trees.ade20k(tmp_path)
    trees.labels(top / "annotations" / "validation" / "ADE_val_00000001.png", np.full((10, 12), 3))
    dataset = build(top, fields=["segmentation"])
    assert [level_of(dataset[k]) for k in range(2)] == [level_of(dataset[1])] * 2
    (message,) = caplog.messages
    assert message.endswith("ADE_val_00000001.jpg (its map has 12 x 10 pixels, the image 24 x 20)")


# --------------------------------------------------------------------------------------------------- what can be wrong


def test_missing_files_are_counted_and_named(tmp_path, caplog):
    top = trees.cub200(tmp_path)
    first, second = sorted((top / "images" / trees.BIRDS[1]).iterdir())[:2]
    first.unlink()
    second.write_bytes(b"no image")
    for text in (tmp_path / "text" / trees.BIRDS[0]).iterdir():
        text.unlink()
    dataset = build(top, "train")
    assert levels(dataset) in [[a, b, c] for a in (100, 140) for b in (100, 140) for c in (100, 140)]
    assert re.search(rf"\b1 .*\b4 train images .*{top} .*missing \(002\.Caf", caplog.messages[0])
    assert f"unreadable image {second}" in caplog.messages[1]
    with pytest.raises(FileNotFoundError, match=r"\(test\).* caption.*https://github\.com"):
        build(top, "val", fields=["caption"])
    for image in (top / "images" / trees.BIRDS[0]).iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"'test'.* CUB.*https://data\.cal"):
        build(top, "val")
    (top / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_test_split\.txt .*https://data\.caltech"):
        build(top, "val")


def test_an_empty_split_and_damaged_lists(tmp_path):
    top = trees.cub200(tmp_path)
    split = top / "train_test_split.txt"
    split.write_text("".join(f"{k + 1} 0\n" for k in range(8)))
    with pytest.raises(FileNotFoundError, match=r"'train'.* CUB-200-2011"):
        build(top, "train")
    split.write_text("1 0\n")
    with pytest.raises(ValueError, match=r"train_test_split\.txt .*image 2\b"):
        build(top, "train")
    top = trees.celebahq(tmp_path)
    mapping = top / "CelebA-HQ-to-CelebA-mapping.txt"
    mapping.write_text("idx orig_idx orig_file\n<html>\n")
    with pytest.raises(ValueError, match=r"mapping\.txt .*'<html>'"):
        build(top, "train")
    mapping.unlink()
    with pytest.raises(FileNotFoundError, match=r"mapping\.txt .*https://github\.com/switchablenorms"):
        build(top, "train")
    top = trees.coco(tmp_path / "coco")
    (top / "annotations" / "captions_val2017.json").write_text('{"images": []')
    with pytest.raises(ValueError, match=r"captions_val2017\.json .*captions"):
        build(top, "val", fields=["caption"])


def test_damaged_masks_and_fields_that_an_archive_has_not(tmp_path, caplog):
    top = trees.celebahq(tmp_path)
    masks = top / "CelebAMask-HQ-mask-anno" / "0"
    (masks / "00000_hair.png").write_bytes(b"no image")
    Image.new("L", (8, 8), 255).save(masks / "00001_hair.png")
    for mask in masks.glob("00005_*"):
        mask.unlink()
    dataset = build(top, "train", fields=["segmentation"])
    assert len(dataset) == 2  # face 5 has no mask
    with pytest.raises(ValueError, match=r"\b2 .*'train'"):
        dataset[0]
    assert any("00000_hair.png can't be read" in message for message in caplog.messages)
    assert any(re.search(r"00001_hair\.png .*\(8, 8\) .*\(16, 16\)", m) for m in caplog.messages)
    with pytest.raises(ValueError, match=r"CelebA-HQ .*caption.*image, segmentation"):
        build(top, "train", fields=["caption"])


def test_workers_and_limits_are_as_of_folders(tmp_path):
    top = trees.cub200(tmp_path)
    dataset = build(top, "train", fields=["caption"])
    alone, workers = (next(training_batches(dataset, 12, workers=count)) for count in (0, 1))
    assert torch.equal(alone["image"], workers["image"])
    assert alone["caption"] == workers["caption"]
    whole = levels(build(top, "val"))
    assert levels(build(top, "val", length=2)) == whole[::2]


# ------------------------------------------------------------------------------------------------ the layout of ADE20K


def test_captions_may_be_added_to_ade20k(tmp_path):
    top = trees.ade20k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image of ADE20K.* has its caption: get it from your own captions"):
        build(top, fields=["caption"])
    (top / "images" / "validation" / "ADE_val_00000001.txt").write_text("beside\nit\n")
    rows = [
        {"file_name": "validation/ADE_val_00000002.jpg", "text": ["a list", "of two"]},
        {"file_name": "images/training/ADE_train_00000001.jpg", "text": "a\nstring"},
        {"file_name": "training/ADE_train_00000001.jpg", "text": "another"},
    ]
    lines = "\ufeff" + "".join(json.dumps(row) + "\n\n" for row in rows)
    (top / "captions.jsonl").write_text(lines, encoding="utf-8")
    val = build(top, fields=["caption", "segmentation"])
    assert [val[k]["caption"] for k in range(2)] == ["beside", "a list"]
    train = build(top, "train", fields=["caption"])
    assert {train[k]["caption"] for k in range(30)} == {"a string", "another"}
    (top / "captions.jsonl").write_text(json.dumps(rows[0]) + "\n" + '{"file": 3}')
    with pytest.raises(ValueError, match=r"line 2 of .*captions\.jsonl .*file_name.* got {\"file\": 3}"):
        build(top, fields=["caption"])


def test_other_data_in_the_layout_of_ade20k_are_not_called_so(tmp_path):
    for partition in ("training", "validation"):
        for k in range(2):
            write_flat(tmp_path / "images" / partition / f"{k}.jpg", 40 * k)
            trees.labels(tmp_path / "annotations" / partition / f"{k}.png", np.full((20, 24), 200 + k))
    dataset = build(tmp_path, fields=["segmentation"])
    assert isinstance(dataset, ArchiveDataset)
    assert dataset.title.startswith("data in the layout of ADE20K")
    assert dataset.num_classes is None
    assert [int(dataset[k]["segmentation"].max()) for k in range(2)] == [200, 201]
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.5\t2\t2\tcat, tabby\n2\t0.5\t2\t2\tdog\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    archive = find_archive(tmp_path)
    assert archive.classes == ("unknown", "cat", "dog")
    assert "ADE20K scene" not in archive.title
    with pytest.raises(ValueError, match="none of the 2 images"):  # ids that the table hasn't
        build(tmp_path, fields=["segmentation"])[0]
    own = trees.ade20k(tmp_path / "own")
    assert find_archive(own).title == "ADE20K scene parsing benchmark"
    (own / "objectInfo150.txt").unlink()
    assert find_archive(own).title == "ADE20K scene parsing benchmark"  # by the names of its images
    assert len(find_archive(own).classes) == 151
