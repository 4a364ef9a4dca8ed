"""Files that appear whole or not at all, and the user's cache."""

import os
import shutil
from pathlib import Path

import pytest

from regvq_fast.files import atomic_path, check_new_folder, kept_folder, user_cache


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


@pytest.mark.parametrize("when", ["between two files", "before the end"])
def test_a_folder_removed_while_it_is_filled_is_an_error(tmp_path: Path, when: str) -> None:
    """Even if it is there again, with another part of the files."""
    out = tmp_path / "out"
    with kept_folder(out) as check:
        (out / "0.png").touch()
        check()

    def replace() -> None:
        with kept_folder(out) as check:
            shutil.rmtree(out)
            out.mkdir()
            if when == "between two files":
                check()
                pytest.fail("not seen")

    with pytest.raises(FileNotFoundError, match=f"^--out {out} was removed"):
        replace()


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
