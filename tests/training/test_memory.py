"""Too little memory: what is said, what is found to fit, and what activation checkpointing changes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import FAST, assert_same_run, checkpoints, records, resume, train
from torch import Tensor

from regvq_fast.config import VQGANConfig, override
from regvq_fast.models import VQGAN
from regvq_fast.precision import is_out_of_memory
from regvq_fast.training.batch_size import largest_batch, runs_in_memory
from regvq_fast.training.memory import out_of_memory_advice
from regvq_fast.training.trainer import Trainer


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 40, 63, 64, 65, 1000])
def test_the_largest_batch_is_found_in_few_tries(limit: int, unit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_batch(fits, unit) == limit // unit * unit
    assert all(size % unit == 0 for size in tried)
    assert len(tried) <= 2 * max(limit // unit, 1).bit_length() + 1


def test_what_is_too_large_for_any_machine_is_out_of_memory() -> None:
    cpu = torch.device("cpu")
    assert not runs_in_memory(lambda: torch.empty(2**60, dtype=torch.uint8), cpu)
    assert runs_in_memory(lambda: torch.empty(1), cpu)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        runs_in_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3), cpu)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "add --activation-checkpointing or --grad-accum-steps 2"),
        ({"accumulate": 2}, "add --activation-checkpointing or --grad-accum-steps 4"),
        ({"accumulate": 4, "activation_checkpointing": True}, "add --grad-accum-steps 8"),
        ({"accumulate": 8, "activation_checkpointing": True}, "use a smaller --batch-size in a new run"),
    ],
)
def test_the_advice_is_what_is_not_done_yet(changes: dict[str, Any], advice: str) -> None:
    config = override(VQGANConfig(), batch_size=8, **changes)
    said = out_of_memory_advice(config, torch.device("cpu"), 8)
    assert said.startswith("out of memory at a peak of ")
    assert said.endswith(f" GiB; {advice}")
    assert out_of_memory_advice(config, torch.device("cpu"), 8, training=False).endswith(
        advice.replace("--activation-checkpointing or ", "")
    )


def test_out_of_memory_ends_with_advice_that_resuming_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def hungry(trainer: Trainer[Any], number: int) -> None:
        if number == 3:
            torch.empty(2**60, dtype=torch.uint8)
        step(trainer, number)

    monkeypatch.setattr(Trainer, "step", hungry)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out, "--checkpoint-every", 2)
    monkeypatch.setattr(Trainer, "step", step)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped after step 3: out of memory at a peak of")
    assert (
        "add --activation-checkpointing or --grad-accum-steps 2; to continue from step-0000002: python train/vq.py"
        in said
    )
    resume(out, "--activation-checkpointing", "--grad-accum-steps", 2)
    assert re.search(r"--grad-accum-steps .*\b2\b.*\b1\b", " ".join(capsys.readouterr().out.split()))
    assert checkpoints(out) == ["step-0000002", "step-0000004"]


def test_parts_bound_evaluations_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, sizes = VQGAN.encode, set()

    def limited(model: VQGAN, images: Tensor) -> Tensor:
        if not model.training:
            sizes.add(len(images))
            if len(images) == 4:
                torch.empty(2**60, dtype=torch.uint8)
        return encode(model, images)

    flags = [*FAST, "--quantizer", "vq-gan", "--image-every", 9]
    train(*flags, "--out", tmp_path / "whole")
    monkeypatch.setattr(VQGAN, "encode", limited)
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        train(*flags, "--out", out)
    said = capsys.readouterr().err
    assert said.startswith("stopped after step 4: out of memory in an evaluation at a peak of")
    assert "GiB; add --grad-accum-steps 2; to continue from step-0000004" in said
    resume(out, "--grad-accum-steps", 2)
    assert sizes == {4, 2, 6}  # 6: all validation images in one grid
    found, expected = (records(run)[-1] for run in (out, tmp_path / "whole"))
    assert found.pop("split") == expected.pop("split") == "val"
    assert found == pytest.approx(expected, rel=1e-4)


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    flags = [*FAST, "--disc-start", 2]
    train(*flags, "--out", tmp_path / "a")
    train(*flags, "--out", tmp_path / "b", "--activation-checkpointing")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [row["step"] for row in records(tmp_path / "b")] == [1, 2, 4, 4]


def test_the_largest_batch_is_looked_for_with_whole_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step
    taken: list[tuple[int, int]] = []

    def limited(trainer: Trainer[Any], number: int) -> None:
        step(trainer, number)
        taken.append((trainer.batch_size, number))
        if trainer.batch_size > 13:
            raise torch.OutOfMemoryError("CUDA out of memory")

    # A CPU has no such limit, and native code doesn't survive one that is set: what a GPU would do is played.
    monkeypatch.setattr(Trainer, "step", limited)
    monkeypatch.setattr("regvq_fast.training.batch_size.memory_limit", lambda device: 2**33)
    out = tmp_path / "run"
    train(*FAST, "--find-batch-size", "--out", out, "--grad-accum-steps", 2, "--disc-start", 1)
    *tries, result = capsys.readouterr().out.splitlines()
    assert result == "largest batch of one process: --batch-size 12"
    assert [int(line.split()[0]) for line in tries] == [2, 4, 8, 16, 12, 14]
    assert tries[3].split("images")[1].strip() == "out of memory"
    assert "GiB" in tries[4]
    assert taken[:4] == [(2, 1), (2, 2), (4, 1), (4, 2)]  # with the discriminator
    train(*FAST, "--find-batch-size", "--out", out)
    assert taken[-1] == (13, 1)
    assert (2, 0) in taken  # a run without one
    assert not out.exists()


def test_without_a_gpu_there_is_no_largest_batch() -> None:
    with pytest.raises(SystemExit, match=r"--find-batch-size .*GPU"):
        train("--find-batch-size")
