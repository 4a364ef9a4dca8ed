"""train/vq.py on several processes: what one process does, and how it ends."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import refusals_on_ranks
from helpers.runs import FAST, SCRIPT, TINY, checkpoints, records, resume, torchrun, train, without_clock
from PIL import Image
from safetensors.torch import load_file, save_file

from regvq_fast.models import VGGFeatures
from regvq_fast.ranks import all_gather_strings, raise_on_all_ranks

# Batch statistics are those of a rank's part: group norm has none.
RUN = [*TINY, *FAST, "--disc-norm", "group", "--disc-start", "1", "--kl-scope", "global", "--val-images", "5"]
RUN += ["--lecam-weight", "0.1", "--r1-weight", "0.01", "--r1-every", "2"]
RUN += ["--final-lr-fraction", "1"]  # else the rate depends on the number of steps


def run_on_ranks(*flags: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(SCRIPT, *flags, processes=processes), capture_output=True, text=True, timeout=300)


def assert_close_runs(one: Path, two: Path) -> None:
    """The same up to the order of sums; AdamW makes a whole step of the sign of a gradient that is all but zero."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    difference = sum(float((second[name] - value).square().sum()) for name, value in first.items())
    assert difference <= 1e-5 * sum(float(value.square().sum()) for value in first.values())
    assert len(records(one)) == len(records(two))
    for row, other in zip(records(one), records(two), strict=True):
        for name, value in without_clock([row])[0].items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=1e-5)), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(*RUN, "--out", out)
    return out


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_either_resumes_the_other(alone: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    done = run_on_ranks(*RUN, "--out", two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close_runs(alone, two)
    assert done.stdout.count("device  CPU, 2 processes with 2 images each") == 1
    assert json.loads((two / "summary.json").read_text())["images"] == 5
    assert checkpoints(two) == ["step-0000004"]
    assert not list(two.rglob(".*"))

    train(*RUN, "--out", tmp_path / "longer", "--steps", "6")
    resume(two, "--steps", "6")
    assert_close_runs(tmp_path / "longer", two)

    done = run_on_ranks("--resume", "--out", alone, "--steps", "6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close_runs(tmp_path / "longer", alone)


@contextmanager
def running_on_ranks(out: Path, *flags: object) -> Iterator["subprocess.Popen[str]"]:
    """A run on two processes that has records, and ends with the block."""
    command = torchrun(SCRIPT, *RUN, "--out", out, "--steps", "5000", *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 600
            while not (out / "metrics.jsonl").exists() or len(records(out)) < 2:
                assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()  # which torchrun passes on


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_refusal_is_one_sentence_and_resuming_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running_on_ranks(out) as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert re.search(r"SIGTERM .*step \d", errors)
    assert f"torchrun --nproc-per-node 2 train/vq.py --resume --out {out}" in " ".join(errors.split())
    saved = checkpoints(out)
    assert saved

    again = run_on_ranks(*RUN, "--out", out)
    assert again.returncode == 1
    assert again.stderr.count("not an empty folder") == 1

    steps = int(saved[-1].removeprefix("step-")) + 1
    resumed = run_on_ranks("--resume", "--out", out, "--steps", steps)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert checkpoints(out)[-1] == f"step-{steps:07d}"


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_in_a_sentence_and_the_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running_on_ranks(out, "--checkpoint-every", "1") as process:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(r"^stopped after step \d+: the connection to another process is lost.*--resume", errors, re.M)
    saved = checkpoints(out)
    resume(out, "--steps", int(saved[-1].removeprefix("step-")) + 1)


def test_what_one_process_finds_wrong_is_said_by_all(tmp_path: Path) -> None:
    save_file(VGGFeatures("vgg16").state_dict(), tmp_path / "rank-0.safetensors")
    for split in ("train", "val"):
        (tmp_path / "rank-0" / split).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "rank-0" / split / "a.png")
    command = torchrun(refusals_on_ranks.__file__, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.keys() == second.keys() == {"weights", "data", "stalled"}
    for name, said in first.items():
        assert said.partition(": ")[2] == second[name].partition(": ")[2], "rank 0 says what rank 1 found"
    assert re.search(f"^OSError: .*{tmp_path / 'rank-1.safetensors'}$", first["weights"])
    assert "rank-1" in first["data"]
    assert re.search("^ValueError: .*ImageNet VGG-16 and random VGG-16 ", first["stalled"])
    assert not [path for path in tmp_path.iterdir() if path.name in first], "written before the refusal"
    assert (tmp_path / "none" / "config.json").exists()


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("regvq_fast.training.optimization.world_size", lambda: 3)
    with pytest.raises(SystemExit, match=r"--batch-size 4 .*\b3 processes.* 3$"):
        train("--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_alone_there_is_nobody_to_agree_with() -> None:
    assert all_gather_strings("ä") == ["ä"]
    with pytest.raises(OSError, match="full"), raise_on_all_ranks():
        raise OSError("full")


def test_ranks_save_and_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = torchrun(SCRIPT, *TINY, *FAST, "--steps", 100_000, "--out", out)
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    start = time.monotonic()
    records = out / "metrics.jsonl"
    while not (records.exists() and records.read_bytes()):  # steps, which both ranks have done
        assert launcher.poll() is None
        assert time.monotonic() - start < 180
        time.sleep(0.05)
    launcher.kill()
    said, _ = launcher.communicate(timeout=90)  # the ranks have its output, too
    assert "stopped by SIGTERM after step" in said
    assert len(checkpoints(out)) == 1
