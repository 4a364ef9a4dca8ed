"""``train/data.py`` must say exactly what is missing, and pack what training then reads as it reads the archive."""

import contextlib
import io
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import archive_trees as trees
from PIL import Image
from rich.console import Console

from regvq_fast.cli.data import DataCommand, manage_data
from regvq_fast.config import run_command
from regvq_fast.data import ArchiveDataset, ImageShards, find_archive, preparing
from regvq_fast.data.datasets import build_dataset

pytestmark = pytest.mark.usefixtures("cache_home")


class Told:
    """Output of a command, with the rows of its table split into columns."""

    def __init__(self, command, root, **options):
        self.console = Console(record=True, width=200, file=io.StringIO())
        self.error = ""
        try:
            manage_data(DataCommand(command, root, **({"workers": 0} | options)), self.console)
        except (ValueError, OSError) as error:
            self.error = str(error)
        self.text = self.console.export_text()

    def rows(self) -> dict[str, tuple[str, str, str]]:
        cells = [
            tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in self.text.splitlines() if "│" in line
        ]
        return {row[0]: row[1:] for row in cells}


def expect(monkeypatch, root, counts: dict[str, int]) -> None:
    """Let these be the official counts."""
    kind = type(find_archive(root))
    original = kind.__init__

    def with_counts(self, top):
        original(self, top)
        self.partitions = counts

    monkeypatch.setattr(kind, "__init__", with_counts)


# -------------------------------------------------------------------------------------------------------------- verify


def test_a_whole_archive_is_all_right(tmp_path, monkeypatch):
    for tree, counts in (
        (trees.cub200, {"train": 4, "test": 4}),
        (trees.celebahq, {"train": 3, "val": 2, "test": 1}),
        (trees.coco, {"train2017": 4, "val2017": 2}),
    ):
        root = tmp_path / tree.__name__
        tree(root)
        expect(monkeypatch, root, counts)
        told = Told("verify", root, decode=True, fields=() if tree is trees.coco else None)
        assert told.error == ""
        images = {f"{partition} images": (str(count), str(count), "ok") for partition, count in counts.items()}
        assert images.items() <= told.rows().items()
        assert f"opened {sum(counts.values())} images" in told.text
    assert told.rows()["train2017 images with caption"] == ("3", "4", "optional")
    assert "get it from" not in told.text


def test_what_is_missing_is_counted_and_where_to_get_it_is_said_once(tmp_path):
    top = trees.cub200(tmp_path)
    next((tmp_path / "text" / trees.BIRDS[1]).iterdir()).unlink()
    told = Told("verify", tmp_path, dataset="cub200")
    assert re.search(rf"CUB-200-2011 in {top} .*incomplete", told.error)
    assert told.rows()["train images"] == ("4", "5,994", "missing")
    assert told.rows()["train images with caption"] == ("3", "5,994", "missing")
    assert told.rows()["test images with caption"] == ("4", "5,794", "missing")
    assert len(re.findall("get it from https://data.caltech.edu", told.text)) == 1
    assert re.search(r"with caption \(.*Größe_0.*txt is missing\); get it from https://github.com/reedscot", told.text)
    (top / "images.txt").unlink()
    told = Told("verify", top, decode=True)
    assert told.rows()["images.txt"] == ("0", "1", "missing")
    assert told.rows()["train images"] == ("0", "5,994", "missing")
    assert f"{top / 'images.txt'} is missing" in told.text


def test_decoding_finds_what_counting_does_not(tmp_path, monkeypatch):
    top = trees.ade20k(tmp_path)
    expect(monkeypatch, top, {"training": 4, "validation": 2})
    training = top / "annotations" / "training"
    trees.labels(training / "ADE_train_00000001.png", np.full((20, 24), 151))
    trees.labels(training / "ADE_train_00000002.png", np.full((10, 12), 1))
    Image.new("RGB", (24, 20)).save(training / "ADE_train_00000003.png")
    trees.labels(training / "ADE_train_00000004.png", np.zeros((20, 24)))
    image = top / "images" / "validation" / "ADE_val_00000001.jpg"
    image.write_bytes(image.read_bytes()[:200])
    assert Told("verify", top).error == ""
    told = Told("verify", top, decode=True)
    assert told.error.endswith("is damaged in 4 images: see above")
    for name, reason in (
        ("train_00000001", "class ids of a segmentation map must be in 0..150, got 151..151"),
        ("train_00000002", "its map has 12 x 10 pixels, the image 24 x 20"),
        ("train_00000003", "a segmentation map must have one class id per pixel, but this one is RGB"),
        ("val_00000001", ""),
    ):
        assert f"ADE_{name}.jpg: {reason}" in told.text
    assert "opened 6 images" in told.text


