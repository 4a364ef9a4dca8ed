"""A run that is interrupted and resumed is the run that was not, to the last bit."""

import copy
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import FAST, SCRIPT, TINY, assert_same_run, checkpoints, records, resume, train
from safetensors.torch import load_file
from torch import Tensor

from regvq_fast.config import VQGANConfig, override
from regvq_fast.data.samples import Batch
from regvq_fast.models import VQGAN
from regvq_fast.training.checkpoint import Checkpoint
from regvq_fast.training.recipe import Step
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe

STEPS = 12
RUN = (
    f"--steps {STEPS} --dropout 0.2 --ema 0.9 --disc-start 5 --grad-accum-steps 2 --eval-every 4 --log-every 3 "
    "--final-lr-fraction 0.1 --checkpoint-every 2 --disc-lr 1e-4 --lecam-weight 0.1 --r1-weight 0.01 --r1-every 3"
).split()


# A run that kills itself: {0} is where, {1} the command line.
KILLED = """
import os, runpy, signal, sys
from regvq_fast.models import pretrained
from regvq_fast.training.optimization import Optimization

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{0}
sys.argv = {1!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(*FAST, *RUN, "--out", out)
    return out


def in_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something in the middle of a step, once."""
    original = VQGANRecipe.step

    def step(recipe: VQGANRecipe, batch: Batch, now: Step) -> dict[str, Tensor]:
        metrics = original(recipe, batch, now)
        if now.number == number:
            monkeypatch.setattr(VQGANRecipe, "step", original)
            action()
        return metrics

    monkeypatch.setattr(VQGANRecipe, "step", step)


