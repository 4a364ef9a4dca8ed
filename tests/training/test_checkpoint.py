"""Folders of weights and checkpoints: whole or not there, checked when read, few."""

import errno
import hashlib
import json
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import FAST, assert_same_run, checkpoints, records, resume, train
from helpers.tiny_models import tiny_vqgan
from safetensors.torch import save_file

from regvq_fast.models import VQGAN
from regvq_fast.quantizers import (
    EMAQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    NearestQuantizer,
    Quantizer,
    RegularizedQuantizer,
    SimVQQuantizer,
)
from regvq_fast.ranks import set_random_state
from regvq_fast.training.checkpoint import Checkpoint, Checkpoints
from regvq_fast.training.recorder import Recorder, reason
from regvq_fast.training.trainer import Trainer


def tiny_model(quantizer: Quantizer | None = None) -> VQGAN:
    return tiny_vqgan(quantizer, attn_resolutions=(8,)).eval()


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"architecture": {}}, {"w": torch.tensor(float(step))}, {})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes: writing fails half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "quantizer",
    [
        RegularizedQuantizer(8, 4, perturbed=0.3, tau=0.5),
        RegularizedQuantizer(8, 4, logits="linear"),
        RegularizedQuantizer(8, 4, logits="cosine", prior_scope="image"),
        GumbelQuantizer(8, 4, tau_start=2.0),
        NearestQuantizer(8, 4, commitment=0.5),
        EMAQuantizer(8, 4, decay=0.9, kmeans_init=True),
        SimVQQuantizer(8, 4, rotation_trick=False),
        IBQQuantizer(8, 4, entropy_weight=0.1),
    ],
    ids=lambda quantizer: quantizer.extra_repr(),
)
def test_a_saved_model_comes_back_as_it_was(tmp_path: Path, quantizer: Quantizer) -> None:
    model = tiny_model(quantizer)
    model.save_pretrained(tmp_path / "model")
    again = VQGAN.from_pretrained(tmp_path / "model")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert not again.training
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)
    assert vars(again.quantize).keys() == vars(quantizer).keys()
    for name, value in vars(quantizer).items():
        assert name.startswith("_") or name == "training" or getattr(again.quantize, name) == value, name
    assert again.architecture() == json.loads(json.dumps(model.architecture()))
    again.save_pretrained(tmp_path / "model")  # replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_saving_replaces_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a folder"):
        tiny_model().save_pretrained(tmp_path)

    class Own(NearestQuantizer):
        pass

    with pytest.raises(ValueError, match="QUANTIZERS"):
        tiny_model(Own(4, 4)).save_pretrained(tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors .*\b0 of"),
        (lambda f: save_file({"w": torch.ones(99_999)}, f / "model.safetensors"), "SHA-256"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors .*checkpoints/"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{}"), r"manifest\.json"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), r"manifest\.json"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        VQGAN.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_files_without_checksums_are_checked_by_what_they_say(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    VQGAN.from_pretrained(tmp_path / "model")
    config, weights = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    good = config.read_text()
    for bad, message in (
        ("{", "'architecture'"),
        ("[]", "'architecture'"),
        (good.replace("NearestQuantizer", "Nothing"), "'Nothing'"),
        (good.replace("z_channels", "channels"), "fit this version"),
        (good.replace("commitment", "devotion"), "fit this version"),
    ):
        config.write_text(bad)
        with pytest.raises(ValueError, match=message):
            VQGAN.from_pretrained(tmp_path / "model")
    config.write_text(good)
    weights.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="not a safetensors file"):
        VQGAN.from_pretrained(tmp_path / "model")
    save_file({"w": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match="more parameters than its weights"):
        VQGAN.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VQGAN.from_pretrained(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError, match=f"model.safetensors .*{tmp_path / 'model'}"):
        VQGAN.from_pretrained(weights)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step, psnr in enumerate([10.0, 30.0, 20.0, float("nan"), 25.0, 30.0], start=1):
        save(kept, step)
        if kept.is_best({"psnr": psnr}):
            kept.mark_best({"psnr": psnr})
    assert checkpoints(tmp_path) == ["step-0000002", "step-0000005", "step-0000006"]
    assert kept.has(6)
    assert not kept.has(5)

    newest = tmp_path / "checkpoints" / "step-0000006"
    again = Checkpoints(tmp_path, keep=1, start=Checkpoint(6, newest))
    assert not again.is_best({"psnr": 29.0})
    assert again.is_best({"psnr": 31.0})
    assert again.is_best({"perceptual": 0.5, "psnr": 1.0})
    save(again, 7)
    assert checkpoints(tmp_path) == ["step-0000002", "step-0000007"]
    again.mark_best({"perceptual": 0.5})
    assert checkpoints(tmp_path) == ["step-0000007"]
    assert not again.is_best({"perceptual": 0.6})
    assert again.is_best({"perceptual": 0.4})


def test_what_a_kill_left_is_cleared_away_and_other_ranks_write_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(Checkpoints(tmp_path, keep=2), 3)
    half = tmp_path / "checkpoints" / ".step-0000004.17.new"
    half.mkdir()
    (half / "training.pt").write_text("ha")
    start = Checkpoint(3, tmp_path / "checkpoints" / "step-0000003")
    with monkeypatch.context() as other_rank:
        other_rank.setattr("regvq_fast.training.checkpoint.rank", lambda: 1)
        reader = Checkpoints(tmp_path, keep=1, start=start)
    save(reader, 5)
    reader.mark_best({"psnr": 1.0})
    assert half.exists()
    assert reader.has(5)
    Checkpoints(tmp_path, keep=1, start=start)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]


