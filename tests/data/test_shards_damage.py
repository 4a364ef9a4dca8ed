"""Shards with corrupt members, truncated, damaged or gone: what is read, counted and named."""

import re
import tarfile

import pytest
from helpers.flat_images import level_of, levels_of
from helpers.shard_samples import FIELDS, sample

from regvq_fast.data import ImageShards, training_batches, write_shards


@pytest.fixture
def tar(tmp_path):
    """A shard of ten samples in a folder of its own; train and val files keep the splits out of the way."""
    write_shards([sample(100)], f"{tmp_path}/val-%d.tar")
    return write_shards([sample(10 * k) for k in range(10)], f"{tmp_path}/train-%d.tar")[0]


def member(path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as archive:
        return archive.getmember(name)


def test_a_corrupt_member_is_skipped_counted_and_named_once(tar, caplog):
    for name, data in (("030.png", b"no image"), ("050.seg.png", b"no image"), ("070.txt", b"\xff")):
        with tar.open("r+b") as file:
            file.seek(member(tar, name).offset_data)
            file.write(data)
    dataset = ImageShards(tar.parent, "train", 8, fields=FIELDS)
    assert sorted(levels_of(dataset)) == [0, 10, 20, 40, 40, 60, 60, 80, 80, 90]
    assert sorted(levels_of(dataset)) == [0, 10, 20, 40, 40, 60, 60, 80, 80, 90]
    assert dataset.unreadable == 3
    assert re.search(rf"030\.png of {tar} .*no image", sorted(caplog.messages)[0])
    assert [message.split()[3] for message in sorted(caplog.messages)] == ["030.png", "050.png", "070.png"]


def test_workers_count_what_is_corrupt_in_the_parent(tar):
    with tar.open("r+b") as file:
        file.seek(member(tar, "030.png").offset_data)
        file.write(b"no image")
    dataset = ImageShards(tar.parent, "train", 8)
    batches = training_batches(dataset, 5, workers=2)
    assert sorted(level_of({"image": image}) for _ in range(2) for image in next(batches)["image"])[3:5] == [40, 40]
    assert dataset.unreadable == 1


@pytest.mark.parametrize("where", ["data", "header", "member's end"])
def test_a_truncated_shard_gives_its_whole_samples_and_is_named(tar, caplog, where):
    last = member(tar, "050.png")
    keep = {"data": last.offset_data + last.size - 1, "header": last.offset + 100, "member's end": last.offset}[where]
    tar.write_bytes(tar.read_bytes()[:keep])
    assert sorted(levels_of(ImageShards(tar.parent, "train", 8))) == [0, 10, 20, 30, 40]
    assert sorted(levels_of(ImageShards(tar.parent, "train", 8))) == [0, 10, 20, 30, 40]
    (message,) = caplog.messages  # though the second time the index came from the cache
    assert str(tar) in message
    assert "its 5 whole samples are used" in message


def test_a_shard_damaged_in_the_middle_or_throughout(tar, caplog):
    with tar.open("r+b") as file:
        file.seek(member(tar, "050.png").offset)
        file.write(bytes(range(256)) * 2)
    (tar.parent / "train-1.tar").write_text("<html>not found</html>" * 100)
    (tar.parent / "train-2.tar").touch()
    assert sorted(levels_of(ImageShards(tar.parent, "train", 8))) == [0, 10, 20, 30, 40]
    assert ["train-0.tar is damaged" in caplog.messages[0], len(caplog.messages)] == [True, 3]
    assert "train-1.tar is no whole" in caplog.messages[1]
    assert re.search(r"train-2\.tar .*empty file.*\b0 ", caplog.messages[2])


def test_a_shard_that_shrinks_or_vanishes_during_training(tar):
    dataset = ImageShards(tar.parent, "train", 8, fields=["caption"])
    end = member(tar, "050.txt").offset_data + len("number")
    tar.write_bytes(tar.read_bytes()[:end])
    assert sorted(levels_of(dataset)) == sorted([0, 10, 20, 30, 40, 0, 0, 0, 0, 0])  # half a caption is none
    tar.unlink()
    with pytest.raises(ValueError, match=r"\b10 .*'train'"):
        levels_of(dataset)
