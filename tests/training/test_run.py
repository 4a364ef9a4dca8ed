"""Whole runs of train/vq.py at a tiny size, in this process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import FAST, checkpoints, records, resume, train, without_clock
from PIL import Image
from safetensors.torch import load_file

from regvq_fast.config import VQGAN_PRESETS, VQGANConfig, override
from regvq_fast.losses.adversarial import ADVERSARIAL_LOSSES
from regvq_fast.models import VGGFeatures, weights
from regvq_fast.quantizers import QUANTIZERS
from regvq_fast.training import build
from regvq_fast.training.build import build_model
from regvq_fast.training.compilation import worth_compiling
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe
from regvq_fast.training.vqgan_step import VQGANStep


def test_a_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("--out", out, "--amp", "--disc-start", 2, "--perceptual-weights", "random")
    config = json.loads((out / "config.json").read_text())
    assert config["quantizer"]["num_codes"] == 16
    assert config["architecture"]["quantizer"]["type"] == "RegularizedQuantizer"
    assert config["facts"]["discriminator"] == "from step 2 of 4 on"
    assert config["facts"]["perceptual"] == "perceptual distance (random VGG-16), weights: random(seed 0)"
    rows = records(out)
    assert [(row["split"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("train", 4), ("val", 4)]
    assert {"loss", "l1", "perceptual", "contrastive", "kl", "utilization", "perplexity", "lr"} <= rows[0].keys()
    assert "lambda" not in rows[0]
    assert {"lambda", "discriminator", "generator"} <= rows[2].keys()
    summary = json.loads((out / "summary.json").read_text())
    assert {"psnr", "ssim", "utilization", "perplexity", "images/s", "peak memory (GiB)", "minutes"} <= summary.keys()
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert pictures == {"reconstructions-0000002.png", "reconstructions.png", "codebook.png", "usage.png"}
    for name in pictures:
        with Image.open(out / "pictures" / name) as image:
            assert np.asarray(image.convert("L")).std() > 1, f"{name} is blank"
    assert list((out / "tensorboard").iterdir())
    assert not list(out.rglob(".*")), "temporary files are left"

    tiny = override(VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=4)
    build_model(tiny).load_state_dict(load_file(out / "model.safetensors"), strict=True)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_trains_with_discriminator_averages_and_accumulation(tmp_path: Path, quantizer: str) -> None:
    out = tmp_path / "run"
    flags = ["--quantizer", quantizer, "--num-codes", 256, "--disc-start", 2, "--ema", 0.5]
    flags += ["--grad-accum-steps", 2, "--eval-every", 2]
    train("--out", out, *FAST, *flags)
    losses = [row["l1"] for row in records(out) if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert json.loads((out / "summary.json").read_text())["quantizer"] == quantizer


def test_losses_without_weights_are_left_out_but_not_of_a_preset_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "download_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    out = tmp_path / "run"
    train("--out", out, "--steps", 2)
    assert not {"perceptual", "contrastive"} & records(out)[0].keys()
    left_out = json.loads((out / "config.json").read_text())["facts"]["left out"]
    assert "perceptual and contrastive losses" in left_out
    assert "--perceptual-weights" in left_out
    assert len(left_out) < 130
    # A resumed run has the same losses, though there are weights now.
    monkeypatch.setattr(build, "load_vgg_features", lambda net, _: VGGFeatures(net))
    resume(out, "--steps", 4)
    assert not {"perceptual", "contrastive"} & records(out)[-2].keys()
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "download_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    loss = VQGAN_PRESETS["ade20k"].loss
    with pytest.raises(OSError, match=r"--perceptual-weights.*--contrastive none"):
        build.build_reconstruction_loss(loss, optional=False)
    loss = replace(loss, perceptual_weights=Path("random"))
    with pytest.raises(OSError, match=r"VGG-19.*--contrastive-weights"):
        build.build_reconstruction_loss(loss, optional=False)
    _, built, facts = build.build_reconstruction_loss(loss)
    assert (built.perceptual_weight, built.contrastive) == (1.0, "none")
    assert "contrastive loss" in facts["left out, too"]


def test_short_runs_on_a_cpu_say_why_they_do_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    train("--out", tmp_path / "run", *FAST, "--steps", 2, "--compile")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["compile"]
    assert "off: on a CPU" in config["facts"]["compilation"]
    assert worth_compiling(True, torch.device("cuda"), 2) == (True, "")
    assert worth_compiling(True, torch.device("cpu"), 10**6) == (True, "")
    assert worth_compiling(False, torch.device("cpu"), 2) == (False, "")


def test_a_seed_decides_a_run_to_the_last_bit(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("--out", tmp_path / name, *FAST, "--seed", seed)
    a, b, c = (without_clock(records(tmp_path / name)) for name in "abc")
    assert a == b
    assert a != c


def test_parts_of_a_batch_make_the_same_step_as_the_whole() -> None:
    losses = []
    for parts in (1, 2):
        config = override(
            VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=4,
            batch_size=4, accumulate=parts, quantizer="vq-gan", perceptual_weight=0, contrastive="none", device="cpu",
        )  # fmt: skip
        trainer = Trainer(VQGANRecipe, config)
        for step in range(3):
            trainer.step(step)
        losses.append(trainer.record()[0])
    assert losses[0]["l1"] == pytest.approx(losses[1]["l1"], rel=1e-4)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-3)


def make_photos(photos: Path) -> Path:
    for split in ("train", "val"):
        (photos / split).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / split / f"{i}.png")
    return photos


def test_a_folder_of_images_trains_and_unreadable_ones_are_counted(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    (photos / "train" / "broken.png").write_bytes(b"not an image")
    (photos / "val" / "9.avif").write_bytes(b"")
    train("--data", photos, "--out", tmp_path / "run", *FAST, "--steps", 6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["unreadable images"] == 1
    told = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]["data"]
    assert (
        told == f"{photos}: 7 training images, 6 validation images of 32 px; left out: 2 files (1 .avif, 1 unreadable)"
    )


def test_a_run_inside_its_data_does_not_train_on_its_own_images_and_resumes_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "photos" / "train").parent
    for k, path in enumerate(sorted((photos / "train").rglob("*.png"))):
        path.rename(photos / f"{k}.png")
    monkeypatch.chdir(photos)
    train("--data", ".", "--out", "runs/a", *FAST)
    told = json.loads(Path("runs/a/config.json").read_text())["facts"]["data"]
    assert list(Path("runs/a/pictures").iterdir())
    monkeypatch.chdir(tmp_path)
    resume(photos / "runs" / "a", "--steps", 6)
    assert records(photos / "runs" / "a")[-1]["step"] == 6
    again = json.loads((photos / "runs/a/config.json").read_text())["facts"]["data"]
    assert again.partition(": ")[2] == told.partition(": ")[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_go_bad_end_a_run_with_the_way_to_continue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    photos, out, step = make_photos(tmp_path / "photos"), tmp_path / "run", Trainer.step

    def damaging(trainer: Trainer[Any], number: int) -> None:
        if number == 3:
            for path in (photos / "train").iterdir():
                path.write_bytes(b"")
        step(trainer, number)

    monkeypatch.setattr(Trainer, "step", damaging)
    with pytest.raises(SystemExit) as stop:
        train("--data", photos, "--out", out, *FAST, "--steps", 99, "--checkpoint-every", 2, "--workers", workers)
    assert stop.value.code == 1
    done = checkpoints(out)[-1]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("stopped after step ")
    assert said.endswith(
        f": none of the 6 images of the 'train' split in {photos} can be read; to continue from {done}: "
        f"python train/vq.py --resume --out {out}"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--image-size", "33"], r"--image-size 33 .*\b32$"),
        (["--preset", "ade20k"], "--preset ade20k .*--data"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--device", "abacus"], "--device abacus"),
        (["--image-size", "8"], r"--image-size .*\b16 .*\b8$"),
        (["--workers", "-1"], "--workers .*-1$"),
        (["--contrastive-patches", "1"], r"--contrastive-patches .*\b1$"),
        (
            ["--contrastive-region", "masked", "--quantizer", "vq-gan"],
            "--contrastive-region masked .*--quantizer vq-gan",
        ),
        (
            ["--contrastive-weights", "vgg.pth"],
            "--contrastive-weights vgg.pth .*--contrastive-net same",
        ),
        (
            ["--contrastive-weights", "vgg.pth", "--contrastive-net", "vgg19", "--contrastive-weight", "0"],
            "--contrastive-weights vgg.pth .*no contrastive loss",
        ),
        (["--weight-decay", "nan"], "--weight-decay .*nan$"),
        (["--disc-layers", "0"], r"--disc-layers .*\b0$"),
        (["--kl-weight", "nan"], "--kl-weight .*nan$"),
        (["--betas", "0.9", "1"], r"--betas .*\(0\.9, 1\.0\)$"),
        (["--seed", str(2**63)], f"--seed .*{2**63}$"),
        (["--tau", "0"], r"tau .*\b0\.0$"),
        (["--mask-ratio", "1.5"], r"mask_ratio .*\b1\.5$"),
        (["--steps", "0"], r"--steps .*\b0$"),
        (["--keep-checkpoints", "0"], r"--keep-checkpoints .*\b0$"),
        (["--checkpoint-every", "-1"], "--checkpoint-every .*-1$"),
        (["--max-skipped", "-1"], "--max-skipped .*-1$"),
        (["--collapse-threshold", "1.5"], r"--collapse-threshold .*\b1\.5$"),
        (
            ["--batch-size", "6", "--grad-accum-steps", "4"],
            "--grad-accum-steps 4 .*--batch-size 6.* 1, 2, 3, 6",
        ),
        (["--lr", "-1"], r"--lr .*-1\.0$"),
        (["--disc-lr", "0"], r"--disc-lr .*\b0\.0$"),
        (["--disc-betas", "0.9", "1"], r"--disc-betas .*\(0\.9, 1\.0\)$"),
        (["--l2-weight", "-1"], r"--l2-weight .*-1\.0$"),
        (["--lecam-weight", "-1"], r"--lecam-weight .*-1\.0$"),
        (["--r1-every", "0"], r"--r1-every .*\b0$"),
        (["--schedule", "wsd", "--final-lr-fraction", "1"], "--schedule wsd .*--final-lr-fraction 1"),
        (["--log", "tensorboard", "paper"], "--log .*'paper'$"),
        (["--perceptual-weights", "no/such.pth"], "no/such.pth"),
        (["--disc-start", "0", "--disc-layers", "5"], "5 layers"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train("--out", tmp_path / "run", *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_readable_image_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        (tmp_path / "photos" / split / "a.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit, match=r"error: .*photos"):
        train("--data", tmp_path / "photos", "--out", tmp_path / "run", "--quantizer", "vq-gan")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        train("--out", tmp_path / "file" / "run", *FAST)


def test_the_discriminator_has_settings_and_regularizers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    penalized, step = [], VQGANStep.__call__

    def counted(self: VQGANStep, *arguments: Any, **others: Any) -> Any:
        penalized.append(others["adversarial"] and others["penalize"])
        return step(self, *arguments, **others)

    monkeypatch.setattr(VQGANStep, "__call__", counted)
    tiny: dict[str, Any] = {"image_size": 32, "ch": 8, "ch_mult": (1, 2), "z_channels": 8, "code_dim": 8, "steps": 9}
    tiny |= {"batch_size": 2, "perceptual_weight": 0, "contrastive": "none", "device": "cpu", "disc_filters": 4}
    config = override(VQGANConfig(), **tiny, lr=1e-3, betas=(0.9, 0.95), warmup_steps=2, disc_start=1)
    own = override(config, disc_lr=2e-4, disc_betas=(0.0, 0.99), r1_weight=0.5, r1_every=3, disc_loss="non-saturating")
    for settings, lr, betas, steps in ((config, 1e-3, (0.9, 0.95), []), (own, 2e-4, (0.0, 0.99), [1, 4])):
        penalized.clear()
        trainer = Trainer(VQGANRecipe, settings)
        for number in range(6):
            trainer.step(number)
        assert [number for number, found in enumerate(penalized) if found] == steps
        (model,), (discriminator,) = trainer.optimization.optimizers.values()
        assert {(group["lr"], group["betas"]) for group in model.param_groups} == {(1e-3, (0.9, 0.95))}
        assert {(group["lr"], group["betas"]) for group in discriminator.param_groups} == {(lr, betas)}
        assert trainer.lr == 1e-3
    train_step = trainer.recipe.train_step
    assert train_step.r1_weight == 1.5
    assert train_step.adversarial_loss is ADVERSARIAL_LOSSES["non-saturating"]


def test_overflow_of_scaled_gradients_skips_the_step_and_lowers_the_scale() -> None:
    config = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=9,
        batch_size=4, perceptual_weight=0, contrastive="none", device="cpu", disc_start=0, disc_filters=4,
    )  # fmt: skip
    trainer = Trainer(VQGANRecipe, config)
    trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = trainer.networks.model.last_layer.detach().clone()
    trainer.step(0)
    values, _ = trainer.record()  # no error: an overflow is part of the search for a scale
    assert "grad_norm" not in values
    assert values["loss_scale"] == 2.0**125
    assert torch.equal(trainer.networks.model.last_layer, before)
    trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.step(1)
    assert trainer.record()[0]["grad_norm"] > 0
    assert not torch.equal(trainer.networks.model.last_layer, before)


def test_runs_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"empty folder.*--resume"):
        train("--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("preset", VQGAN_PRESETS)
def test_presets_build(preset: str) -> None:
    with torch.device("meta"):
        model = build_model(VQGAN_PRESETS[preset])
    factor = 4 if preset == "scenes" else 16
    assert model.downsampling_factor == factor
    assert VQGAN_PRESETS[preset].run.preset == preset


def test_a_discriminator_that_never_joins_says_so() -> None:
    tiny = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=4,
        batch_size=4, perceptual_weight=0, contrastive="none", device="cpu",
    )  # fmt: skip
    found = [Trainer(VQGANRecipe, config).metadata["discriminator"] for config in (tiny, override(tiny, disc_start=4))]
    assert found == ["none; --disc-start N brings it in", "none: --disc-start 4 is past the last step, 3"]