def stop_after(monkeypatch: pytest.MonkeyPatch, done: int, *flags: object) -> None:
    """Train until so many steps are done."""
    in_step(monkeypatch, done - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(*FAST, *flags)


@pytest.mark.parametrize("where", ["in a step", "in a checkpoint"])
def test_a_run_survives_kill_9(whole: Path, tmp_path: Path, where: str) -> None:
    out = tmp_path / "run"
    step = random.randrange(1, STEPS)  # any step must do
    print(f"killed {where}, {step}")
    if where == "in a step":
        patch = "update, steps = Optimization.step, []\n"
        patch += f"Optimization.step = lambda *a: die() if len(steps) == {step} else steps.append(update(*a))"
    else:  # its files are written, its name is not; each checkpoint waits twice for the disk
        patch = f"calls = []\npretrained._sync = lambda _: die() if len(calls) == {step // 2 * 2} else calls.append(1)"
    code = KILLED.format(patch, [str(SCRIPT), *TINY, *FAST, *RUN, "--out", str(out)])
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume(out)
    assert_same_run(whole, out)
    assert not list(out.rglob(".*")), "temporary files are left"


@pytest.mark.parametrize(("number", "quantizer"), [(signal.SIGTERM, "vq-vae"), (signal.SIGINT, "gumbel-vq")])
def test_a_signal_ends_the_step_saves_a_checkpoint_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    quantizer: str,
) -> None:
    flags = [*FAST, *RUN, "--quantizer", quantizer]
    train(*flags, "--out", tmp_path / "whole")
    handler = signal.getsignal(number)
    in_step(monkeypatch, 6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train(*flags, "--out", tmp_path / "broken", "--checkpoint-every", 0)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is handler
    assert checkpoints(tmp_path / "broken") == ["step-0000007"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"{number.name} .*step 7 of {STEPS}\b.* step-0000007: ", said)
    assert said.endswith(f": python train/vq.py --resume --out {tmp_path / 'broken'}")
    resume(tmp_path / "broken", "--workers", 1)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_second_signal_stops_at_once_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    in_step(monkeypatch, 2, twice)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", tmp_path / "run", "--checkpoint-every", 2)
    assert stop.value.code == 143
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    first, second = list(filter(None, capfd.readouterr().err.splitlines()))[-2:]
    assert "second signal" in first
    assert second.endswith(f" step-0000002: python train/vq.py --resume --out {tmp_path / 'run'}")


def test_pictures_are_abandoned_at_a_signal(monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    save_images = VQGANRecipe.save_images

    def interrupted(recipe: VQGANRecipe, model: Any, path: Path) -> None:
        monkeypatch.setattr(VQGANRecipe, "save_images", save_images)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did not end image sampling")

    monkeypatch.setattr(VQGANRecipe, "save_images", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, *RUN, "--out", out)
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoints(out) == ["step-0000002"]
    resume(out)
    assert_same_run(whole, out)


def test_an_evaluation_that_a_signal_cuts_short_is_done_after_resuming(
    monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    evaluate = VQGANRecipe.evaluate

    def interrupted(recipe: VQGANRecipe, *arguments: Any) -> Any:
        monkeypatch.setattr(VQGANRecipe, "evaluate", evaluate)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(recipe, *arguments)

    monkeypatch.setattr(VQGANRecipe, "evaluate", interrupted)
    with pytest.raises(SystemExit):
        train(*FAST, *RUN, "--out", out)
    assert [row["split"] for row in records(out)] == ["train"] * 2
    resume(out)
    assert_same_run(whole, out)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stop_after(monkeypatch, 9, *RUN, "--out", out)
    assert checkpoints(out) == ["step-0000008", "step-0000009"]
    damaged = out / "checkpoints" / "step-0000009" / "training.pt"
    size = damaged.stat().st_size
    os.truncate(damaged, size // 2)
    (out / "checkpoints" / "step-0000099").mkdir()
    resume(out)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"{damaged} is truncated: {size // 2:,} of {size:,} bytes are there; checkpoint step-0000009 is skipped" in said
    )
    assert "has no manifest.json: it is not a checkpoint or is incomplete; checkpoint step-0000099 is skipped" in said
    assert f"resuming from {out / 'checkpoints' / 'step-0000008'}" in said
    assert {"damaged-step-0000009", "damaged-step-0000099"} <= set(checkpoints(out))
    for name in ("damaged-step-0000009", "damaged-step-0000099"):
        (out / "checkpoints" / name).rename(tmp_path / name)
    assert_same_run(whole, out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-codes", "32", "--seed", "5"], "--seed is 5 here but 0 in"),
        (["--num-codes", "32"], "--num-codes is 32 here but 16 in"),
        (["--preset", "ade20k", "--data", "."], r"--preset .*ade20k .*scenes"),
        (["--batch-size", "8"], r"--batch-size .*\b8 .*\b4\b"),
        (["--perceptual-weight", "1"], r"--perceptual-weight .*1\.0 .*0\.0"),
    ],
)
def test_another_configuration_is_refused_by_its_first_field(whole: Path, flags: list[str], message: str) -> None:
    before = (whole / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=f"{message}.*step-0000012"):
        resume(whole, *flags)
    assert before == (whole / "config.json").read_bytes()


def test_a_run_cannot_end_before_the_steps_that_it_has_done(whole: Path) -> None:
    before = (whole / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=r"\b12 .*\b11\b.*--steps"):
        resume(whole, "--steps", 11)
    assert before == (whole / "config.json").read_bytes()


def test_a_finished_run_that_goes_on_serves_its_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(*FAST, "--out", out)
    finished = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"--seed .*5"):
        resume(out, "--steps", 6, "--seed", 5)
    resume(out)
    assert (out / "model.safetensors").read_bytes() == finished
    assert (out / "summary.json").exists()
    in_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        resume(out, "--steps", 6)
    assert not (out / "model.safetensors").exists()
    assert not (out / "summary.json").exists()
    newest = load_file(out / "checkpoints" / "step-0000005" / "model.safetensors")
    served = VQGAN.from_pretrained(out).state_dict()
    assert all(torch.equal(served[name], value) for name, value in newest.items())


@pytest.mark.parametrize("where", ["opening.Trainer.__init__", "recorder.Recorder.__enter__"])
def test_ctrl_c_before_the_first_step_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"regvq_fast.training.{where}", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", tmp_path / "run")
    assert stop.value.code == 130
    (said,) = capsys.readouterr().err.splitlines()
    assert "before the first step" in said


def test_a_run_that_saved_nothing_starts_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise RuntimeError("a bug")

    train(*FAST, "--out", tmp_path / "whole")
    in_step(monkeypatch, 3, crash)
    with pytest.raises(SystemExit):
        train(*FAST, "--out", tmp_path / "broken")
    assert len(records(tmp_path / "broken")) == 2
    resume(tmp_path / "broken")
    assert "no checkpoint" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_scale_of_the_losses_is_resumed(tmp_path: Path) -> None:
    config = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=9,
        batch_size=4, perceptual_weight=0, contrastive="none", device="cpu",
    )  # fmt: skip
    trainer = Trainer(VQGANRecipe, config)
    trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)
    for step in range(4):
        trainer.step(step)
    saved = copy.deepcopy(trainer.state())
    again = Trainer(VQGANRecipe, config)
    again.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3, growth_interval=3)
    again.load(Checkpoint(4, tmp_path, copy.deepcopy(trainer.eval_model.state_dict()), saved))
    assert again.optimization.scaler.state_dict() == trainer.optimization.scaler.state_dict()
    assert trainer.optimization.scaler.get_scale() == 2.0**7
    for step in range(4, 6):
        trainer.step(step)
        again.step(step)
    assert again.optimization.scaler.get_scale() == trainer.optimization.scaler.get_scale() == 2.0**8
    for name, value in trainer.networks.model.state_dict().items():
        assert torch.equal(value, again.networks.model.state_dict()[name]), name
