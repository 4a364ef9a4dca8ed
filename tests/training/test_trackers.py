"""Trackers of a run: what they are shown, what a resumed run continues, what their failures do."""

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import FAST, SCRIPT, TINY, records, resume, train

from regvq_fast.config import RunConfig

SERVICE = """
'''A package with the functions of wandb and Trackio, which notes each call as a line of JSON.'''
import json, os, pathlib

def note(*values):
    with open(pathlib.Path(__file__).with_suffix(".calls"), "a") as file:
        print(json.dumps(values, default=str), file=file)

class Settings(dict):
    pass

class Image:
    def __init__(self, pixels):
        self.shape = [str(pixels.dtype), *pixels.shape]
    def __str__(self):
        return json.dumps(self.shape)

class Run:
    def log(self, values, step):
        if step >= int(os.environ.get("FAILS_AT", 99)):
            raise RuntimeError("the server is gone\\nfor good")
        note("log", step, values)

def init(**settings):
    note("init", settings)
    return Run()

def finish():
    note("finish")
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of packages in place of wandb and trackio, and of their calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(SERVICE)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def calls(services: Path, name: str) -> list[list]:
    return [json.loads(line) for line in (services / f"{name}.calls").read_text().splitlines()]


def test_services_are_shown_the_records_and_the_images(services: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run: #1"
    train("--out", out, *FAST, "--log", "wandb,trackio")
    assert not (out / "tensorboard").exists()
    for name in ("wandb", "trackio"):
        (_, settings), *logged, end = calls(services, name)
        assert end == ["finish"]
        assert settings["project"] == "regvq_fast"
        assert settings["config"] == json.loads((out / "config.json").read_text())
        assert settings["name"] == (out / "tracker-run.txt").read_text()
        assert re.fullmatch(r"a-run---1-[0-9a-f]{8}", settings["name"])
        shown = [(step, values) for _, step, values in logged]
        rows = []
        for row in records(out):
            step, split = row.pop("step"), row.pop("split")
            rows.append((step, {f"{split}/{key}": value for key, value in row.items()}))
        assert [row for row in shown if row in rows] == rows
        images = [values for step, values in shown if (step, values) not in rows]
        assert len(shown) == len(rows) + len(images)
        assert [*images[0]] == ["reconstructions"]
        assert json.loads(images[0]["reconstructions"])[0] == "uint8"


def test_a_resumed_run_continues_its_run_even_in_another_folder(services: Path, tmp_path: Path) -> None:
    train("--out", tmp_path / "a", *FAST, "--log", "wandb", "trackio")
    (tmp_path / "a").rename(tmp_path / "b")
    resume(tmp_path / "b", "--steps", 6)
    train("--out", tmp_path / "a", *FAST, "--log", "wandb", "trackio")
    for name in ("wandb", "trackio"):
        first, resumed, another = (call[1] for call in calls(services, name) if call[0] == "init")
        assert first["name"] == resumed["name"] != another["name"]
        assert first["resume"] == resumed["resume"] == "allow"
        assert first.get("id") == resumed.get("id") == (first["name"] if name == "wandb" else None)


@pytest.mark.parametrize("step", [0, 2])
def test_a_tracker_that_fails_is_dropped_with_one_warning(
    services: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    monkeypatch.setenv("FAILS_AT", str(step))
    if step == 0:
        (services / "wandb.py").write_text("raise KeyError('from the start')")
    train("--out", tmp_path / "run", *FAST, "--log", "wandb", "tensorboard", "--log-every", 1)
    reason = "the server is gone" if step else "'from the start'"
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: wandb gets no more numbers ({reason}); metrics.jsonl has them"]
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2, 3, 4, 4]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    if step:
        assert [call[1] for call in calls(services, "wandb") if call[0] == "log"] == [1]


def test_a_package_that_is_missing_is_one_sentence_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(SystemExit, match=r"--log wandb needs .*pip install .*trackers"):
        train("--out", tmp_path / "run", *FAST, "--log", "wandb")
    assert not list(tmp_path.iterdir())


def test_no_trackers(tmp_path: Path) -> None:
    train("--out", tmp_path / "run", *FAST, "--log", "none")
    assert not {"tensorboard", "tracker-run.txt"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert RunConfig(log=("wandb,tensorboard", "wandb", "none")).trackers == ("wandb", "tensorboard")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_packages_take_a_run_offline(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    out, store = tmp_path / "run", tmp_path / "trackio"
    offline = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(store)}
    for flags in (["--out", out, *TINY, *FAST, "--log", name], ["--resume", "--out", out, "--steps", 6]):
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "gets no more numbers" not in done.stdout
    run = (out / "tracker-run.txt").read_text()
    if name == "wandb":
        assert len(list((out / "wandb").glob(f"offline-run-*-{run}"))) == 2
    else:
        (database,) = store.glob("*.db")
        with sqlite3.connect(database) as connection:
            found = connection.execute("select run_name, max(step) from metrics group by run_name").fetchall()
        assert found == [(run, 6)]
