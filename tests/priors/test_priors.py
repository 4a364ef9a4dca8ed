"""The training scripts of the priors as their users run them, and train/sample.py on what they leave."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import FAST, TRAIN, assert_same_run, records, resume, run_script, torchrun, train, without_clock
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from regvq_fast.config import override
from regvq_fast.data.loading import read_samples
from regvq_fast.models import VQGAN
from regvq_fast.precision import Precision
from regvq_fast.priors.autoregressive.config import ARConfig
from regvq_fast.priors.autoregressive.recipe import ARRecipe
from regvq_fast.scenes import ScenesDataset
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.trainer import Trainer

PRIORS = {"ar": "ar.py", "diffusion": "diffusion.py", "maskgit": "maskgit.py"}
PRIOR = (
    "--steps 4 --batch-size 8 --log-every 2 --image-every 3 --device cpu --warmup-steps 2 --width 16 --depth 1 "
    "--heads 2"
).split()
pytestmark = pytest.mark.usefixtures("few_regions")
SMALL = {"width": 16, "depth": 1, "heads": 2, "device": "cpu"}  # as fields


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train(*FAST, "--out", out, "--ch-mult", 1, 1, 2)
    return out


@pytest.fixture(scope="module")
def cache(tokenizer: Path) -> Path:
    out = tokenizer.parent / "cache"
    flags = ["--scenes", 32, "--val-images", 10, "--views", 2, "--device", "cpu"]
    run_script("--tokenizer", tokenizer, "--out", out, *flags, script="cache_tokens.py")
    return out


def fit(prior: str, *flags: object) -> None:
    run_script(*PRIOR, *flags, script=PRIORS[prior])


@pytest.fixture(scope="module")
def runs(cache: Path) -> dict[str, Path]:
    out = {prior: cache.parent / prior for prior in PRIORS}
    for prior, folder in out.items():
        fit(prior, "--cache", cache, "--out", folder)
    return out


@pytest.mark.parametrize("prior", PRIORS)
def test_a_run_leaves_all_that_its_users_need(runs: dict[str, Path], prior: str) -> None:
    out = runs[prior]
    assert {path.name for path in out.iterdir()} == {
        *"config.json metrics.jsonl summary.json model.safetensors tokenizer checkpoints pictures tensorboard".split()
    }
    assert {path.name for path in (out / "pictures").iterdir()} == {"samples.png", "samples-0000003.png"}
    with Image.open(out / "pictures" / "samples.png") as image:
        stacks = 3 * 192 + 2 * 2 if prior == "diffusion" else 3 * 128 + 2 * 2
        assert (image.height > stacks + 2 * 8) == (prior != "diffusion"), "maps have a legend"
    rows = records(out)
    assert [row["step"] for row in rows] == [1, 2, 4, 4]
    assert rows[-1]["split"] == "val"
    assert rows[-1]["loss"] > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == 10
    measures = ["layout", "classes"] if prior == "diffusion" else ["agreement"]
    for measure in measures:  # far above chance already with so little to learn from
        assert summary[f"{measure} of scenes"] > 0.3
        assert 0 <= summary[f"{measure} of samples"] <= 1


@pytest.mark.parametrize("prior", PRIORS)
def test_tokens_made_on_the_fly_train_the_same_prior(
    runs: dict[str, Path], tokenizer: Path, tmp_path: Path, prior: str
) -> None:
    out = tmp_path / "run"
    # As many training samples as an epoch of the cache has; the stream itself does not end.
    flags = ["--on-the-fly", "--tokenizer", tokenizer, "--val-images", 10]
    fit(prior, *flags, "--out", out)
    assert without_clock(records(out)) == without_clock(records(runs[prior]))
    assert (out / "model.safetensors").read_bytes() == (runs[prior] / "model.safetensors").read_bytes()


def test_epochs_count_images_whether_their_tokens_are_cached_or_not(cache: Path, tokenizer: Path) -> None:
    steps = []
    for tokens in ({"cache": cache}, {"on_the_fly": True, "tokenizer": tokenizer}):
        trainer = Trainer(ARRecipe, override(ARConfig(), epochs=3, batch_size=8, **SMALL, **tokens))
        steps.append((trainer.data.images_per_epoch, trainer.steps))
    assert steps == [(32, 12), (8192, 3072)]


def test_a_cache_trains_while_its_images_are_out_of_reach(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def unreachable(data: object) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr("regvq_fast.priors.prior_recipe.dataset_class", unreachable)
    trainer = Trainer(ARRecipe, override(ARConfig(), steps=1, batch_size=8, cache=cache, **SMALL))
    assert trainer.recipe.dataset.class_names == ()
    trainer.step(0)


def test_another_precision_makes_other_tokens_but_no_other_images(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    tokens, fingerprints = [], []
    cpu = torch.device("cpu")
    for dtype in (None, torch.bfloat16):
        precision = Precision(cpu, dtype, "")
        monkeypatch.setattr("regvq_fast.training.trainer.choose_precision", lambda *_, precision=precision: precision)
        trainer = Trainer(ARRecipe, override(ARConfig(), on_the_fly=True, tokenizer=tokenizer, **SMALL))
        tokens.append(trainer.recipe.tokenize(read_samples(trainer.data.train, range(16)))["tokens"])
        fingerprints.append(trainer.networks.fingerprint)
    assert not torch.equal(*tokens)
    assert len(set(fingerprints)) == 1


def test_images_are_encoded_in_parts_and_compiled_as_the_prior_is(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tokenizer: Path, tmp_path: Path
) -> None:
    compiled, sizes = [], set()
    tokenize, compile = VQGAN.tokenize, torch.compile

    def compiling(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return compile(function, backend="aot_eager", **options)

    def watched(model: VQGAN, images: Tensor) -> Tensor:
        sizes.add(len(images))
        return tokenize(model, images)

    monkeypatch.setattr(VQGAN, "tokenize", watched)
    monkeypatch.setattr(ScenesDataset, "evaluate_samples", lambda *_: {})  # it looks at images of its own
    flags = ["--on-the-fly", "--tokenizer", tokenizer, "--val-images", 10]
    fit("ar", *flags, "--grad-accum-steps", 2, "--out", tmp_path / "parts")
    assert sizes == {4, 2}
    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr("regvq_fast.training.compilation.CPU_STEPS", 0)
    fit("ar", *flags, "--grad-accum-steps", 2, "--out", tmp_path / "compiled", "--compile")
    assert len(compiled) == 2
    for run in ("parts", "compiled"):
        for row, whole in zip(records(tmp_path / run), records(runs["ar"]), strict=True):
            assert row["loss"] == pytest.approx(whole["loss"], rel=1e-3)


@pytest.mark.parametrize(("prior", "own"), [("ar", []), ("ar", ["--arch", "llama"]), ("diffusion", [])])
def test_a_resumed_run_equals_one_without_a_break(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, prior: str, own: list[str]
) -> None:
    flags = ["--cache", cache, "--ema", 0.5, "--dropout", 0.3, *own]
    fit(prior, *flags, "--out", tmp_path / "whole")
    step: Callable[[Trainer[Any], int], None] = Trainer.step

    def interrupted(trainer: Trainer[Any], number: int) -> None:
        step(trainer, number)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        fit(prior, *flags, "--out", tmp_path / "broken")
    monkeypatch.setattr(Trainer, "step", step)
    assert stop.value.code == 128 + signal.SIGTERM
    moved = shutil.copytree(cache, tmp_path / "moved")
    resume(tmp_path / "broken", "--cache", moved, script=PRIORS[prior])
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert ("blocks.0.attn.qk_gain" in load_file(tmp_path / "whole" / "model.safetensors")) == ("llama" in own)


@pytest.mark.parametrize(("stage", "prior"), [("fit", "ar"), ("sample", "ar"), ("sample", "diffusion")])
def test_a_signal_ends_the_closing_evaluation_which_resuming_repeats(
    monkeypatch: pytest.MonkeyPatch,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    prior: str,
) -> None:
    out = shutil.copytree(runs[prior], tmp_path / "run")
    (out / "summary.json").unlink()
    counted = []

    class Interrupting(Recorder):
        @contextmanager
        def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
            def update(done: int, total: int) -> None:
                counted.append((done, total))
                os.kill(os.getpid(), signal.SIGINT)

            with super().stage(name) as show:
                yield update if name.startswith({"fit": "fitting", "sample": "sampling"}[stage]) else show

    with monkeypatch.context() as patch:
        patch.setattr("regvq_fast.training.opening.Recorder", Interrupting)
        with pytest.raises(SystemExit) as stop:
            resume(out, script=PRIORS[prior])
    assert stop.value.code == 128 + signal.SIGINT
    assert len(counted) == 1
    assert counted[0][0] < counted[0][1]
    script = f"train/{PRIORS[prior]}"
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"SIGINT .*step 4 of 4\b.*evaluation.* step-0000004: ", said)
    assert said.endswith(f": python {script} --resume --out {out}")
    assert not (out / "summary.json").exists()
    resume(out, script=PRIORS[prior])
    again, whole = (json.loads((folder / "summary.json").read_text()) for folder in (out, runs[prior]))
    assert [value for name, value in again.items() if " of " in name] == [
        value for name, value in whole.items() if " of " in name
    ]


def test_a_resumed_run_has_its_tokenizer_with_it(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tokenizer: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(ScenesDataset, "evaluate_samples", lambda *_: {})
    moved, gone = shutil.copytree(cache, tmp_path / "moved"), tmp_path / "gone"
    info = json.loads((moved / "cache.json").read_text())
    (moved / "cache.json").write_text(json.dumps(info | {"tokenizer": str(gone)}))
    with pytest.raises(SystemExit, match=f"{gone} .*{moved}"):
        fit("ar", "--cache", moved, "--out", tmp_path / "cached")
    shutil.copytree(tokenizer, gone)
    fit("ar", "--cache", moved, "--out", tmp_path / "cached")
    fit("ar", "--on-the-fly", "--tokenizer", gone, "--val-images", 10, "--out", tmp_path / "on the fly")
    other = tmp_path / "other"
    train(*FAST, "--out", other, "--ch-mult", 1, 1, 2, "--seed", 1, "--steps", 1)
    shutil.rmtree(gone)
    shutil.copytree(other, gone)  # as one that was trained on
    for run in ("cached", "on the fly"):
        resume(tmp_path / run, "--steps", 5, script="ar.py")
        assert records(tmp_path / run)[-1]["step"] == 5
    with pytest.raises(SystemExit, match=r"tokenizer.* checkpoint"):
        resume(tmp_path / "on the fly", "--tokenizer", other, "--steps", 6, script="ar.py")
    shutil.rmtree(gone)
    for run in ("cached", "on the fly"):
        resume(tmp_path / run, "--steps", 6, script="ar.py")
    own = tmp_path / "on the fly" / "tokenizer"
    shutil.rmtree(own)
    VQGAN.from_pretrained(other).save_pretrained(own)
    with pytest.raises(SystemExit, match=r"tokenizer.* checkpoint"):
        resume(tmp_path / "on the fly", "--steps", 7, script="ar.py")


@pytest.mark.parametrize("prior", ["diffusion", "maskgit"])
def test_two_processes_train_the_prior_of_one(runs: dict[str, Path], cache: Path, tmp_path: Path, prior: str) -> None:
    """Diffusion adapts its step sampling to all ranks; masks have random numbers that depend on the rank."""
    out = tmp_path / "run"
    code = "import runpy, regvq_fast.scenes.evaluation as evaluation; evaluation.FITTED_TO = 128\n"
    code += f"runpy.run_path({str(TRAIN / PRIORS[prior])!r}, run_name='__main__')"
    script = tmp_path / "script.py"
    script.write_text(code)
    command = torchrun(script, *PRIOR, "--cache", cache, "--out", out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for row, alone in zip(records(out), records(runs[prior]), strict=True):
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    one, two = (load_file(folder / "model.safetensors") for folder in (runs[prior], out))
    difference = sum(float((two[name] - value).square().sum()) for name, value in one.items())
    assert difference <= 1e-5 * sum(float(value.square().sum()) for value in one.values())


@pytest.mark.parametrize("prior", PRIORS)
def test_a_step_is_one_graph(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], cache: Path, tmp_path: Path, prior: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("regvq_fast.training.compilation.CPU_STEPS", 0)
    fit(prior, "--cache", cache, "--out", tmp_path / "run", "--compile")
    for row, eager in zip(records(tmp_path / "run"), records(runs[prior]), strict=True):
        assert row["loss"] == pytest.approx(eager["loss"], rel=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_counting_operations_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], cache: Path, tmp_path: Path, prior: str
) -> None:
    monkeypatch.setattr("regvq_fast.training.throughput.peak_flops", lambda device, dtype: 1e12)
    fit(prior, "--cache", cache, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (runs[prior] / "model.safetensors").read_bytes()
    assert records(tmp_path / "run")[1]["mfu"] > 0


@pytest.mark.parametrize(
    ("prior", "flags", "message"),
    [
        ("ar", [], "--cache"),
        ("ar", ["--on-the-fly"], "--on-the-fly .*tokenizer"),
        ("diffusion", ["--cache", "nothing"], "nothing"),
        ("diffusion", ["--cache", "{cache}", "--on-the-fly"], "exclude each other"),
        ("diffusion", ["--cache", "{cache}", "--data", "photos"], "--data photos .*--on-the-fly"),
        ("diffusion", ["--cache", "{cache}", "--val-images", "7"], "--val-images 7 .*--on-the-fly"),
        ("ar", ["--cache", "{cache}", "--crop", "random-resized"], "--crop random-resized .*--on-the-fly"),
        ("ar", ["--cache", "{cache}", "--no-flip"], "--no-flip .*--on-the-fly.* {cache}"),
        ("ar", ["--cache", "{cache}", "--tokenizer", "{other}"], "this tokenizer"),
        (
            "ar",
            ["--cache", "{cache}", "--num-classes", "9"],
            r"--num-classes .*\b9 \({cache} .*16",
        ),
        (
            "ar",
            ["--on-the-fly", "--tokenizer", "{tokenizer}", "--num-classes", "300"],
            r"\b300 \(embedded scenes .*16",
        ),
        ("ar", ["--on-the-fly", "--tokenizer", "x", "--preset", "ade20k"], "--preset ade20k"),
        ("ar", ["--cache", "{cache}", "--keep", "2"], r"--keep .*\b2\.0$"),
        ("diffusion", ["--cache", "{cache}", "--diffusion-steps", "1"], r"--diffusion-steps .*\b1$"),
        ("ar", ["--cache", "{cache}", "--heads", "3"], "width.* heads"),
        ("ar", ["--on-the-fly", "--tokenizer", "{cache}"], "{cache}"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    cache: Path, tokenizer: Path, tmp_path: Path, prior: str, flags: list[str], message: str
) -> None:
    other = tmp_path / "other"
    if "{other}" in flags:
        train(*FAST, "--out", other, "--ch-mult", 1, 1, 2, "--seed", 1, "--steps", 1)
    places = {"cache": str(cache), "tokenizer": str(tokenizer), "other": str(other)}
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=message.format(**places)):
        fit(prior, *(flag.format(**places) for flag in flags), "--out", out)
    assert not out.exists()


def test_a_map_with_other_ids_than_the_classes_is_one_that_cannot_be_read(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU, an embedding that is asked for one of them would end the process."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for k in range(count):
            stem = tmp_path / "photos" / split / str(k)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"{stem}.png")
            Image.fromarray(np.full((40, 40), 2 if k == 1 else k % 2, dtype=np.uint8)).save(f"{stem}.seg.png")
    flags = ["--on-the-fly", "--tokenizer", tokenizer, "--data", tmp_path / "photos", "--num-classes", 2]
    fit("ar", *flags, "--out", tmp_path / "run")
    assert (
        sum("class ids of a segmentation map must be in 0..1, got 2..2" in message for message in caplog.messages) == 2
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["unreadable images"] == 2


# ------------------------------------------------------------------------------------------------------------ sampling


def sample(*flags: object) -> None:
    run_script(*flags, "--device", "cpu", script="sample.py")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_images_under_their_semantic_maps(runs: dict[str, Path], tmp_path: Path) -> None:
    sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path / "a", "--num-images", 5, "--batch-size", 2)
    sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path / "b", "--num-images", 5, "--guidance", 1.0)
    names = ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:  # in batches of two as in one of five
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))
    assert pixels(tmp_path / "a" / "00000.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "a" / "grid.png").shape[0] >= 8 + 2 * 128 + 2 + 8 + 20, "a legend is below"
    assert not np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "a" / "00001.png"))


def test_a_map_of_a_file_and_an_edited_image(runs: dict[str, Path], tmp_path: Path) -> None:
    ids = np.zeros((48, 48), dtype=np.uint8)
    ids[:, 24:] = 7
    Image.fromarray(ids).save(tmp_path / "map.png")
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    mask = np.zeros((40, 40), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "nothing.png")
    flags = ["--prior", "ar", "--run", runs["ar"], "--map", tmp_path / "map.png", "--num-images", 2]
    edit = ["--edit", tmp_path / "photo.png", "--mask", tmp_path / "nothing.png"]
    sample(*flags, *edit, "--out", tmp_path / "kept", "--top-k", 4, "--top-p", 0.9, "--temperature", 0.7)
    first, second = (pixels(tmp_path / "kept" / f"0000{k}.png") for k in range(2))
    assert np.array_equal(first, second)  # the whole image is kept
    mask[:20] = 255
    Image.fromarray(mask).save(tmp_path / "half.png")
    sample(*flags, *edit[:2], "--mask", tmp_path / "half.png", "--out", tmp_path / "half")
    first, second = (pixels(tmp_path / "half" / f"0000{k}.png") for k in range(2))
    assert not np.array_equal(first, second)


def test_images_of_captions_with_their_states(runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--run", runs["diffusion"], "--num-images", 3, "--steps", 4]
    sample(*flags, "--text", "a cat", "bricks", "--strip", "--guidance", 2, "--out", tmp_path / "said")
    assert (tmp_path / "said" / "strip.png").exists()
    assert len(list((tmp_path / "said").glob("0*.png"))) == 3
    sample(*flags, "--out", tmp_path / "validation")
    assert len(list((tmp_path / "validation").glob("0*.png"))) == 3


def test_images_grow_beyond_the_grid(runs: dict[str, Path], tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    flags = ["--run", runs["diffusion"], "--num-images", 2, "--steps", 2, "--text", "a cat"]
    sample(*flags, "--extend", "right", "down", "--edit", tmp_path / "photo.png", "--out", tmp_path / "out")
    first, second = (pixels(tmp_path / "out" / f"0000{k}.png") for k in range(2))
    assert first.shape == (48, 48, 3)
    assert not np.array_equal(first, second)

    ids = np.zeros((60, 90), dtype=np.uint8)
    ids[:, 30:] = 7
    Image.fromarray(ids).save(tmp_path / "map.png")
    flags = ["--run", runs["ar"], "--map", tmp_path / "map.png", "--num-images", 1, "--extend", "right"]
    sample(*flags, "--out", tmp_path / "wide")
    assert pixels(tmp_path / "wide" / "00000.png").shape == (32, 48, 3)
    assert pixels(tmp_path / "wide" / "grid.png").shape[1] >= 144


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{ar}", "--extend", "right"], "--extend .*--map"),
        (["--run", "{ar}", "--label", "cat"], "--label .*segmentation"),
        (["--run", "{diffusion}", "--per-class", "2"], "--per-class .*caption"),
        (["--run", "{diffusion}", "--strip", "--extend", "up"], "--strip .*--extend"),
        (["--run", "{diffusion}", "--mask", "ids.png"], "--mask .*--edit"),
        (["--prior", "ar", "--run", "{ar}", "--text", "a cat"], "--text .*segmentation"),
        (["--run", "{ar}", "--strip"], "--strip .*autoregressive"),
        (["--run", "{diffusion}", "--map", "map.png"], "--map .*caption"),
        (["--prior", "diffusion", "--run", "{ar}"], "TokenTransformer.* VQDiffusion"),
        (["--prior", "ar", "--run", "nothing"], "nothing"),
        (["--prior", "ar", "--run", "{ar}", "--num-images", "0"], r"--num-images .*\b0$"),
        (["--prior", "ar", "--run", "{ar}", "--edit", "photo.png"], "--edit .*--mask"),
        (["--prior", "ar", "--run", "{ar}", "--map", "ids.png"], r"ids\.png .*\b16\b"),
        (
            ["--prior", "ar", "--run", "{ar}", "--map", "small.png"],
            r"--map small\.png .*2 x 2 .*\b8\b",
        ),
        (["--prior", "ar", "--run", "{ar}", "--map", "colours.png"], "class id"),
        (["--prior", "ar", "--run", "{ar}", "--map", "text.png"], r"text\.png"),
        (
            ["--prior", "ar", "--run", "{ar}", "--seed", str(2**63)],
            f"--seed .*{2**63}",
        ),
        (["--prior", "ar", "--run", "{ar}", "--top-p", "0"], "top_p"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--steps", "1000"], "steps"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--text", " "], "empty"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--text", "a cat " * 40], "80 words"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 16, dtype=np.uint8)).save("ids.png")
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save("small.png")
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save("colours.png")
    Path("text.png").write_text("no image")
    with pytest.raises(SystemExit, match=message):
        sample(*(flag.format(**runs) for flag in flags), "--out", "samples")
    assert not Path("samples").exists()


def test_guidance_needs_a_null_condition_that_was_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["ar"], run)
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["condition_dropout"] > 0
    config["model"]["condition_dropout"] = 0.0
    (run / "config.json").write_text(json.dumps(config))
    flags = ["--prior", "ar", "--run", run, "--num-images", 1]
    with pytest.raises(SystemExit, match=r"--guidance 2 .*null condition"):
        sample(*flags, "--guidance", 2, "--out", tmp_path / "guided")
    sample(*flags, "--out", tmp_path / "plain")


def test_conditions_are_of_the_cache_that_the_prior_was_trained_on(
    runs: dict[str, Path], tokenizer: Path, cache: Path, tmp_path: Path
) -> None:
    """Another one may have taken its place: with other fields, or of another tokenizer."""
    run, remade = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(runs["ar"], run)
    config = json.loads((run / "config.json").read_text())
    config["tokens"]["cache"] = str(remade)
    (run / "config.json").write_text(json.dumps(config))
    flags = ["--run", run, "--num-images", 1, "--out", tmp_path / "samples"]
    with pytest.raises(SystemExit, match=rf"{remade} .*{run} .*--data, .*--map"):
        sample(*flags)
    made = ["--scenes", 4, "--views", 1, "--val-images", 2, "--fields", "caption", "--device", "cpu"]
    run_script("--tokenizer", tokenizer, "--out", remade, *made, script="cache_tokens.py")
    with pytest.raises(SystemExit, match=rf"{remade} .*{run} .*segmentation"):
        sample(*flags)
    shutil.rmtree(remade)
    shutil.copytree(cache, remade)
    info = json.loads((remade / "cache.json").read_text())
    (remade / "cache.json").write_text(json.dumps(info | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(SystemExit, match=rf"{remade} .*000000000000"):
        sample(*flags)
    assert not (tmp_path / "samples").exists()


def test_samples_are_not_mixed_with_others(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(SystemExit, match="empty folder"):
        sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path)
