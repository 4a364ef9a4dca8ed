"""One owner a folder: who is refused, and when an owner is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import FAST, checkpoints, records, resume, train

from regvq_fast import ownership
from regvq_fast.ownership import FolderLock, check_free
from regvq_fast.paper.commands import Commands
from regvq_fast.paper.stages import Pipeline, Stage

OWNS = """
import sys, time
from pathlib import Path
from regvq_fast.ownership import FolderLock
with FolderLock(Path(sys.argv[1]), "run"):
    print("owned", flush=True)
    time.sleep(100)
"""
LOCK = ".run.lock"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that owns the folder "run"."""
    command = [sys.executable, "-c", OWNS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "owned\n"
        yield process
        process.kill()


@pytest.mark.parametrize("where", ["Thread.start", "Event.set"])
def test_ctrl_c_while_a_folder_is_locked_or_released_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Elsewhere the folder would count as in use for ten minutes. 3 of 20 tries on a busy machine."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def lock() -> None:
        if where == "Thread.start":
            monkeypatch.setattr(f"threading.{where}", interrupted)
        with FolderLock(tmp_path, "run"):
            monkeypatch.setattr(f"threading.{where}", interrupted)

    with pytest.raises(KeyboardInterrupt):
        lock()
    assert not (tmp_path / LOCK).exists()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path, owner: "subprocess.Popen[str]") -> None:
    host = os.uname().nodename
    with pytest.raises(FileExistsError, match=rf"run is in use by process {owner.pid} on {host} \(.*--out"):
        FolderLock(tmp_path / "run", "run")
    with pytest.raises(FileExistsError, match=str(owner.pid)):
        check_free(tmp_path / "run", "run")
    with FolderLock(tmp_path / "run", "evaluation"):
        assert len(list((tmp_path / "run").iterdir())) == 2
    owner.send_signal(signal.SIGINT)
    owner.wait(30)
    assert not list((tmp_path / "run").iterdir()), "released by the end of the process"


def test_an_owner_that_was_killed_is_gone_at_once(tmp_path: Path, owner: "subprocess.Popen[str]") -> None:
    owner.kill()
    owner.wait()
    assert (tmp_path / "run" / LOCK).exists()
    check_free(tmp_path / "run", "run")
    with FolderLock(tmp_path / "run", "run"), pytest.raises(FileExistsError, match=str(os.getpid())):
        FolderLock(tmp_path / "run", "run")
    assert not list((tmp_path / "run").iterdir())


def other(tmp_path: Path, seconds_ago: float, **changes: Any) -> Path:
    """Return a folder whose lock is that of another process."""
    owner = {**ownership._this_process(), "command": "regvq train vq", **changes}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    os.utime(tmp_path / LOCK, (time.time() - seconds_ago,) * 2)
    return tmp_path


def test_a_process_with_the_number_of_a_dead_one_is_not_the_owner(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        FolderLock(other(tmp_path, 9999), "run")
    FolderLock(other(tmp_path, 0, started="1"), "run").release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "gone"), [(0, False), (500, False), (700, True)])
def test_an_owner_elsewhere_is_gone_when_it_gives_no_sign_of_life(tmp_path: Path, seconds: float, gone: bool) -> None:
    folder = other(tmp_path, seconds, host="far", machine="another", started="1")
    if gone:
        FolderLock(folder, "run").release()
    else:
        with pytest.raises(FileExistsError, match=rf"on far .*delete {folder / LOCK}.* {seconds} seconds ago"):
            FolderLock(folder, "run")
    assert [path.name for path in folder.iterdir()] == ([] if gone else [LOCK])


def test_a_running_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_TOUCH_SECONDS", 0.01)
    with FolderLock(tmp_path, "run"):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_is_being_written_counts_and_one_that_never_was_does_not(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with pytest.raises(FileExistsError, match="unknown"):
        FolderLock(tmp_path, "run")
    os.utime(tmp_path / LOCK, (time.time() - 20,) * 2)
    FolderLock(tmp_path, "run").release()


def test_an_owner_that_was_paused_finds_that_another_took_over(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "run") as lock:
        lock.check()
        (tmp_path / LOCK).unlink()
        lock.check()
        assert (tmp_path / LOCK).exists()
        other(tmp_path, 0, host="far", machine="another")
        with pytest.raises(FileExistsError, match="on far"):
            lock.check()
    assert (tmp_path / LOCK).exists(), "the other one's"


def test_the_second_of_two_runs_is_refused(tmp_path: Path, owner: "subprocess.Popen[str]") -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=f"error: .*in use by process {owner.pid}"):
        train(*FAST, "--out", out)
    assert [path.name for path in out.iterdir()] == [LOCK]
    owner.kill()
    owner.wait()
    (out / ".config.123.json").write_text("{")  # killed while it wrote its first file
    train(*FAST, "--out", out)
    assert not list(out.rglob(".*"))
    before = (out / "metrics.jsonl").read_bytes()
    other(out, 0, host="far", machine="another")
    with pytest.raises(SystemExit, match=r"error: .* on far"):
        resume(out, "--steps", 6)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert checkpoints(out) == ["step-0000004"]
    assert records(out)


def test_a_stage_of_the_paper_does_not_remove_a_run_that_is_alive(
    tmp_path: Path, owner: "subprocess.Popen[str]"
) -> None:
    stage = Stage("tokenizer", "train vq", (), tmp_path / "run", tmp_path / "run" / "summary.json", trains=True)
    with pytest.raises(FileExistsError, match=str(owner.pid)):
        Pipeline(tmp_path, (stage,)).run(stage, (), Commands())
    assert (tmp_path / "run" / LOCK).exists()
    other_row = FolderLock(tmp_path, "row")
    with pytest.raises(FileExistsError, match=str(os.getpid())):
        Pipeline(tmp_path, (stage,)).run(stage, (), Commands())
    other_row.release()
