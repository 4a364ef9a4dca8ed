"""The lines that a run prints, in a terminal and in a pipe."""

import io
import json
import re
from pathlib import Path

import pytest
from helpers.runs import FAST, train
from rich.console import Console

EVALUATION = r"evaluation: PSNR \d+\.\d dB · SSIM [-\d.]+ · utilization [\d.]+ % · perplexity \d+ of 16"


def test_a_pipe_gets_one_line_an_evaluation_and_a_summary_with_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--out", tmp_path / "run", *FAST, "--eval-every", 2)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "evaluation:" in line]
    assert len(found) == 2
    for step, line in zip((2, 4), found, strict=True):
        assert re.fullmatch(rf"step {step}/4  {EVALUATION}", line)
    assert [line.split("  ")[0] for line in lines if line.startswith("step") and "loss" in line] == [
        "step 1/4",
        "step 2/4",
        "step 4/4",
    ]
    table = dict(re.findall(r"^│ (.*?) +│ (.*?) +│$", "\n".join(lines), re.MULTILINE))
    assert re.fullmatch(r"\d+\.\d dB", table["PSNR"])
    assert re.fullmatch(r"[\d.]+ %", table["utilization"])
    assert re.fullmatch(r"\d+ of 16", table["perplexity"])
    assert re.fullmatch(r"[\d.]+ GiB", table["peak memory"])
    assert re.fullmatch(r"[\d,.]+ images/s", table["speed"])
    assert re.fullmatch(r"[\d.]+ s|\d+ min \d\d s", table["time"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(isinstance(summary[name], float) for name in ("psnr", "utilization", "perplexity", "minutes"))


def test_a_terminal_of_80_columns_shows_counter_bar_time_left_and_evaluations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen = io.StringIO()

    def terminal(quiet: bool) -> Console:
        return Console(file=screen, force_terminal=True, width=80, color_system=None, quiet=quiet)

    monkeypatch.setattr("regvq_fast.training.recorder.Console", terminal)
    train("--out", tmp_path / "run", *FAST, "--eval-every", 2)
    lines = re.sub(r"\x1b\[[\d?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    bars = [
        line for line in lines if re.fullmatch(r"step \d/4 [━╸╺]+ +\d:\d\d:\d\d +· +[-\d]:[-\d]+:[-\d]+ +left *", line)
    ]
    assert any(bar.startswith("step 4/4") for bar in bars)
    assert any(line.startswith("loss ") and "images/s" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert len(re.findall(rf"step [24]/4 {EVALUATION}", text)) == 2
