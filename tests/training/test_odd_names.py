"""Folders whose names are no text, as on disks that were written with another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import FAST, SCRIPT, TINY, assert_same_run, train
from helpers.tiny_models import TinyNet
from PIL import Image

from regvq_fast.cli import evaluate_setup
from regvq_fast.cli.evaluate import main
from regvq_fast.models import VQGAN

ODD = os.fsdecode(b"caf\xe9")


def script(*flags: object) -> None:
    """Run in a terminal whose encoding has no such characters."""
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_a_run_and_its_data_may_have_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / ODD, tmp_path / f"run {ODD}"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for k in range(6):
            pixels = np.random.default_rng(k).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / split / f"{ODD} {k}.png")
    flags = [*FAST, "--data", data, "--final-lr-fraction", "1"]
    train(*flags, "--steps", 4, "--out", tmp_path / "whole")
    script(*TINY, *flags, "--steps", 2, "--out", out)
    script("--resume", "--out", out, "--steps", 4)
    assert_same_run(tmp_path / "whole", out)
    assert VQGAN.from_pretrained(out).tokenize(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    net = TinyNet()
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: net)
    arguments = ["--run", str(out), "--device", "cpu", "--workers", "0", "--cache-dir", str(data / "cache")]
    main(arguments)
    seen = net.seen
    main(arguments)
    assert (out / "evaluation.json").exists()
    assert net.seen == seen + 6, "the statistics of the images come from the cache"
