import io
import os
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from regvq_fast.data import shard_index, write_shards
from regvq_fast.data.shard_index import INDEX_NAME, load_indexes, member_name, read_index
from regvq_fast.files import atomic_path


def pack(folder, samples=4, name="s", first=0) -> list[Path]:
    """Shards of two samples each; no image is decoded here."""
    data = {"png": b"1" * 600, "txt": "22"}
    return write_shards(
        ({"__key__": f"{k:02d}", **data} for k in range(first, first + samples)), f"{folder}/{name}-%d.tar", 6000
    )


@pytest.fixture
def reads(monkeypatch):
    """Names of the shards whose headers were read."""
    names = []
    monkeypatch.setattr(shard_index, "read_index", lambda path: names.append(path.name) or read_index(path))
    return names


def test_entries_say_where_the_parts_are(tmp_path):
    shard, *_ = pack(tmp_path)
    entries, damage, left_out, labels = read_index(shard)
    assert damage == ""
    assert not left_out
    assert labels == []
    assert len(entries) == 2
    with tarfile.open(shard) as archive:
        for entry, key in zip(entries, ("00", "01"), strict=True):
            image, text = archive.getmember(f"{key}.png"), archive.getmember(f"{key}.txt")
            assert tuple(entry["image"]) == (image.offset_data, 600)
            assert tuple(entry["caption"]) == (text.offset_data, 2)
            assert entry["segmentation"]["offset"] == -1
            assert entry["label"] == -1
            assert member_name(shard, image.offset_data) == f"{key}.png"
    assert entries["hash"][0] != entries["hash"][1]
    assert member_name(shard, 700) == "byte 700"


def test_an_index_is_read_once_and_again_after_a_change(tmp_path, reads):
    shards = pack(tmp_path)
    first = load_indexes(shards)
    assert sorted(reads) == ["s-0.tar", "s-1.tar"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == [INDEX_NAME]
    reads.clear()
    for index, again in zip(first, load_indexes(shards), strict=True):
        assert np.array_equal(index.entries, again.entries)
        assert index.damage == again.damage
    assert reads == []

    shards[1].unlink()
    pack(tmp_path / "new", samples=2, first=7)[0].rename(shards[1])  # same size, another time
    os.utime(shards[1], ns=(time.time_ns(), time.time_ns() + 10**9))
    entries = load_indexes(shards)[1].entries
    assert reads == ["s-1.tar"]
    assert not np.array_equal(entries["hash"], first[1].entries["hash"])
    reads.clear()

    status = shards[0].stat()  # another size, same time
    with tarfile.open(shards[0], "a") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    with shards[0].open("ab") as file:
        file.write(bytes(10240))
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(load_indexes(shards)[0].entries) == 3
    assert reads == ["s-0.tar"]


def test_one_file_serves_every_selection_of_a_folder(tmp_path, reads):
    shards = pack(tmp_path, samples=8)
    load_indexes(shards[:2])
    load_indexes(shards[1:])
    assert sorted(reads) == ["s-0.tar", "s-1.tar", "s-2.tar", "s-3.tar"]
    shards[0].unlink()
    elsewhere = pack(tmp_path / "more", samples=2)
    reads.clear()
    load_indexes([*shards[1:], *elsewhere])
    assert reads == ["s-0.tar"]  # of the other folder
    assert (elsewhere[0].parent / INDEX_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_an_unusable_cache_is_replaced(tmp_path, reads, content):
    shards = pack(tmp_path)
    load_indexes(shards)
    cache = tmp_path / INDEX_NAME
    cache.write_bytes(cache.read_bytes()[:-100] if content is None else content)
    reads.clear()
    load_indexes(shards)
    assert len(reads) == 2
    load_indexes(shards)
    assert len(reads) == 2


def test_random_damage_of_the_cache_never_passes_for_an_index(tmp_path, reads):
    shards = pack(tmp_path)
    expected = load_indexes(shards)
    cache = tmp_path / INDEX_NAME
    whole = cache.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        cache.write_bytes(damaged)
        for found, wanted in zip(load_indexes(shards), expected, strict=True):
            assert np.array_equal(found.entries, wanted.entries)
            assert found.damage == ""
    assert len(reads) > 100  # most of it was noticed, and the shards were read anew


def test_a_folder_that_cannot_be_written_is_indexed_elsewhere(tmp_path, reads, monkeypatch, caplog):
    shards = pack(tmp_path / "data")
    load_indexes(shards)
    os.utime(shards[0], ns=(0, 0))  # what lies in the folder is out of date
    reads.clear()

    def write_elsewhere_only(path):  # root may write anywhere
        if path.parent == tmp_path / "data":
            raise PermissionError(f"read-only: {path}")
        return atomic_path(path)

    monkeypatch.setattr(shard_index, "atomic_path", write_elsewhere_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_indexes(shards)
    load_indexes(shards)
    assert reads == ["s-0.tar"]
    assert len(list((tmp_path / "cache" / "regvq_fast" / "shards").glob("*.npz"))) == 1
    assert caplog.messages == []

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_indexes(shards)
    load_indexes(shards)
    assert reads == ["s-0.tar"] * 3
    assert "can't be kept" in caplog.messages[0]


def test_many_shards_show_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shards = pack(tmp_path, samples=24)
    load_indexes(shards[:3])
    assert capsys.readouterr().err == ""
    load_indexes(shards)
    assert "indexing shards" in capsys.readouterr().err


def test_a_name_that_comes_again_begins_another_sample(tmp_path):
    """Concatenated tar files, and ones that tar -r added to: each image keeps the files that came with it."""
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for k, names in enumerate(["a.jpg a.txt a.seg.png a.cls", "a.txt a.jpg a.seg.png a.cls b.jpg", "a.jpg a.webp"]):
            for name in names.split():
                member = tarfile.TarInfo(name)
                member.size = k + 1
                archive.addfile(member, io.BytesIO(str(k).encode() * (k + 1)))
    entries, _, _, labels = read_index(shard)
    assert entries["image"]["size"].tolist() == [1, 2, 2, 3, 3]
    assert entries["caption"]["size"].tolist() == [1, 2, 0, 0, 0]
    assert entries["segmentation"]["size"].tolist() == [1, 2, 0, 0, 0]
    assert [labels[k] if k >= 0 else None for k in entries["label"]] == ["0", "11", None, None, None]


@pytest.mark.parametrize("name", ["a.png", "a.txt", "notes", "x" * 300])
def test_a_negative_size_is_damage(tmp_path, name):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for key in ("00.png", name):
            member = tarfile.TarInfo(key)
            member.size = 600
            archive.addfile(member, io.BytesIO(b"1" * 600))
    content = bytearray(shard.read_bytes())
    header = bytearray(content[1536:2048])
    header[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    content[1536:2048] = header
    shard.write_bytes(content)
    entries, damage, *_ = read_index(shard)
    assert len(entries) == 1
    assert "negative size" in damage
