"""Evaluations that are killed, or whose data workers are: a sentence, and the same numbers the next time."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import TRAIN
from helpers.tiny_models import TinyNet, tiny_tokenizer
from torch import Tensor

from regvq_fast.cli import evaluate_setup
from regvq_fast.cli.evaluate import ENTROPY_MAP, main
from regvq_fast.data import workers
from regvq_fast.evaluation.measurement import CODE_COUNTS, RESULTS
from regvq_fast.priors.maskgit import MaskGIT

IMAGES, BATCH = 60, 3
FLAGS = f"--data scenes --val-images {IMAGES} --batch-size {BATCH} --device cpu --workers 1".split()
FLAGS += ["--perceptual-weights", "random"]
BATCHES = IMAGES // BATCH
PHASES = {"validation images": 2, "reconstructions": BATCHES + 2, "samples": 2 * BATCHES + 2}
"""Batch of the feature network, counted over the whole evaluation."""


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "maskgit"
    torch.manual_seed(3)
    MaskGIT(32, 16, token_shape=(8, 8), width=16, depth=1, heads=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def flags(prior: Path, out: Path) -> list[str]:
    return [*FLAGS, "--prior-run", str(prior), "--out", str(out), "--cache-dir", str(out / "cache")]


def values(out: Path) -> dict[str, float]:
    return {key: found["value"] for key, found in json.loads((out / RESULTS).read_text()).items()}


class Net(TinyNet):
    """A feature network that does something at one of its batches."""

    def __init__(self, at: int = -1, action: Callable[[], object] = bool) -> None:
        super().__init__()
        self.at, self.action = at, action

    def features(self, images: Tensor) -> Tensor:
        if self.seen // BATCH == self.at:
            self.action()
        return super().features(images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> dict[str, float]:
    """The numbers of an evaluation that nothing disturbs."""
    out, net = tmp_path_factory.mktemp("whole"), Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_setup, "load_feature_net", lambda spec: net)
        main(flags(prior, out))
    assert net.seen == 3 * IMAGES
    return values(out)


def signal_workers(number: signal.Signals) -> None:
    for process in multiprocessing.active_children():
        assert process.pid
        os.kill(process.pid, number)
    time.sleep(0.2)


@pytest.mark.parametrize("phase", PHASES)
def test_a_data_worker_that_ends_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prior: Path, whole: dict[str, float], phase: str
) -> None:
    broken = Net(PHASES[phase], lambda: signal_workers(signal.SIGKILL))
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: broken)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(flags(prior, out))
    assert re.fullmatch(
        r"error: data worker 0 \(process \d+\) ended by SIGKILL; --workers 0 .*", str(stopped.value.code)
    )
    assert broken.seen < 3 * IMAGES
    assert not (out / RESULTS).exists()
    assert not list(out.rglob(".*"))
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: Net())
    main(flags(prior, out))
    assert values(out) == whole


def test_a_folder_removed_before_the_last_stage_has_all_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prior: Path, whole: dict[str, float]
) -> None:
    """The code counts were in the folder that was removed, and missing beside the results."""
    out = tmp_path / "out"
    net = Net(PHASES["samples"], lambda: shutil.rmtree(out))
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: net)
    main(flags(prior, out))
    assert {path.name for path in out.glob("*.*")} >= {RESULTS, CODE_COUNTS, ENTROPY_MAP}
    assert values(out) == whole


def test_out_of_memory_is_a_sentence_with_the_batch_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prior: Path
) -> None:
    def allocate() -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: Net(PHASES["samples"], allocate))
    with pytest.raises(SystemExit, match=rf"^error: out of memory; use a --batch-size below {BATCH}$"):
        main(flags(prior, tmp_path / "out"))
    assert not (tmp_path / "out" / RESULTS).exists()
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_data_worker_that_is_stopped_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prior: Path) -> None:
    def stop() -> None:
        monkeypatch.setattr(workers, "PATIENCE_SECONDS", 1.0)  # from here: the start of a worker takes longer
        signal_workers(signal.SIGSTOP)

    net = Net(PHASES["validation images"], stop)
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: net)
    with pytest.raises(SystemExit, match=r"error: no data for 1 seconds: data worker 0 \(process \d+\) is stopped"):
        main(flags(prior, tmp_path / "out"))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_evaluation_that_was_stopped_leaves_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prior: Path, whole: dict[str, float], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(TRAIN / "evaluate.py"), *flags(prior, out), "--val-images", "9999"]
    command += ["--fid-features", "random-vgg16", "--perceptual-weights", "random"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            while not (out / ".evaluation.lock").exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in said
    assert not (out / RESULTS).exists()
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: Net())
    main(flags(prior, out))
    assert values(out) == whole
    assert not list(out.rglob(".*"))
