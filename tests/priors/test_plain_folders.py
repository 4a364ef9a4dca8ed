"""From a plain folder of images to samples: by label where it has folders of classes, else without a condition."""

from pathlib import Path

import pytest
from helpers.flat_images import write_flat
from helpers.runs import run_script
from helpers.tiny_models import tiny_vqgan
from PIL import Image

from regvq_fast.priors.registry import PRIORS
from regvq_fast.quantizers import NearestQuantizer

FAST = "--steps 2 --batch-size 4 --log-every 1 --device cpu --warmup-steps 1 --width 16 --depth 1 --heads 2".split()
CLASSES = ("cow", "hen", "red fox")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "vq"
    tiny_vqgan(NearestQuantizer(16, 4)).save_pretrained(folder)
    return folder


def photos(folder: Path, classes: tuple[str, ...]) -> Path:
    for split in ("train", "val"):
        for k in range(6):
            write_flat(folder / split / classes[k % len(classes)] / f"{k}.png", 10 * k)
    return folder


def train(prior: str, *flags: object) -> None:
    run_script(*FAST, *flags, script=f"{PRIORS[prior].command.split()[1]}.py")


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("classes", "condition"), [(CLASSES, "label"), (("all",), "none")])
def test_a_folder_trains_every_prior(
    tokenizer: Path,
    tmp_path: Path,
    prior: str,
    classes: tuple[str, ...],
    condition: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, cache, run = photos(tmp_path / "photos", classes), tmp_path / "cache", tmp_path / "run"
    made = ("--tokenizer", tokenizer, "--data", data, "--out", cache, "--device", "cpu", "--workers", 0)
    run_script(*made, script="cache_tokens.py")
    assert f"{prior} {'by label' if condition == 'label' else 'without a condition'}" in " ".join(
        capsys.readouterr().out.split()
    )
    train(prior, "--cache", cache, "--out", run)
    assert f"condition {condition}" in " ".join(capsys.readouterr().out.split())

    sampled = ("--run", run, "--device", "cpu", "--out")
    if condition == "label":
        run_script(*sampled, tmp_path / "fox", "--label", "Red Fox", "--guidance", 2, script="sample.py")
        run_script(*sampled, tmp_path / "each", "--per-class", 3, script="sample.py")
        assert len(list((tmp_path / "each").glob("0*.png"))) == 9
        with Image.open(tmp_path / "each" / "grid.png") as grid:
            assert grid.width == 8 + 6 * (192 + 8), "two columns of each label"
            row_height = grid.height / 2
        run_script(*sampled, tmp_path / "many", "--per-class", 22, "--batch-size", 33, script="sample.py")
        with Image.open(tmp_path / "many" / "grid.png") as grid:
            assert round(grid.height / row_height) == 10, "whole rows of 66 images"
        other = photos(tmp_path / "other photos", ("cow", "dog"))
        with pytest.raises(SystemExit, match=r"2 labels"):
            run_script(*sampled, tmp_path / "no", "--data", other, script="sample.py")
        run_script(*sampled, tmp_path / "val", "--data", data, script="sample.py")
        with pytest.raises(SystemExit, match=r"--data .*--per-class"):
            run_script(*sampled, tmp_path / "no", "--data", data, "--per-class", 2, script="sample.py")
        with pytest.raises(SystemExit, match=r"'fox' .*'red fox'"):
            run_script(*sampled, tmp_path / "no", "--label", "fox", script="sample.py")
    else:
        run_script(*sampled, tmp_path / "any", "--num-images", 3, script="sample.py")
        with Image.open(tmp_path / "any" / "00002.png") as image:
            assert image.size == (16, 16)
        with pytest.raises(SystemExit, match=r"--guidance 2 .*condition"):
            run_script(*sampled, tmp_path / "no", "--guidance", 2, script="sample.py")
        with pytest.raises(SystemExit, match=r"--label .*without a condition"):
            run_script(*sampled, tmp_path / "no", "--label", "cow", script="sample.py")
    with pytest.raises(SystemExit, match=r"--condition caption|no caption"):
        train(prior, "--cache", cache, "--condition", "caption", "--out", tmp_path / "other")


def test_a_condition_is_kept_when_a_run_is_resumed(tokenizer: Path, tmp_path: Path) -> None:
    """Though by now the folder has no classes any more: other images are refused, not trained without a condition."""
    data = photos(tmp_path / "photos", CLASSES)
    flags = ("--on-the-fly", "--tokenizer", tokenizer, "--data", data, "--workers", 0, "--out", tmp_path / "run")
    train("ar", *flags)
    assert '"condition": "label"' in (tmp_path / "run" / "config.json").read_text()
    for split in ("train", "val"):
        for name in CLASSES[1:]:
            (data / split / name).rename(data / split / CLASSES[0] / name)
    with pytest.raises(SystemExit, match="label"):
        run_script("--resume", "--out", tmp_path / "run", "--steps", 3, script="ar.py")
