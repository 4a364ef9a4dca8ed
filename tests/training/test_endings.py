"""Every way in which a run can end says why, and how to go on; data workers that fail or hang included."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import FAST, SCRIPT, TINY, assert_same_run, checkpoints, resume, train
from PIL import Image

from regvq_fast.data import workers
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe

EVERY_STEP = ["--checkpoint-every", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        (folder / split).mkdir()
        for k in range(6):
            pixels = np.random.default_rng(k).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{k}.png")
    return folder


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[Trainer[Any]], object]) -> None:
    """Do something before a step, once."""
    original = Trainer.step

    def step(trainer: Trainer[Any], now: int) -> None:
        if now == number:
            monkeypatch.setattr(Trainer, "step", original)
            action(trainer)
        original(trainer, now)

    monkeypatch.setattr(Trainer, "step", step)


def stopped(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """Return the line with which a run that fails ends."""
    with pytest.raises(SystemExit) as stop:
        train(*FAST, *EVERY_STEP, *flags)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("a bug\nin two lines"), "RuntimeError: a bug; its traceback is in .*/traceback.txt"),
        (AssertionError(), "AssertionError: no message; its traceback is in .*/traceback.txt"),
        (MemoryError(), "out of memory at a peak of .* add --activation-checkpointing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory at a peak of "),
        (KeyError("x"), "KeyError: 'x'; its traceback is in"),
    ],
)
def test_an_error_in_a_step_says_why_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, why: str
) -> None:
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda _: monkeypatch.setattr(VQGANRecipe, "step", broken(error)))
    line = stopped(capsys, "--out", out)
    command = f"python train/vq.py --resume --out {out}"
    assert re.fullmatch(f"stopped after step 2: {why}.*; to continue from step-0000002: {command}", line)
    if "traceback" in why:
        assert "in broken" in (out / "traceback.txt").read_text() or "in fail" in (out / "traceback.txt").read_text()
    else:
        assert not (out / "traceback.txt").exists()


def test_a_killed_worker_ends_the_run_in_a_sentence_and_it_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", photos, "--workers", 1, "--steps", 9)
    train(*FAST, *EVERY_STEP, *data, "--out", tmp_path / "whole")
    out = tmp_path / "run"

    def kill(trainer: Any) -> None:
        os.kill(trainer._batches._batches._batches._workers[0].pid, signal.SIGKILL)

    at_step(monkeypatch, 2, kill)
    line = stopped(capsys, *data, "--out", out)
    assert re.search(
        r"stopped after step \d+: data worker 0 .* ended by SIGKILL; --workers 0 .*to continue from step-", line
    )
    resume(out)
    assert_same_run(tmp_path / "whole", out)


def test_a_worker_that_is_stopped_is_named_and_the_run_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 1.0)
    pids = []

    def pause(trainer: Any) -> None:
        pids.append(trainer._batches._batches._batches._workers[0].pid)
        os.kill(pids[0], signal.SIGSTOP)

    at_step(monkeypatch, 2, pause)
    flags = ("--data", photos, "--workers", 1, "--steps", 99, "--checkpoint-every", 0)
    line = stopped(capsys, *flags, "--out", tmp_path / "run")
    assert f"no data for 1 seconds: data worker 0 (process {pids[0]}) is stopped; to continue from step-" in line
    assert len(checkpoints(tmp_path / "run")) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("count", [0, 1])
def test_a_signal_is_obeyed_while_data_are_waited_for(tmp_path: Path, photos: Path, count: int) -> None:
    """The storage hangs, as it does for who opens a FIFO."""
    data, out = tmp_path / "photos", tmp_path / "run"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in (photos / split).iterdir():
            (data / split / path.name).write_bytes(path.read_bytes())
    flags = [*TINY, *FAST, "--steps", "9999", "--data", data, "--workers", count, "--out", out]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step 4/"):
                break
        for path in (data / "train").iterdir():
            path.unlink()
            os.mkfifo(path)
        size, quiet_since = -1, time.monotonic()
        while time.monotonic() < quiet_since + 3:  # until nothing more is done
            if (now := (out / "metrics.jsonl").stat().st_size) != size:
                size, quiet_since = now, time.monotonic()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    (saved,) = checkpoints(out)
    assert re.search(rf"stopped by SIGTERM after step \d+ of 9999; to continue from {saved}: ", said.splitlines()[-1])


def test_a_disk_that_hangs_is_not_waited_for_without_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(trainer: Any) -> None:
        monkeypatch.setattr(workers, "PATIENCE_SECONDS", 1.0)
        monkeypatch.setattr(type(trainer.data.train), "__getitem__", lambda *_: time.sleep(600))

    at_step(monkeypatch, 2, hang)
    line = stopped(capsys, "--workers", 0, "--checkpoint-every", 0, "--out", tmp_path / "run")
    assert "stopped after step 2: no data for 1 seconds: the disk doesn't answer; to continue from step-" in line
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.fixture
def little_shared_memory() -> list[str]:
    """The start of a command that runs with 200 KiB of shared memory."""
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        able = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("needs the right to mount a file system")
    return command


def test_little_shared_memory_is_a_sentence(tmp_path: Path, photos: Path, little_shared_memory: list[str]) -> None:
    flags = [*TINY, *FAST, "--data", photos, "--workers", "2", "--image-size", "128", "--batch-size", "16"]
    command = [*little_shared_memory, sys.executable, str(SCRIPT), *map(str, flags), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(
        r"stopped after step 0: a data worker found no room in shared memory \(/dev/shm has 0.2 MiB\): .*--workers",
        done.stderr.splitlines()[-1],
    )
