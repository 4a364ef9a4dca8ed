"""Whole runs of the scripts of train/ at a tiny size, in this process, and what they leave."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

TRAIN = Path(__file__).parents[2] / "train"
SCRIPT = TRAIN / "vq.py"
TINY = (
    "--steps 4 --batch-size 4 --image-size 32 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 8 --num-codes 16 "
    "--val-images 6 --log-every 2 --image-every 2 --device cpu --disc-filters 4 --warmup-steps 2"
).split()
FAST = ["--perceptual-weight", "0", "--contrastive", "none"]
PRIORS = {"ar": "ar.py", "diffusion": "diffusion.py", "maskgit": "maskgit.py"}
PRIOR = (
    "--steps 4 --batch-size 8 --log-every 2 --image-every 3 --device cpu --warmup-steps 2 --width 16 --depth 1 "
    "--heads 2"
).split()


def train(*flags: object) -> None:
    """Run the script with these flags on top of `TINY`."""
    run_script(*TINY, *flags)


def fit(prior: str, *flags: object) -> None:
    """Run the script of a prior with these flags on top of `PRIOR`."""
    run_script(*PRIOR, *flags, script=PRIORS[prior])


def resume(folder: Path, *flags: object, script: str = "vq.py") -> None:
    run_script("--resume", "--out", folder, *flags, script=script)


def run_script(*flags: object, script: str = "vq.py") -> None:
    with patch.object(sys, "argv", [f"train/{script}", *map(str, flags)]):
        runpy.run_path(str(TRAIN / script), run_name="__main__")


def torchrun(script: Path | str, *flags: object, processes: int = 2) -> list[str]:
    """Return the command that runs a script on several processes of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, str(script), *map(str, flags)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clock = {"images_per_second", "data_wait"}
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def state_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "training.pt", weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    """The same weights, records and state of training, to the last bit."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert without_clock(records(a)) == without_clock(records(b))
    newest = checkpoints(a)[-1]
    assert newest == checkpoints(b)[-1]
    first, second = (state_of(folder / "checkpoints" / newest) for folder in (a, b))
    del first["metrics_bytes"], second["metrics_bytes"]  # the clock's digits
    assert_equal(first, second, newest)


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_equal(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{k}]")
    else:
        assert a == b, where
