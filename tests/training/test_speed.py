"""What a run tells of its speed: waits, operations, traces."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import FAST, records, train

from regvq_fast.config import VQGANConfig, override
from regvq_fast.precision import configure_backends
from regvq_fast.training.throughput import peak_flops
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe


def test_records_tell_how_long_the_step_waited_for_data(tmp_path: Path) -> None:
    train(*FAST, "--out", tmp_path / "run", "--log-every", 1)
    rows = [row for row in records(tmp_path / "run") if row["split"] == "train"]
    assert "data_wait" not in rows[0]  # the first step waits for the start of the workers
    assert all(0 < row["data_wait"] < 1 for row in rows[1:])


def test_waits_are_those_of_the_time_that_they_are_a_share_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A picture between two records begins the window anew."""
    step = Trainer.step

    def slow_data(trainer: Trainer[Any], number: int) -> None:
        step(trainer, number)
        assert trainer._batches is not None
        if number == 3:
            trainer._batches._waited += 100.0

    monkeypatch.setattr(Trainer, "step", slow_data)
    train(*FAST, "--out", tmp_path / "run", "--steps", 6, "--log-every", 3, "--image-every", 4)
    rows = [row for row in records(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert all(row["data_wait"] < 1 for row in rows[1:])


@pytest.mark.parametrize("asked", [2, 9])
def test_a_trace_of_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: int) -> None:
    """From the fourth one on, or of those that are left of the run."""
    train(*FAST, "--out", tmp_path / "run", "--steps", 7 if asked == 2 else 5, "--trace-steps", asked)
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) >= 2
    assert any("regvq::vector_quantize" in name for name in names)
    assert "traced 2 steps: " in " ".join(capsys.readouterr().out.split())


def test_too_few_steps_for_a_trace_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(*FAST, "--out", tmp_path / "run", "--steps", 3, "--trace-steps", 2)
    assert re.search(r"--trace-steps 2 .*\b3\b", " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "run" / "trace.json").exists()


def test_rank_0_alone_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("regvq_fast.training.trace.rank", lambda: 1)
    train(*FAST, "--out", tmp_path / "run", "--steps", 5, "--trace-steps", 1)
    assert not (tmp_path / "run" / "trace.json").exists()


def test_counting_operations_changes_nothing_and_gives_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=9,
        batch_size=4, quantizer="vq-vae", disc_start=1, disc_filters=4, perceptual_weight=0.0, contrastive="none",
        device="cpu", dropout=0.5,
    )  # fmt: skip
    plain = Trainer(VQGANRecipe, config)
    assert plain.utilization(0, 100.0) == {}  # nobody knows a CPU's peak
    monkeypatch.setattr("regvq_fast.training.throughput.peak_flops", lambda device, dtype: 1e9)
    counted = Trainer(VQGANRecipe, config)
    ratios = []
    for step in range(3):
        # Dropout draws from the global generator: both trainers get the same stretch of it.
        torch.manual_seed(step)
        plain.step(step)
        torch.manual_seed(step)
        counted.step(step)
        ratios.append(counted.utilization(step, 100.0)["mfu"])
    for name, value in plain.networks.model.state_dict().items():
        assert torch.equal(value, counted.networks.model.state_dict()[name]), name
    for name, value in plain.recipe.discriminator.state_dict().items():
        assert torch.equal(value, counted.recipe.discriminator.state_dict()[name]), name
    assert torch.equal(plain.networks.meter.usage.counts, counted.networks.meter.usage.counts)
    assert 0 < ratios[0] < ratios[1] == ratios[2]  # the discriminator joins at step 1
    macs = 8 * 3 * 9 * 32 * 32  # the encoder's first convolution: forward, and the gradient of its weights
    assert ratios[0] * 1e9 / 100 > 2 * 2 * macs


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", None, 495),  # TF32, in which fp32 networks multiply
        ("NVIDIA H100 PCIe", None, 378),
        ("NVIDIA A100-SXM4-80GB", None, 156),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H200 NVL", torch.bfloat16, 835),
        ("NVIDIA H100 NVL", None, 418),
        ("Tesla V100-SXM2-32GB", None, 15.7),  # which has no TF32
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 5090", None, None),
    ],
)
def test_peaks_are_of_what_the_networks_compute_in(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype | None, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype) == (None if tflops is None else tflops * 1e12)


def test_what_is_computed_again_to_save_memory_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regvq_fast.training.throughput.peak_flops", lambda device, dtype: 1e9)
    ratios = []
    for again in (False, True):
        config = override(
            VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=9,
            batch_size=4, perceptual_weight=0.0, contrastive="none", device="cpu", activation_checkpointing=again,
        )  # fmt: skip
        ratios.append(Trainer(VQGANRecipe, config).utilization(0, 100.0))
    assert ratios[0] == ratios[1]


def test_deterministic_is_one_switch() -> None:
    try:
        configure_backends(torch.device("cpu"), True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    finally:
        configure_backends(torch.device("cpu"), False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
