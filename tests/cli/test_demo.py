"""The command `regvq demo`: which models it takes, and what it refuses before a port is open."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.demo_server import save_tiny_models
from helpers.tiny_models import tiny_tokenizer

from regvq_fast.cli import demo
from regvq_fast.cli.demo import DemoConfig, open_demo

Served = list[str]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """The page is not served; its address and the warning are printed all the same."""
    monkeypatch.setattr(demo, "find_spec", lambda _: object())
    calls: Served = []

    def serve(make_page: object, opened: object, local: bool, ready: object) -> None:
        calls.append("local" if local else "open")
        assert callable(ready)
        ready()
        opened.close()  # type: ignore[attr-defined]

    monkeypatch.setattr(demo, "serve", serve)
    return calls


def prior_run(models: Path, name: str, run: Path) -> Path:
    """Make a run of a prior, which has its tokenizer inside."""
    shutil.copytree(models / name, run)
    shutil.copytree(models / "tokenizer", run / "tokenizer")
    return run


def test_embedded_models_by_default(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("regvq_fast.scenes.embedded.FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedded models"):
        open_demo(DemoConfig(port=0))
    save_tiny_models(tmp_path)
    open_demo(DemoConfig(port=0))
    printed = capsys.readouterr().out
    assert all(str(tmp_path / name) in printed for name in ("tokenizer", "ar", "diffusion"))
    assert "http://127.0.0.1:" in printed
    assert "warning" not in printed
    assert served == ["local"]


def test_priors_beside_a_run_are_found_by_their_tokenizer(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_models(tmp_path / "models")
    runs = tmp_path / "runs"
    shutil.copytree(tmp_path / "models" / "tokenizer", runs / "vq")
    for age, name in enumerate(("new", "old")):
        run = prior_run(tmp_path / "models", "ar", runs / name)
        os.utime(run, (1000 - age, 1000 - age))
    other = prior_run(tmp_path / "models", "diffusion", runs / "other")
    shutil.rmtree(other / "tokenizer")
    tiny_tokenizer(seed=1).save_pretrained(other / "tokenizer")
    (runs / "begun" / "tokenizer").mkdir(parents=True)
    open_demo(DemoConfig(run=runs / "vq", port=0))
    printed = capsys.readouterr().out
    assert str(runs / "new") in printed
    assert not any(str(runs / name) in printed for name in ("old", "other", "begun"))

    open_demo(DemoConfig(prior_runs=(other,), port=0))
    printed = capsys.readouterr().out
    assert str(other / "tokenizer") in printed


def test_another_host_is_warned_of(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "vq")
    open_demo(DemoConfig(run=tmp_path / "vq", host="0.0.0.0", port=0))
    assert "no password" in capsys.readouterr().out
    assert served == ["open"]


def test_what_is_wrong_is_said_before_a_port_is_open(served: Served, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="--port"):
        open_demo(DemoConfig(run=tmp_path / "vq", port=70_000))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_demo(DemoConfig(run=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="VQGAN"):
        open_demo(DemoConfig(prior_runs=(tmp_path / "vq",), run=tmp_path / "vq"))
    assert served == []


def test_gradio_is_named_where_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"gradio.*\[demo\]"):
        open_demo(DemoConfig())