def test_repeated_and_empty_captions_are_told(tmp_path):
    trees.cub200(tmp_path)
    told = Told("verify", tmp_path, decode=True)
    assert "opened 8 images and 48 captions (40 repeated or empty lines don't count)" in told.text
    empty = next((tmp_path / "text" / trees.BIRDS[0]).iterdir())
    empty.write_text("\n \n")
    name = f"{empty.parent.name}/{empty.stem}.jpg"
    assert f"{name}: its caption is empty" in Told("verify", tmp_path, decode=True).text
    told = Told("prepare", tmp_path, out=tmp_path / "out")
    assert f"{name}: its caption is empty" in told.text
    assert "val: 3 images, 3 with caption, 3 with label, 0 missing, 1 unreadable left out" in told.text


def test_what_is_no_archive_is_told_with_what_there_should_be(tmp_path):
    assert Told("verify", tmp_path / "nowhere").error.endswith("folder of the unpacked archives")
    error = Told("verify", tmp_path).error
    assert all(part in error for part in ("no known layout", "cub200: images.txt", "ade20k: ", "coco: ", "celebahq: "))
    error = Told("verify", tmp_path, dataset="celebahq").error
    assert error.startswith(
        f"celebahq is not in {tmp_path}, nor in {tmp_path}/CelebAMask-HQ: there should be CelebA-HQ"
    )
    assert "get it from https://github.com/switchablenorms/CelebAMask-HQ" in error


# ------------------------------------------------------------------------------------------------------------- prepare


def test_shards_serve_what_the_archive_serves(tmp_path):
    """Images that are not resized have the same bytes; captions and maps are the same."""
    for tree, fields in ((trees.cub200, ("caption",)), (trees.coco, ("caption", "segmentation"))):
        root, out = tmp_path / tree.__name__, tmp_path / f"100%{tree.__name__}"
        tree(root)
        assert Told("prepare", root, out=out, size=20, fields=fields).error == ""
        for split in ("train", "val"):
            archive, shards = (
                build_dataset(data, split=split, image_size=16, seed=3, fields=fields) for data in (root, out)
            )
            assert isinstance(archive, ArchiveDataset)
            assert isinstance(shards, ImageShards)
            assert len(archive) == len(shards)
            for index in range(2 * len(archive) if split == "train" else len(archive)):
                expected, found = archive[index], shards[index]
                assert (expected["image"].int() - found["image"].int()).abs().max() <= 2  # greyscale is coded anew
                assert expected["caption"] == found["caption"]
                if "segmentation" in fields:
                    assert torch.equal(expected["segmentation"], found["segmentation"])


def test_faces_are_made_small_with_their_maps_and_still_mirror(tmp_path):
    trees.celebahq(tmp_path / "faces")
    out = tmp_path / "shards"
    told = Told("prepare", tmp_path / "faces", out=out, size=16, workers=1)
    assert told.error == ""
    assert f"{out}: train: 3 images, 3 with segmentation, 0 missing, 0 unreadable left out, in 1 shards" in told.text
    manifest = json.loads((out / "regvq-data.json").read_bytes())
    assert manifest["dataset"] == "celebahq"
    assert manifest["classes"][4] == "l_eye"
    assert manifest["splits"]["val"] == {
        "official": "test",
        "images": 1,
        "segmentation": 1,
        "missing": 0,
        "unreadable": 0,
        "shards": 1,
    }
    faces = ImageShards(out, "train", 16, crop="center", fields=["segmentation"])
    eyes = {tuple(faces[k]["segmentation"][9].tolist()) for k in range(60)}
    assert eyes == {(4,) * 8 + (5,) * 8, (4,) * 8 + (1,) * 8, (1,) * 8 + (5,) * 8}
    (out / "regvq-data.json").write_text("{")
    with pytest.raises(ValueError, match=r"regvq-data\.json"):
        ImageShards(out / "train-000000.tar", "train", 16)


