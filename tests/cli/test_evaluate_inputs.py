"""Images that are evaluated: data sets, folders of samples, and settings that are refused before work starts."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.evaluations import make_prior, measure, save_run
from helpers.runs import run_script
from helpers.tiny_models import tiny_tokenizer, tiny_vqgan
from PIL import Image

from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.config import VQGAN_PRESETS, override
from regvq_fast.data import ImageFolder
from regvq_fast.evaluation.metrics import SampledImages
from regvq_fast.ownership import FolderLock
from regvq_fast.priors.autoregressive.config import AR_PRESETS


def test_folders_of_drawn_images_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        SampledImages(tmp_path / "nowhere", 16)
    with pytest.raises(FileNotFoundError, match="no images in"):
        SampledImages(tmp_path, 16)
    Image.new("L", (16, 16)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].shape == (3, 16, 16)
    # As the images they are compared with: 16 bits are scaled, what is transparent is white.
    Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].unique().tolist() == [128]
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].unique().tolist() == [255]
    Image.new("RGB", (16, 24)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png .*16 x 24"):
        SampledImages(tmp_path, 16)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png is not an image"):
        SampledImages(tmp_path, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_drawn_images_that_were_cut_off(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"0.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    whole = file.read_bytes()
    drawn = SampledImages(tmp_path, 64)
    for content in (whole[:-20], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"0.{suffix} (can't be read|is not an image)"):
            SampledImages(tmp_path, 64)
    with pytest.raises(ValueError, match=rf"0.{suffix} (can't be read|is not an image)"):
        drawn[0]


@pytest.mark.usefixtures("tiny_nets")
def test_data_is_what_the_run_was_trained_on_and_all_of_its_split(photos: Path, tmp_path: Path) -> None:
    config = override(VQGAN_PRESETS["scenes"], data=photos, val_images=2)
    run = save_run(tmp_path / "run", tiny_tokenizer(), config)
    found = evaluate(EvaluateConfig(run=run, device="cpu", workers=0))
    assert found["psnr"].protocol["images"] == len(ImageFolder(photos, "val")) == 6
    assert found["psnr"].protocol["data"] == str(photos)
    assert (run / "evaluation.json").is_file()
    assert "unreadable" not in found["psnr"].protocol
    scenes = tmp_path / "scenes"
    photos.rename(scenes)
    with contextlib.chdir(tmp_path):  # a folder of that name is one
        here = save_run(tmp_path / "here", tiny_tokenizer(), override(config, data=Path("scenes")))
        for data in (None, Path("scenes")):
            found = evaluate(EvaluateConfig(run=here, device="cpu", workers=0, data=data))
            assert found["psnr"].protocol["data"] == str(scenes)
    scenes.rename(photos)
    few = evaluate(EvaluateConfig(run=run, device="cpu", workers=0, val_images=3))
    assert few["psnr"].protocol["images"] == 3

    for name, tokens in (("trained", {"data": photos, "on_the_fly": True}), ("cached", {"cache": Path("gone")})):
        prior = save_run(tmp_path / name, make_prior(), override(AR_PRESETS["scenes"], **tokens))
        tiny_tokenizer().save_pretrained(prior / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"6 .*photos.* segmentation"):
        evaluate(EvaluateConfig(prior_run=tmp_path / "trained", device="cpu"))
    with pytest.raises(ValueError, match=r"token cache gone .*--data"):
        evaluate(EvaluateConfig(prior_run=tmp_path / "cached", device="cpu"))


@pytest.mark.usefixtures("tiny_nets")
def test_images_that_cannot_be_read_are_counted(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    third = sorted((photos / "val").iterdir())[2]  # neither the first nor the last, which are always read
    third.with_name(f"{third.stem}-.png").write_bytes(b"no image")
    found = measure(tmp_path / "out", run=runs["vq"], data=photos)
    assert all((number.protocol["images"], number.protocol["unreadable"]) == (7, 1) for number in found.values())

    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for k in range(2):
        Image.new("RGB", (16, 16)).save(drawn / f"{k}.png")
    for _ in range(2):  # the second time, the statistics of the others come from the cache
        found = measure(tmp_path / "out", images=drawn, image_size=16, data=photos, cache_dir=tmp_path / "cache")
        assert found["fid_g"].protocol["unreadable"] == 1


@pytest.mark.usefixtures("tiny_nets")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--run, --prior-run or --images"),
        ({"run": "nowhere"}, "nowhere"),
        ({"run": "ar"}, r"TokenTransformer.* VQGAN"),
        ({"prior_run": "vq"}, r"VQGAN.* TokenTransformer or VQDiffusion"),
        ({"prior_run": "ar", "run": "other"}, "--prior-run"),
        ({"prior_run": "ar", "images": "vq"}, "exclude each other"),
        ({"run": "vq", "top_p": 0.5}, r"--top-p 0\.5 "),
        ({"run": "vq", "guidance": 3.0}, r"--guidance 3\.0 "),
        ({"images": "vq"}, "needs --image-size"),
        ({"images": "vq", "image_size": 0}, r"--image-size .*\b0$"),
        ({"run": "vq", "image_size": 32}, r"--image-size 32 .*--images"),
        ({"images": "vq", "image_size": 16}, "no images in"),
        ({"run": "other", "data": None}, "--data"),
        ({"run": "vq", "data": Path("nowhere")}, "nowhere"),
        ({"run": "vq", "val_images": 0}, r"--val-images .*\b0$"),
        ({"run": "vq", "val_images": 1}, r"\b2 validation images.*\b1$"),
        ({"run": "vq", "batch_size": 0}, r"--batch-size .*\b0$"),
        ({"run": "vq", "device": "tpu"}, "--device tpu"),
        ({"prior_run": "ar", "steps": 3}, r"--steps .*autoregressive"),
        ({"prior_run": "diffusion", "top_k": 3}, r"--top-k .*diffusion"),
        ({"prior_run": "diffusion", "steps": 5}, r"steps .*\b4\b.*\b5$"),
        ({"prior_run": "ar", "top_p": 1.5}, "top_p"),
        ({"prior_run": "ar", "fid_features": "none"}, "--fid-features none"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    settings: dict[str, Any], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = {k: runs.get(v, Path(v)) if k in ("run", "prior_run", "images") else v for k, v in settings.items()}
    with pytest.raises((ValueError, OSError), match=message):
        measure(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny_nets")
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("regvq_fast.cli.evaluate.evaluate_tokenizer", lambda *_, **__: pytest.fail("it works"))
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match=f"--out {out} .*file"):
            measure(out, run=runs["vq"])
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"\bout\b"):
        measure(tmp_path / "out", run=runs["vq"])


@pytest.mark.usefixtures("tiny_nets")
def test_a_folder_that_another_process_evaluates_into_is_refused_before_the_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regvq_fast.cli.evaluate.evaluate_tokenizer", lambda *_, **__: pytest.fail("it works"))
    out = tmp_path / "out"
    refused = pytest.raises(FileExistsError, match=f"out is in use by process {os.getpid()} ")
    with FolderLock(out, "evaluation"), refused:
        measure(out, run=runs["vq"])
    assert list(out.iterdir()) == []


def test_the_script_ends_with_the_sentence(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--fid-features resnet"):
        run_script("--run", runs["vq"], "--fid-features", "resnet", script="evaluate.py")
    tiny_vqgan(image_size=8).save_pretrained(tmp_path / "small")
    flags = ["--fid-features", "none", "--perceptual-weights", runs["vgg"]]
    with pytest.raises(SystemExit, match=r"SSIM .*\b8\b"):
        run_script("--run", tmp_path / "small", *flags, script="evaluate.py")
