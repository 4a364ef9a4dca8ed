"""Figures of sweeps and rows of images."""

import pytest
import torch
import torch.distributed.run
from helpers.tiny_models import tiny_tokenizer
from PIL import Image

from regvq_fast.config import VQGANConfig, override
from regvq_fast.paper import figures
from regvq_fast.paper.experiments import EXPERIMENTS
from regvq_fast.paper.figures import percent, save_curves, save_rows
from regvq_fast.paper.stages import Pipeline, Stage


def test_only_the_whole_is_100_percent():
    assert [percent(fraction) for fraction in (1.0, 0.99951, 0.9996, 0.999, 0.0125)] == [
        "100.0 %",
        "99.9 %",
        "99.9 %",
        "99.9 %",
        "1.2 %",
    ]


def test_measurements_that_are_removed_while_figures_are_made_are_an_error(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path / "vq")
    monkeypatch.setattr(figures, "read_config", lambda *_: override(VQGANConfig(), image_size=16))
    stage = Stage("tokenizer", "train vq", (), tmp_path / "vq", tmp_path / "vq" / "evaluation.json", True)
    rows = {"a row": Pipeline(tmp_path, (stage,))}
    with pytest.raises(FileNotFoundError, match=r"vq were removed; run the same command again"):
        figures.save_row_figures(tmp_path / "table2", rows, 4, torch.device("cpu"))


def test_curves_of_a_sweep(tmp_path):
    curves = {"codes used": {"VQ-GAN": [(256, (0.1, 0.2)), (4096, (0.01, 0.02))], "Reg-VQ": [(256, (1.0,))]}}
    save_curves(tmp_path / "curves.png", curves, EXPERIMENTS["codebook-size"].axis)
    save_rows(tmp_path / "rows.png", {"a": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)})
    for name in ("curves", "rows"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 2
