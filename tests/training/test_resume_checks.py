"""Checks of a run that is resumed: its checkpoints, settings, images, and whether it is a run at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import FAST, checkpoints, records, resume, train, without_clock
from PIL import Image


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(*FAST, "--out", out)
    weights = out / "checkpoints" / "step-0000004" / "model.safetensors"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"checkpoints .*SHA-256"):
        resume(out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_can_go_on_with_more_steps_and_a_lower_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(*FAST, "--out", out, "--checkpoint-every", 0)
    before = records(out)
    resume(out)
    assert without_clock(records(out)) == without_clock(before)
    resume(out, "--steps", 6, "--lr", 1e-4, "--log-every", 1, "--amp")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: --lr is 0.0001 from here on; it was 0.001" in said
    assert "warning: --amp is True from here on; it was False" in said
    assert [(row["split"], row["step"]) for row in records(out)] == [
        ("train", 1), ("train", 2), ("train", 4), ("train", 5), ("train", 6), ("val", 6)
    ]  # fmt: skip
    assert checkpoints(out) == ["step-0000004", "step-0000006"]
    assert json.loads((out / "config.json").read_text())["optimizer"]["steps"] == 6


@pytest.mark.parametrize(
    ("flags", "scheduled"),
    [
        (["--quantizer", "gumbel-vq"], "the learning rate and gumbel-vq's tau"),
        (["--quantizer", "gumbel-vq", "--final-lr-fraction", 1], "gumbel-vq's tau"),
        (["--final-lr-fraction", 1], None),
    ],
)
def test_other_steps_are_told_where_a_schedule_depends_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[object], scheduled: str | None
) -> None:
    train(*FAST, "--out", tmp_path, *flags)
    resume(tmp_path)
    assert "from here on" not in capsys.readouterr().out
    resume(tmp_path, "--steps", 5)
    said = capsys.readouterr().out
    assert said.count("from here on") == bool(scheduled)
    assert said.count(f"--steps is 5 from here on; it was 4: the schedule of {scheduled} spans 5 steps") == bool(
        scheduled
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume .*--out"),
        (["--resume", "--out", "nothing"], r".*nothing.*config\.json"),
        (["--resume", "--out", "foreign"], r"foreign/config\.json"),
        (["--resume", "--out", "file"], "there is no run in file"),
    ],
)
def test_resuming_what_is_no_run_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model": "another program\'s"}')
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train(*flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


def test_what_every_process_finds_wrong_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path / "nothing")
    assert stop.value.code == 1


def test_other_images_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def picture(path: Path, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)

    for k in range(4):
        picture(tmp_path / "a" / "train" / f"{k}.png", k)
        picture(tmp_path / "b" / "train" / f"{k}.png", 9 + k)
    for folder in "ab":
        picture(tmp_path / folder / "val" / "0.png", 8)
    out = tmp_path / "run"
    train(*FAST, "--out", out, "--data", tmp_path / "a")
    resume(out, "--data", tmp_path / "b")
    assert "warning: the first training images" in " ".join(capsys.readouterr().out.split())
    picture(tmp_path / "b" / "train" / "5.png", 5)
    with pytest.raises(SystemExit, match=r"\b5 training images.* 4\b"):
        resume(out)
