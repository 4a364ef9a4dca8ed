"""Two ranks do what one does: gloo on the CPU, GAN, contrastive loss and the global prior on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_on_ranks.py")


def train(out: Path, ranks: int, *arguments: str) -> list:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def assert_same(one: list, two: list) -> None:
    for alone, together in zip(one[:2], two[:2], strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            difference = (together[name] - value).abs().max()
            assert difference <= 1e-5 * max(1.0, float(value.abs().max())), f"{name}: {difference}"


@pytest.mark.parametrize("quantizer", ["reg-vq", "vq-vae"])
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, quantizer: str) -> None:
    one = train(tmp_path / "one.pt", 1, "--quantizer", quantizer)
    two = train(tmp_path / "two.pt", 2, "--quantizer", quantizer)
    assert_same(one, two)
    for alone, together in zip(one[2], two[2], strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert one[2][-1]["lambda"] > 0


def test_parts_of_a_ranks_batch_add_up_before_the_ranks_do(tmp_path: Path) -> None:
    one = train(tmp_path / "one.pt", 1, "--by-image")
    two = train(tmp_path / "two.pt", 2, "--by-image", "--parts", "2")
    assert_same(one, two)


def test_two_compiled_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    assert_same(train(tmp_path / "one.pt", 1), train(tmp_path / "two.pt", 2, "--compile"))
