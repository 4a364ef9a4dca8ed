"""The training scripts of the priors as their users run them: tokens, resuming, processes, graphs, and refusals."""

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
from helpers.runs import (
    FAST,
    PRIOR,
    PRIORS,
    TRAIN,
    assert_same_run,
    fit,
    records,
    resume,
    torchrun,
    train,
    without_clock,
)
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

pytestmark = pytest.mark.usefixtures("few_regions")
SMALL = {"width": 16, "depth": 1, "heads": 2, "device": "cpu"}  # as fields


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


@pytest.mark.parametrize(("prior", "own"), [("ar", []), ("ar", ["--arch", "llama", "--muon"]), ("diffusion", [])])
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