def test_each_rank_continues_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.Generator().manual_seed(seed).get_state() for seed in range(2)]
    for rank in (1, 0):
        monkeypatch.setattr("regvq_fast.ranks.rank", lambda rank=rank: rank)
        with torch.random.fork_rng():
            set_random_state({"cpu": torch.stack(states)}, torch.device("cpu"))
            assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(rank)))


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("exploded").touch, ())

    out = tmp_path / "run"
    train(*FAST, "--out", out)
    folder = out / "checkpoints" / "step-0000004"
    torch.save({"step": 4, "bomb": Bomb()}, folder / "training.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "training.pt").read_bytes()
    manifest["files"]["training.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="not a training state"):
        resume(out)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """Else its weights would continue with the batches of that step."""
    out = tmp_path / "run"
    train(*FAST, "--out", out)
    (out / "checkpoints" / "step-0000004").rename(out / "checkpoints" / "step-0000003")
    with pytest.raises(SystemExit, match=r"step-0000003.* step 3\b"):
        resume(out)


def test_a_checkpoint_or_a_run_is_a_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(*FAST, "--out", out, "--ema", 0.5, "--checkpoint-every", 2)
    final = VQGAN.from_pretrained(out).state_dict()
    last = VQGAN.from_pretrained(out / "checkpoints" / "step-0000004").state_dict()
    early = VQGAN.from_pretrained(out / "checkpoints" / "step-0000002").state_dict()
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert not all(torch.equal(final[name], early[name]) for name in final)
    (out / "model.safetensors").unlink()  # as in a run that is not at its end
    newest = VQGAN.from_pretrained(out).state_dict()
    assert all(torch.equal(final[name], newest[name]) for name in final)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FAST, "--out", tmp_path / "whole", "--steps", 6, "--checkpoint-every", 2)
    out = tmp_path / "run"
    step = Trainer.step

    def limited(trainer: Trainer[Any], number: int) -> None:
        if number == 3:  # from here to the end of the next step there is room for the records, but not for weights
            limit.__enter__()
        if number == 5:
            limit.__exit__(None, None, None)
        step(trainer, number)

    limit = largest_file(100_000)
    monkeypatch.setattr(Trainer, "step", limited)
    train(*FAST, "--out", out, "--steps", 6, "--checkpoint-every", 2, "--keep-checkpoints", 3, "--image-every", 9)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "warning: the checkpoint of step 4 could not be saved (File too large); the run can be resumed from "
        "step-0000002" in said
    )
    assert checkpoints(out) == ["step-0000002", "step-0000006"]
    assert not list(out.rglob(".*"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_results_that_find_no_room_are_made_up_for_by_resuming(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FAST, "--out", tmp_path / "whole")
    out = tmp_path / "run"
    conclude = Trainer.conclude

    def limited(*arguments: Any) -> None:
        with largest_file(100_000):
            conclude(*arguments)

    monkeypatch.setattr(Trainer, "conclude", limited)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out)
    monkeypatch.setattr(Trainer, "conclude", conclude)
    assert stop.value.code == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("all steps are done, but the results could not be written (File too large")
    assert said.endswith(f"; make room, then: python train/vq.py --resume --out {out}")
    assert not (out / "traceback.txt").exists()
    assert not (out / "model.safetensors").exists()
    assert not list(out.rglob(".*"))
    resume(out)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_records_wait_for_room_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Recorder.record

    def limited(recorder: Recorder, step: int, *arguments: Any, **others: Any) -> None:
        if step in (2, 4):
            with largest_file((recorder.folder / "metrics.jsonl").stat().st_size + 20):
                record(recorder, step, *arguments, **others)
                recorder._trackers._each(
                    lambda tracker: tracker._writer.flush()
                )  # its thread writes when it likes, else
        else:
            record(recorder, step, *arguments, **others)

    monkeypatch.setattr(Recorder, "record", limited)
    train(*FAST, "--out", tmp_path / "run", "--steps", 6)
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2, 4, 6, 6]
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: tensorboard gets no more numbers (File too large); metrics.jsonl has them" in said
    assert said.count("warning: metrics.jsonl could not be written (File too large); the run continues") == 1


def test_an_error_names_no_temporary_file() -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device", ".step-4.17.new")) == "No space left on device"
    assert reason(OSError("stalled")) == "stalled"
