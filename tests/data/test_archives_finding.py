"""A path must stand for one archive: the one whose top folder or folder of images it is, or that alone lies in it."""

import re
import shutil

import pytest
from helpers import archive_trees as trees
from helpers.flat_images import write_flat

from regvq_fast.data import ArchiveDataset, ImageFolder, find_archive
from regvq_fast.data.datasets import build_dataset


def build(root, split="val", **options):
    return build_dataset(root, split=split, image_size=8, **options)


def test_of_several_archives_none_is_chosen_silently(tmp_path, caplog):
    birds, scenes = trees.cub200(tmp_path), trees.ade20k(tmp_path)
    several = rf"^{tmp_path} holds ade20k \({scenes}\) and cub200 \({birds}\): give the top folder of one"
    with pytest.raises(ValueError, match=rf"{several} \(.*--dataset\)$"):
        build(tmp_path)
    assert find_archive(tmp_path, "cub200").top == birds
    older = trees.ade20k_full(tmp_path, 2016)
    with pytest.raises(ValueError, match=rf"ade20k \({scenes}\) .*ade20k \({older}\)"):
        find_archive(tmp_path, "ade20k")
    assert caplog.messages == []
    trees.coco(birds)  # which is a top folder itself, with the other's files beside its own
    with pytest.raises(ValueError, match=rf"cub200 \({birds}\) .*coco \({birds}\)"):
        find_archive(birds)


def test_a_top_folder_is_itself_whatever_lies_in_it(tmp_path, caplog):
    """Images of COCO unpack to train2017/, whose top folder is the one around it: it could not be named otherwise."""
    trees.coco(tmp_path)
    birds = trees.cub200(tmp_path)
    assert {build(tmp_path, split).archive.name for split in ("train", "val")} == {"coco"}
    (said,) = caplog.messages
    assert re.search(rf"MS-COCO 2017 in {tmp_path} .*not cub200 \({birds}\)", said)


def test_two_names_of_one_folder_are_one_archive(tmp_path):
    top = trees.coco(tmp_path / "coco")
    (tmp_path / "COCO").symlink_to(top)
    assert find_archive(tmp_path).top == top


@pytest.mark.parametrize(
    ("tree", "options", "images", "count"),
    [
        (trees.cub200, {}, "images", 4),
        (trees.celebahq, {}, "CelebA-HQ-img", 1),
        (trees.ade20k, {}, "images", 2),
        (trees.ade20k_full, {"year": 2016}, "images", 2),
        (trees.ade20k_full, {"year": 2021}, "images", 2),
        (trees.ade20k_full, {"year": 2021}, "images/ADE", 2),
        (trees.coco, {"images": "images"}, "images", 2),
    ],
)
def test_the_folder_of_images_stands_for_its_archive(tmp_path, monkeypatch, tree, options, images, count):
    """Otherwise training and validation would be mixed, and captions and maps not be found."""
    top = tree(tmp_path, **options)
    monkeypatch.chdir(top / images)
    for root in (top / images, "."):
        assert find_archive(root).top == top
        dataset = build(root, fields=find_archive(root).needed)
        assert isinstance(dataset, ArchiveDataset)
        assert len(dataset) == count


def test_coco_may_lie_in_a_folder_images_itself(tmp_path):
    top = trees.coco(tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    assert find_archive(top).top == top
    shutil.rmtree(top / "annotations")
    assert find_archive(top).top == tmp_path
    (tmp_path / "annotations").rmdir()
    assert find_archive(top).top == top


def test_plain_folders_are_none(tmp_path):
    for k in range(2):
        write_flat(tmp_path / "images" / "training" / f"{k}.jpg", 20 * k)
    dataset = build(tmp_path)
    assert isinstance(dataset, ImageFolder)
    assert dataset.title == str(tmp_path)
    assert find_archive(trees.ade20k(tmp_path / "ade") / "images" / "training") is None  # mixes nothing with validation
