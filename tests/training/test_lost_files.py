"""Files of a run that vanish under it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import FAST, checkpoints, records, train, without_clock

from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe


def remove_all(path: Path) -> None:
    while path.is_dir():  # TensorBoard's thread may write into its folder meanwhile
        shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    original = Trainer.step

    def step(trainer: Trainer[Any], now: int) -> None:
        if now == number:
            action()
        original(trainer, now)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_run_folder_that_is_removed_comes_back_and_the_end_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FAST, "--out", tmp_path / "whole", "--steps", 8, "--checkpoint-every", 2)
    out = tmp_path / "run"
    before_step(monkeypatch, 5, lambda: remove_all(out))
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out, "--steps", 8, "--checkpoint-every", 2)
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert said.out.count(f"warning: {out} was removed") == 1
    assert said.err.splitlines()[-1] == (
        f"all steps are done and {out} has the model, but the folder was removed before step 6: its earlier "
        "checkpoints and images are lost"
    )
    assert not (out / "traceback.txt").exists()
    assert without_clock(records(out)) == without_clock(records(tmp_path / "whole"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["optimizer"]["steps"] == 8
    assert checkpoints(out) == ["step-0000006", "step-0000008"]
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("name", ["conclude", "summarize"])
def test_a_run_folder_that_is_removed_after_the_last_checkpoint_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Before the model is written, or after it."""
    out, kind = tmp_path / "run", Trainer if name == "conclude" else VQGANRecipe
    original = getattr(kind, name)

    def remove_first(*inputs: Any) -> Any:
        remove_all(out)
        return original(*inputs)

    monkeypatch.setattr(kind, name, remove_first)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out, "--steps", 4, "--checkpoint-every", 2)
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert ("has the model" if name == "conclude" else "results could not be written") in said
    assert "removed" in said
    assert [row["step"] for row in records(out) if row["split"] == "val"] == [4]
    assert (out / "model.safetensors").exists() == (name == "conclude")
    assert not list(out.rglob(".*"))


def test_a_folder_that_another_run_took_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    theirs = json.dumps({"host": "far", "pid": 1, "started": "1", "machine": "another", "command": "regvq train vq"})

    def replace() -> None:
        remove_all(out)
        out.mkdir()
        (out / ".run.lock").write_text(theirs)

    before_step(monkeypatch, 2, replace)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out, "--checkpoint-every", 1)
    assert stop.value.code == 1
    assert "in use by process 1 on far" in capsys.readouterr().err.splitlines()[-1]
    assert (out / ".run.lock").read_text() == theirs
    assert not (out / "checkpoints").exists()
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl", "pictures"])
def test_a_part_of_a_run_that_is_removed_is_one_warning_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "run"

    def remove() -> None:
        remove_all(out / name)

    before_step(monkeypatch, 3, remove)
    train(*FAST, "--out", out, "--steps", 20, "--log-every", 1)
    said = capsys.readouterr()
    assert said.out.count("warning: ") == (name == "tensorboard")
    assert [row["step"] for row in records(out)] == [*range(1, 21), 20]
    assert (out / "summary.json").exists()
