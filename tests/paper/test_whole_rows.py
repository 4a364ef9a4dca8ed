"""Rows at the smallest sizes, from training to tables and figures."""

import csv
import json
import math
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from regvq_fast.cli.evaluate import CODE_COUNTS, RESULTS
from regvq_fast.models.features import RANDOM
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.paper import driver
from regvq_fast.paper.driver import PaperConfig, reproduce
from regvq_fast.paper.experiments import EXPERIMENTS
from regvq_fast.paper.rows import Recipe, Row
from regvq_fast.paper.study import STUDY

NET = "random-vgg16"


@pytest.mark.slow
def test_a_row_for_real(tmp_path, monkeypatch, capfd):
    """All four commands at the smallest sizes; a second call leaves everything as it is."""
    tokenizer = "--steps 2 --image-size 32 --ch 8 --z-channels 8 --code-dim 8 --batch-size 2 --val-images 8".split()
    tokenizer += "--perceptual-weight 0.1 --warmup-steps 1 --ch-mult 1 1 1 --num-codes 16".split()
    prior = "--steps 2 --width 16 --depth 1 --heads 2 --batch-size 2".split()
    cache = "--views 1 --scenes 32 --val-images 8".split()
    micro = Recipe("scenes", tuple(tokenizer), tuple(cache), tuple(prior), 8)
    monkeypatch.setattr(driver, "recipe", lambda preset, scale: micro)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    config = PaperConfig("table2", out=out, rows=("reg-vq",), prior="diffusion", fid_features="random-vgg16")
    reproduce(config)
    folder = out / "runs" / "reg-vq" / "seed-0"
    measured = json.loads((folder / "prior" / RESULTS).read_text())
    assert {"psnr", "fid_r", "fid_g", "utilization"} <= measured.keys()
    line = next(csv.DictReader((out / "table2.csv").open()))
    assert float(line["fid_g"]) == measured["fid_g"]["value"]
    for name in ("reconstructions", "samples", "codebooks", "usage"):
        with Image.open(out / f"table2-{name}.png") as picture:
            assert picture.width > 300
    assert "layout of samples" in line
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(VQGAN, "tokenize", None)  # figures take the codes that were counted with the metrics
    reproduce(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    (folder / "prior" / CODE_COUNTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"code_counts\.json .*evaluation\.json"):
        reproduce(config)
    assert VQGAN.from_pretrained(folder / "vq").quantize.num_codes == 16


@pytest.mark.slow
@pytest.mark.parametrize("scenes", [True, False])
def test_a_study_for_real(scenes, tmp_path, monkeypatch):
    """Two quantizers with two sizes each, side by side, on the scenes and on a folder of images without captions."""
    tokenizer = (
        "--steps 4 --image-size 32 --ch 8 --z-channels 8 --code-dim 8 --batch-size 2 --val-images 8 --log-every 2"
    )
    tokenizer += " --perceptual-weight 0 --contrastive none --warmup-steps 1 --ch-mult 1 1 1 --crop center --no-flip"
    prior = "--steps 4 --eval-every 1 --width 16 --depth 1 --heads 2 --batch-size 2"
    cache = "--views 1 --val-images 8" + (" --scenes 32" if scenes else " --no-flip")
    micro = Recipe("scenes", *(tuple(flags.split()) for flags in (tokenizer, cache, prior)), 8, unconditional=True)
    monkeypatch.setitem(EXPERIMENTS, "quantizers", replace(STUDY, own_recipe=lambda scale, scenes: micro, shown=16))
    rows = tuple(
        Row(f"{name}, {n} codes", f"{name}-{n}", ("--quantizer", name, "--num-codes", str(n)), x=n, series=name)
        for n in (16, 64)
        for name in ("reg-vq", "vq-gan")
    )
    monkeypatch.setitem(STUDY.rows, "tiny", rows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = None
    if not scenes:
        data = tmp_path / "images"
        for split in ("train", "val"):
            (data / split).mkdir(parents=True)
            for k in range(10):
                Image.effect_noise((40, 40), 8 * k).convert("RGB").save(data / split / f"{k}.png")
    out = tmp_path / "out"
    net = {"fid_features": NET, "perceptual_weights": RANDOM}
    study = partial(PaperConfig, "quantizers", data=data, out=out, jobs=2, **net)
    reproduce(study(rows=("reg-vq",)))  # by the name of a curve
    lines = list(csv.DictReader((out / "quantizers.csv").open()))
    assert [line["row"] for line in lines] == ["reg-vq, 16 codes", "reg-vq, 64 codes"]
    reproduce(study())
    lines = list(csv.DictReader((out / "quantizers.csv").open()))
    assert [line["row"] for line in lines] == [row.name for row in rows]
    assert [float(line["bits"]) for line in lines] == [4, 4, 6, 6]
    for line, row in zip(lines, rows, strict=True):
        folder = out / "runs" / row.key / "seed-0"
        model = VQGAN.from_pretrained(folder / "vq")
        assert int(line["parameters"]) == sum(p.numel() for p in model.parameters())
        assert int(line["quantizer_parameters"]) >= 8 * row.x
        assert json.loads((folder / "prior" / "config.json").read_text())["tokens"]["condition"] == "none"
        assert 0 < float(line["train_utilization"]) <= 1
        assert all(math.isfinite(float(value)) for key, value in line.items() if key not in ("row", "seed"))
    header = next(line for line in (out / "quantizers.md").read_text().splitlines() if line.startswith("|"))
    assert {"bits a token", "seconds a step", "prior, nats a token", "FD[G]"} < set(header.strip("| ").split(" | "))
    for name in ("reconstructions", "samples", "codebooks", "usage", "curves"):
        assert (out / f"quantizers-{name}.png").exists()