def test_what_cannot_be_read_or_has_no_map_is_counted(tmp_path):
    top = trees.ade20k(tmp_path / "ade")
    (top / "images" / "training" / "ADE_train_00000001.jpg").write_bytes(b"no image")
    trees.labels(top / "annotations" / "training" / "ADE_train_00000002.png", np.full((20, 24), 151))
    told = Told("prepare", top, out=tmp_path / "out", size=10)
    assert told.error == ""
    assert "train: 2 images, 1 with segmentation, 0 missing, 2 unreadable left out" in told.text
    assert re.search(r"left out .*ADE_train_00000001.jpg: it is no image$", told.text, re.MULTILINE)
    assert re.search(r"left out .*ADE_train_00000002.jpg: class ids of .* must be in 0..150", told.text)
    for image in (top / "images" / "validation").iterdir():
        image.write_bytes(b"no image")
    error = Told("prepare", top, out=tmp_path / "other", size=10).error
    assert re.search(r"\b2 validation images of ADE20K", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ade", "out"]  # nothing half-made is left


def test_missing_images_are_counted_and_a_field_that_nobody_has_is_an_error(tmp_path):
    top, out = trees.cub200(tmp_path / "cub"), tmp_path / "out"
    first = min((top / "images" / trees.BIRDS[1]).iterdir())  # birds with an odd number are for training
    first.unlink()
    for text in (tmp_path / "cub" / "text" / trees.BIRDS[0]).iterdir():
        text.unlink()
    error = Told("prepare", top, out=out).error
    assert error.startswith(f"no image of CUB-200-2011 in {top} (test) has its caption: get it from https://github.com")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cub"]  # nor is the other split packed before
    told = Told("prepare", top, out=out, fields=())
    assert told.error == ""
    assert f"1 of the 4 train images of CUB-200-2011 in {top} are missing (002." in told.text
    assert f"{out}: train: 3 images, 1 missing, 0 unreadable left out, in 1 shards" in told.text
    assert "of the 4 test images" not in told.text
    splits = json.loads((out / "regvq-data.json").read_bytes())["splits"]
    assert [splits[split]["missing"] for split in ("train", "val")] == [1, 0]
    assert ImageShards(out, "train", 16).title == str(out)  # which reads the manifest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_half_made_is_left_by_a_cluster_or_terminal_that_ends_the_job(tmp_path, monkeypatch, number):
    top = trees.cub200(tmp_path / "cub")
    before = signal.getsignal(number)
    monkeypatch.setattr(preparing, "write_shards", lambda *_: signal.raise_signal(number) or [Path()])
    with pytest.raises(SystemExit) as ended:
        run_command(
            "data", DataCommand, manage_data, "", ["prepare", "--root", str(top), "--out", str(tmp_path / "out")]
        )
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert [path.name for path in tmp_path.iterdir()] == ["cub"]


def test_one_of_several_archives_is_named_by_dataset(tmp_path, monkeypatch):
    trees.cub200(tmp_path)
    trees.celebahq(tmp_path)
    assert Told("verify", tmp_path).error.endswith("of one (`regvq data`: or give --dataset)")
    expect(monkeypatch, tmp_path / "CUB_200_2011", {"train": 4, "test": 4})
    assert Told("verify", tmp_path, dataset="cub200").error == ""


def test_settings_are_checked_before_anything_is_written(tmp_path):
    top = trees.cub200(tmp_path / "cub")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    out = tmp_path / "out"
    for options, message in (
        ({}, "name a new one with --out"),
        ({"out": tmp_path / "full"}, "full exists and is not an empty folder; name a new one"),
        ({"out": out, "size": 0}, "--size must be at least 1, got 0"),
        ({"out": out, "quality": 101}, "--quality must be between 1 and 100, got 101"),
        ({"out": out, "shard_mib": 0}, "--shard-mib must be at least 1, got 0"),
        ({"out": out, "workers": -1}, "--workers must not be negative, got -1"),
        ({"out": out, "decode": True}, "--decode is for verify"),
        ({"out": out, "fields": ("segmentation",)}, "--fields segmentation: CUB-200-2011 has caption, label only"),
    ):
        assert message in Told("prepare", top, **options).error
    assert re.search(rf"--out {out} .*prepare.*verify", Told("verify", top, out=out).error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cub", "full"]


def test_shards_take_the_place_of_an_empty_folder_or_say_before_that_they_cannot(tmp_path, monkeypatch):
    top, place = trees.cub200(tmp_path / "cub"), tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    refusal = f"--out {place} is a mount point or the current folder: name a new folder in it"
    with contextlib.chdir(place):
        assert Told("prepare", top, out=Path()).error == refusal
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == place)
        assert Told("prepare", top, out=tmp_path / "link").error == refusal
    assert not any(place.iterdir())
    assert Told("prepare", top, out=tmp_path / "link").error == ""
    assert list(place.glob("train-*.tar"))


def test_the_script_ends_with_a_status(tmp_path, monkeypatch, capsys):
    trees.cub200(tmp_path)
    flags = ["verify", "--root", str(tmp_path), "--fields", "caption"]
    with pytest.raises(SystemExit) as ended:
        run_command("data", DataCommand, manage_data, "", flags)
    assert str(ended.value).endswith("is incomplete: see above")
    expect(monkeypatch, tmp_path, {"train": 4, "test": 4})
    run_command("data", DataCommand, manage_data, "", flags)
    assert "5,994" not in capsys.readouterr().out.rsplit("what", 1)[1]
