"""Files that appear whole or not at all, and the user's cache."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from regvq_fast.files import atomic_folder, atomic_path, check_new_folder, kept_folder, user_cache


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    with path.open() as reader:
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text("new")
        assert reader.read() == "old"  # replaced, not written into: whoever reads it has one version or the other
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_what_is_there_is_not_written_into(tmp_path: Path) -> None:
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"^--out {out} .*or else$"):
            check_new_folder(out, "or else")


@pytest.mark.parametrize("folder", [kept_folder, atomic_folder])
@pytest.mark.parametrize("when", ["before a file", "between two files", "before the end"])
def test_a_folder_removed_while_it_is_filled_is_an_error(tmp_path: Path, when: str, folder: Any) -> None:
    """Even if it is there again, with another part of the files."""
    out = tmp_path / "out"

    def fill() -> None:
        with folder(out) as yielded:
            inside = out if folder is kept_folder else yielded
            shutil.rmtree(inside)
            if when == "before a file":
                (inside / "0.png").touch()
            inside.mkdir()
            (inside / "1.png").touch()
            if when == "between two files" and folder is kept_folder:
                yielded()
                pytest.fail("not seen")

    with pytest.raises(FileNotFoundError, match=f"^--out {out} was removed"):
        fill()


@pytest.mark.parametrize("folder", [kept_folder, atomic_folder])
def test_a_folder_emptied_while_it_is_filled_is_an_error(tmp_path: Path, folder: Any) -> None:
    """`rm -r` leaves the folder itself if another file appears in it meanwhile."""
    out = tmp_path / "out"

    def fill() -> None:
        with folder(out) as yielded:
            inside = out if folder is kept_folder else yielded
            for path in inside.iterdir():
                path.unlink()
            (inside / "1.png").touch()

    with pytest.raises(FileNotFoundError, match=f"^--out {out} was removed"):
        fill()


def test_a_kept_folder_is_filled_by_one_process_only(tmp_path: Path) -> None:
    """Two that began at once would mix their files in silence."""
    out = tmp_path / "out"
    with kept_folder(out) as check:
        (out / "0.png").touch()
        check()
        with pytest.raises(FileExistsError, match="in use by process"), kept_folder(out):
            pytest.fail("both fill it")
    assert os.listdir(out) == ["0.png"]
    with pytest.raises(FileExistsError, match="not an empty folder"), kept_folder(out):  # the other one has just ended
        pytest.fail("both fill it")
    with kept_folder(tmp_path / "unused"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path) -> None:
    """With a file that `ls` doesn't show, the work was lost at its end."""
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(FileExistsError, match=f"^--out {tmp_path} has hidden files"), atomic_folder(tmp_path):
        pytest.fail("it can't be replaced")
    out = tmp_path / "out"

    def fill() -> None:
        with atomic_folder(out):
            out.mkdir()
            (out / "of another process").touch()

    with pytest.raises(FileExistsError, match=f"^--out {out} exists and is not an empty folder"):
        fill()
    assert sorted(os.listdir(tmp_path)) == [".DS_Store", "out"]


def test_temporary_files_of_processes_with_one_number_differ(tmp_path: Path) -> None:
    """Containers that share a disk number their processes alike, and a killed one leaves its folder."""
    out = tmp_path / f"{'é' * 125}.png"
    with atomic_path(out) as first, atomic_path(out) as second:
        assert first != second
        for path in (first, second):
            path.write_text(path.name)
    assert out.exists()

    def fill_twice() -> None:
        with atomic_folder(tmp_path / "two") as first, atomic_folder(tmp_path / "two") as second:
            assert first != second
            for path in (first, second):
                (path / "file").touch()

    with pytest.raises(FileExistsError, match="not an empty folder"):
        fill_twice()


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("fid") == tmp_path / "regvq_fast" / "fid"
    assert not user_cache("fid").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert user_cache("fid") == tmp_path / "me" / ".cache" / "regvq_fast" / "fid"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home directory
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        user_cache("fid")
