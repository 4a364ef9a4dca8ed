"""Shards must serve what a folder of the same files serves: layouts, splits, errors and writing."""

import io
import logging
import pickle
import re
import tarfile

import pytest
import torch
from helpers.flat_images import encode_flat, level_of, levels_of
from helpers.shard_samples import FIELDS, sample
from torch.utils.data import DataLoader

from regvq_fast.data import ImageFolder, ImageShards, training_batches, write_shards
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.image_files import left_out_note
from regvq_fast.data.loading import collate
from regvq_fast.data.shards import expand_braces


@pytest.fixture
def both(tmp_path):
    """80 samples as files in folders, and the same packed into shards of 30."""
    samples = [sample(k, "ab"[k // 40] + "/") for k in range(80)]
    for one in samples:
        for extension in ("png", "txt", "seg.png"):
            path = tmp_path / "files" / f"{one['__key__']}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = one[extension]
            path.write_bytes(data.encode() if isinstance(data, str) else data)
    size = sum(512 * (1 + -(-len(samples[0][extension]) // 512)) for extension in ("png", "txt", "seg.png"))
    shards = write_shards(samples, f"{tmp_path}/shards/s-%03d.tar", 30 * size)
    assert len(shards) == 3
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_serve_what_the_folder_serves(both, split):
    options = {"split": split, "image_size": 16, "seed": 3, "fields": FIELDS}
    folder, shards = ImageFolder(both / "files", **options), ImageShards(both / "shards", **options)
    assert len(shards) == len(folder) == (77 if split == "train" else 3)
    for index in range(2 * len(folder) if split == "train" else len(folder)):
        expected, found = folder[index], shards[index]
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["segmentation"], expected["segmentation"])
        assert found["caption"] == expected["caption"] == f"number {level_of(found)}"
        assert (found["segmentation"] == level_of(found)).all()


def test_ranks_with_workers_cover_each_sample_once(both):
    dataset = ImageShards(both / "shards", "train", 8)
    count = len(dataset)
    ranks = [training_batches(dataset, 4, start=4 * rank, stride=8, workers=2) for rank in range(2)]
    together = torch.cat([next(ranks[k % 2])["image"] for k in range(-(-2 * count // 4))])[: 2 * count]
    alone = torch.cat([next(batches)["image"] for batches in [training_batches(dataset, 2 * count)]])
    assert torch.equal(together, alone)
    served = sorted(level_of({"image": image}) for image in alone)
    assert served[::2] == served[1::2] == sorted(set(served))
    assert len(set(served)) == count


def test_spawned_workers_and_pickling(both):
    dataset = ImageShards(both / "shards", "val", 8, fields=FIELDS)
    loader = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    (batch,) = loader
    assert torch.equal(batch["image"], torch.stack([dataset[k]["image"] for k in range(3)]))
    with pytest.raises(RuntimeError):  # only worker processes inherit what is shared
        pickle.dumps(dataset)


def test_webdataset_writes_what_is_read_and_reads_what_is_written(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    samples = [sample(k) for k in range(6)]
    with webdataset.ShardWriter(f"{tmp_path}/theirs-%06d.tar", maxcount=4, verbose=0) as writer:
        for one in samples:
            writer.write(one)
    ours = ImageShards(f"{tmp_path}/theirs-{{000000..000001}}.tar", "val", 8, limit=6)
    training = ImageShards(f"{tmp_path}/theirs-{{000000..000001}}.tar", "train", 8, flip=False, fields=FIELDS)
    assert sorted(levels_of(ours) + levels_of(training)) == list(range(6))
    assert all(training[k]["caption"] == f"number {level_of(training[k])}" for k in range(len(training)))

    paths = write_shards(samples, f"{tmp_path}/ours-%d.tar")
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [{key: one[key] for key in ("__key__", "png", "seg.png")} for one in theirs] == [
        {key: one[key] for key in ("__key__", "png", "seg.png")} for one in samples
    ]
    assert [one["txt"] for one in theirs] == [one["txt"].encode() for one in samples]


# --------------------------------------------------------------------------------------------------- layout and splits


def add(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_plain_tar_files_in_any_order(tmp_path):
    """As `tar cf 0.tar .` makes them, of a folder that also holds other things."""
    long = "d" * 120 + "/" + "e" * 120 + "/1.JPG"
    members = {
        "./a/0.txt": b" a caption\n",
        "./a/0.json": b"{}",
        "./a/._0.png": b"a Mac was here",
        "./a/2.depth.png": encode_flat(90),
        "./b.c/0.png": encode_flat(20),
        "./a/0.png": encode_flat(10),
        "./a/0.seg.png": encode_flat(1, mode="L"),
        long: encode_flat(40, suffix="JPEG"),
    }
    add(tmp_path / "train-0.tar", members)
    with tarfile.open(tmp_path / "train-0.tar", "a") as archive:
        link = tarfile.TarInfo("a/5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("a"))
    add(tmp_path / "val-0.tar", {"0.png": encode_flat(0)})
    assert sorted(levels_of(ImageShards(tmp_path, "train", 8))) == [10, 20, 40]
    (only,) = (ImageShards(tmp_path, "train", 8, fields=FIELDS)[k] for k in range(1))
    assert (level_of(only), only["caption"], int(only["segmentation"][0, 0])) == (10, "a caption", 1)


def test_samples_without_a_field_are_left_out_with_a_warning(tmp_path, caplog):
    captions = [{"txt": f"number {k}"} if k % 3 else {} for k in range(9)]
    write_shards(
        [{"__key__": str(k), "png": encode_flat(k), **caption} for k, caption in enumerate(captions)],
        f"{tmp_path}/train-%d.tar",
        8000,
    )
    write_shards([sample(0)], f"{tmp_path}/val-%d.tar")
    dataset = ImageShards(tmp_path, "train", 8, fields=["caption"])
    assert {dataset[k]["caption"] for k in range(6)} == {f"number {k}" for k in (1, 2, 4, 5, 7, 8)}
    (said,) = caplog.messages
    assert re.search(rf"\b3 of 9 .*{tmp_path}: .*caption", said)
    told = r"none of the 9 images in .* has its caption and segmentation: .* NAME.txt beside NAME.jpg, and NAME.seg.png"
    with pytest.raises(FileNotFoundError, match=told):
        ImageShards(tmp_path, "train", 8, fields=FIELDS)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/%d.tar", "val/%d.tar"),
        ("birds-train-%d.tar", "birds-validation-%d.tar"),
        ("test_of_train2017/x-%d.tar", "test_of_val2017/x-%d.tar"),
    ],
)
def test_the_shards_own_splits(tmp_path, train, val):
    write_shards([sample(k) for k in range(6)], f"{tmp_path}/{train}", 8000)
    write_shards([sample(k) for k in range(10, 14)], f"{tmp_path}/{val}", 8000)
    write_shards([sample(200)], f"{tmp_path}/extra-%d.tar")
    assert sorted(levels_of(ImageShards(tmp_path, "train", 8))) == [0, 1, 2, 3, 4, 5]
    assert levels_of(ImageShards(tmp_path, "val", 8)) == [10, 11, 12, 13]
    assert levels_of(ImageShards(tmp_path, "val", 8, limit=2)) == [10, 12]


def test_one_split_alone_is_divided_by_hash_whatever_the_packing(tmp_path):
    samples = [sample(k) for k in range(60)]
    write_shards(samples, f"{tmp_path}/a/train-%d.tar")
    write_shards(reversed(samples), f"{tmp_path}/b/train-%d.tar", 20000)
    (tmp_path / "c").mkdir()
    add(tmp_path / "c" / "train-0.tar", {f"./{one['__key__']}.png": one["png"] for one in samples})
    held_out = [sorted(levels_of(ImageShards(tmp_path / name, "val", 8))) for name in "abc"]
    assert held_out[0] == held_out[1] == held_out[2]
    training = sorted(levels_of(ImageShards(tmp_path / "a" / "train-0.tar", "train", 8)))
    assert sorted(training + held_out[0]) == list(range(60))


def test_a_pattern_of_absolute_paths_has_splits_too(tmp_path):
    for split, level in (("train", 1), ("val", 2)):
        write_shards([sample(level)], f"{tmp_path}/{split}-%d.tar")
    pattern = f"{{{tmp_path}/train,{tmp_path}/val}}-0.tar"
    assert [levels_of(ImageShards(pattern, split, 8)) for split in ("train", "val")] == [[1], [2]]


def test_what_data_stands_for(both):
    options = {"split": "val", "image_size": 8, "length": 2}
    for source in ("shards", "shards/s-{000..002}.tar", "shards/s-000.tar"):
        dataset = build_dataset(both / source, **options, fields=["caption"])
        assert isinstance(dataset, ImageShards)
        assert dataset[0].keys() == {"image", "caption"}
        assert len(dataset) <= 2
    add(both / "files" / "a" / "backup.tar", {})
    assert isinstance(build_dataset(both / "files", **options), ImageFolder)
    (both / "nested" / "deeper").mkdir(parents=True)
    (both / "shards" / "s-000.tar").rename(both / "nested" / "deeper" / "0.tar")
    assert isinstance(build_dataset(both / "nested", **options), ImageShards)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s.tar", ["s.tar"]),
        ("s-{8..11}.tar", ["s-10.tar", "s-11.tar", "s-8.tar", "s-9.tar"]),
        ("s-{008..11}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a{0..1},b}", ["a0", "a1", "b"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["s-{0..2.tar", "s-0}.tar", "s-{}.tar", "s-{0-9}.tar", "s-{9..0}.tar", "{0..9999999}"]
)
def test_braces_that_mean_nothing(pattern):
    with pytest.raises(ValueError, match="expand"):
        expand_braces(pattern)


def test_missing_shards_are_named(both):
    (both / "shards" / "s-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"\b1 .*\b3 shards .*s-001\.tar$"):
        ImageShards(f"{both}/shards/s-{{000..002}}.tar")
    with pytest.raises(FileNotFoundError, match=r"97 of the 99 .*s-001\.tar, .*s-003\.tar, .*s-004\.tar, \.\.\.$"):
        ImageShards(f"{both}/shards/s-{{000..098}}.tar")
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        build_dataset(both / "gone.tar", split="val", image_size=8)


def test_folders_and_shards_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tar files"):
        ImageShards(tmp_path)
    add(tmp_path / "0.tar", {"notes.txt": b"", "photo.v1.jpg": encode_flat(0)})
    with pytest.raises(FileNotFoundError, match=r"\b1 tar files .*KEY"):
        ImageShards(tmp_path)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, compression):
    with tarfile.open(tmp_path / f"0.tar.{compression}", f"w:{compression}") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=rf"0\.tar\.{compression} "):
        build_dataset(tmp_path, split="train", image_size=8)


def test_bad_arguments_name_the_value(both):
    for arguments, message in (
        ({"split": "dev"}, "'dev'"),
        ({"crop": "corner"}, "'corner'"),
        ({"fields": ["depth"]}, "'depth'"),
        ({"image_size": 0}, "got 0"),
        ({"limit": 0}, "got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageShards(both / "shards", **arguments)


# ------------------------------------------------------------------------------------------------------------- writing


def test_writing_is_atomic_repeatable_and_keeps_to_the_size(tmp_path):
    def failing():
        yield from (sample(k) for k in range(5))
        raise OSError("the source went away")

    with pytest.raises(OSError, match="the source went away"):
        write_shards(failing(), f"{tmp_path}/s-%d.tar", 10000)
    assert [path.name for path in tmp_path.iterdir()] == ["s-0.tar"]  # whole; the second was not
    with pytest.raises(FileExistsError, match=r"s-0\.tar exists"):
        write_shards([sample(0)], f"{tmp_path}/s-%d.tar")
    again = [write_shards([sample(k) for k in range(9)], f"{tmp_path}/{name}/%d.tar", 10000) for name in "ab"]
    assert len(again[0]) > 2
    assert [path.read_bytes() for path in again[0]] == [path.read_bytes() for path in again[1]]
    assert max(path.stat().st_size for path in again[0]) <= 10240  # what tar rounds sizes up to
    assert len(write_shards([sample(0), sample(1)], f"{tmp_path}/small-%d.tar", 1)) == 2
    assert write_shards([], f"{tmp_path}/none-%d.tar") == []


def test_writing_refuses_what_could_not_be_read_back(tmp_path):
    for pattern in ("s.tar", "s-%d-%d.tar", "s-%q.tar"):
        with pytest.raises(ValueError, match="pattern"):
            write_shards([], pattern)
    for key in ("", "a.b", "a/", "a/.b"):
        with pytest.raises(ValueError, match="__key__"):
            write_shards([{"__key__": key, "png": b""}], f"{tmp_path}/s-%d.tar")
    with pytest.raises(ValueError, match=r"'000' .*0\.tar"):
        write_shards([sample(0), sample(0)], f"{tmp_path}/s-%d.tar")
    assert not list(tmp_path.iterdir())


def test_a_training_set_logs_nothing_of_sound_shards(both, caplog):
    with caplog.at_level(logging.WARNING, logger="regvq_fast"):
        levels_of(ImageShards(both / "shards", "train", 8, fields=FIELDS))
    assert caplog.messages == []


def test_images_that_shards_leave_out_are_counted_and_kept_in_the_index(tmp_path):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for name in ("1.png", "2.png", "22.05.jpg", "3.avif", "4.JPE", "1.seg.png", "1.txt", "1.json", ".5.avif"):
            data = encode_flat(9)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind in (("6.png", tarfile.LNKTYPE), ("7.png", tarfile.SYMTYPE), ("notes", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.png"
            archive.addfile(member)
    for _ in range(2):  # the second time from the index in the folder
        splits = [ImageShards(shard, split, 8) for split in ("train", "val")]
        note = "; left out: 5 files (2 tar links, 1 .avif, 1 .jpe, 1 dotted name)"
        assert left_out_note(*splits) == note
