"""Two ranks do what one does: gloo on the CPU, GAN, contrastive loss and the global prior on."""

import subprocess

import pytest
import torch
from helpers import train_on_ranks
from helpers.runs import torchrun
from helpers.train_on_ranks import CASES, Case


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, dict]]]:
    """Results of all cases from one run of two ranks: starting ranks takes longer than the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(torchrun(train_on_ranks.__file__, folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}


def assert_same(one: list[dict[str, dict]], two: list[dict[str, dict]]) -> None:
    for alone, together in zip(one, two, strict=True):
        for module in ("model", "discriminator", "lecam"):
            assert alone[module].keys() == together[module].keys()
            for name, value in alone[module].items():
                difference = (together[module][name] - value).abs().max()
                assert difference <= 1e-5 * max(1.0, float(value.abs().max())), f"{name}: {difference}"


@pytest.mark.parametrize("quantizer", ["reg-vq", "vq-vae", "ibq", "lfq", "bsq"])
def test_two_ranks_take_the_steps_of_one(two_ranks: dict[str, list[dict[str, dict]]], quantizer: str) -> None:
    one, two = train_on_ranks.train(Case(quantizer)), two_ranks[quantizer]
    assert_same(one, two)
    for alone, together in zip(one, two, strict=True):
        assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)
    assert one[-1]["metrics"]["lambda"] > 0


def test_regularizers_of_two_ranks_are_those_of_one(two_ranks: dict[str, list[dict[str, dict]]]) -> None:
    one = train_on_ranks.train(CASES["regularized"])
    assert_same(one, two_ranks["regularized"])
    assert {"r1" in step["metrics"] for step in one[1:]} == {True, False}
    assert one[-1]["metrics"]["lecam"] > 0
    weights = [results[-1]["discriminator"]["main.0.weight"] for results in (one, two_ranks["reg-vq"])]
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_parts_of_a_ranks_batch_add_up_before_the_ranks_do(two_ranks: dict[str, list[dict[str, dict]]]) -> None:
    assert CASES["parts"].parts == 2
    assert_same(train_on_ranks.train(Case(by_image=True)), two_ranks["parts"])


def test_two_compiled_ranks_take_the_steps_of_one(two_ranks: dict[str, list[dict[str, dict]]]) -> None:
    assert CASES["compiled"].compile
    assert_same(train_on_ranks.train(Case()), two_ranks["compiled"])
