"""Runs of priors whose weights two ranks share out, and the same runs with whole weights, for `test_sharding.py`.

python -m torch.distributed.run --nproc-per-node 2 train_sharded.py FOLDER steps|runs

FOLDER/cache has tokens; FOLDER/alone, for "runs", is the run of one process. At the end of these rank 0 kills itself
while it writes a checkpoint.
"""

import functools
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from regvq_fast.config import override, read_config
from regvq_fast.precision import Precision
from regvq_fast.priors.prior_recipe import PriorRecipe
from regvq_fast.priors.registry import PRIORS
from regvq_fast.ranks import process_group, rank
from regvq_fast.training import checkpoint, trainer
from regvq_fast.training.opening import open_run
from regvq_fast.training.sharding import full, local
from regvq_fast.training.trainer import Trainer

STEPS = 4
CONFIG: dict[str, Any] = {
    "steps": STEPS, "batch_size": 8, "accumulate": 2, "ema": 0.5, "warmup_steps": 2, "width": 32, "depth": 2,
    "heads": 2, "device": "cpu", "log_every": 1, "image_every": 3, "checkpoint_every": 2, "keep_checkpoints": 3,
}  # fmt: skip
# Rounding decides no more than the last digits without the norm's, which is summed up in another order.
UNCLIPPED = {"clip_grad": 0.0}
CLIPPED = {"clip_grad": 0.1}

CPU = torch.device("cpu")
# Cases of some steps: how the trainer differs from that of CONFIG.
STEPPED: dict[str, dict[str, Any]] = {
    "diffusion": {"prior": "diffusion", "muon": False},  # which takes whole matrices
    "bf16": {"precision": Precision(CPU, torch.bfloat16, ""), "activation_checkpointing": True},
    "scaled": {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)},
    "skipped": {"skip": 1},
    "flops": {"flops": True},
}
COMPILED: dict[str, dict[str, Any]] = {"compiled": {"compile": True, "accumulate": 1}}


@contextmanager
def quick() -> Iterator[None]:
    """Leave out what is no part of training: judging samples takes longer than the run."""
    with patch.object(PriorRecipe, "evaluate_samples", lambda *_: {}):
        yield


def config_of(folder: Path, prior: str = "ar", **changes: Any) -> Any:
    return override(PRIORS[prior].presets["scenes"], **(CONFIG | {"cache": folder / "cache"} | changes))


def run(folder: Path, name: str, prior: str = "ar", **changes: Any) -> Trainer[Any]:
    """A whole run in FOLDER/NAME; with ``resume`` the one that is there goes on."""
    config = config_of(folder, prior)
    if changes.get("resume"):
        config = read_config(folder / name, type(config))
    with quick():
        opened = open_run(PRIORS[prior].recipe, override(config, out=folder / name, **changes))
        opened.fit()
    return opened


def rewound(folder: Path, source: str, name: str) -> None:
    """Copy a run as it was at its first checkpoint."""
    shutil.copytree(folder / source, folder / name)
    shutil.rmtree(folder / name / "checkpoints" / f"step-{STEPS:07d}")


def stepped(
    folder: Path,
    *,
    prior: str = "ar",
    precision: Precision | None = None,
    scaler: torch.amp.GradScaler | None = None,
    skip: int | None = None,
    flops: bool = False,
    compile: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Take some steps; return what they were, and the weights after them."""
    chosen = precision or Precision(CPU, None, "")
    with (
        patch.object(trainer, "choose_precision", lambda *_: chosen),
        patch.object(trainer, "worth_compiling", lambda *_: (compile, "")),
        # Traced as graphs; generating code for them would take a minute.
        patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")),
    ):
        made = Trainer(PRIORS[prior].recipe, config_of(folder, prior, **(UNCLIPPED | changes)))
        if scaler is not None:
            made.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)
        found: dict[str, Any] = {"records": []}
        for number in range(STEPS):
            if flops and number == 1:
                found["flops"] = made._flops_per_image(number)
            with poisoned() if number == skip and rank() == 1 else quick():
                made.step(number)
            found["records"].append(made.record()[0])
        names = ("model", "average")
        for name, module in zip(names, (made.networks.model, made.optimization.judged), strict=True):
            found[name] = {key: full(value).clone() for key, value in module.state_dict().items()}
        found["scale"] = made.optimization.scaler.get_scale()
        found["bytes"] = memory(made)
    return found


def memory(of: Trainer[Any]) -> dict[str, int]:
    """Bytes of this rank's parameters, averages and optimizer states."""
    states = (value for state in of.optimization.optimizers["grad_norm"][0].state.values() for value in state.values())
    kinds: dict[str, Any] = {
        "parameters": of.networks.model.parameters(),
        "averages": of.optimization.judged.parameters(),
        "optimizer": states,
    }
    return {name: sum(local(value).untyped_storage().nbytes() for value in values) for name, values in kinds.items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """Losses are not numbers."""
    step = PriorRecipe.step

    def bad(recipe: PriorRecipe[Any], batch: Any, now: Any) -> dict[str, Tensor]:
        return step(recipe, batch, now._replace(loss_scale=now.loss_scale * torch.nan))

    with patch.object(PriorRecipe, "step", bad):
        yield


def full_disk(path: Path, content: object) -> Any:
    if rank() == 1 and "step-0000002" in str(path):
        raise OSError(28, "No space left on device")
    return write_file(path, content)  # type: ignore[arg-type]


def killed(path: Path, *arguments: Any) -> None:
    if path.name == "step-0000004":
        assert len(list(path.parent.glob(".step-0000004.shards/*"))) == 2
        os.kill(os.getpid(), signal.SIGKILL)
    write_folder(path, *arguments)


write_file, write_folder = checkpoint.write_file, checkpoint.write_folder


def take_steps(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    for name, case in cases.items():
        results = {kind: stepped(folder, **case, shard=kind == "sharded") for kind in ("whole", "sharded")}
        torch.save(results, folder / f"{name}-{rank()}.pt")


def make_runs(folder: Path) -> None:
    take_steps(folder, COMPILED)
    for clip, changes in {"unclipped": UNCLIPPED, "clipped": CLIPPED}.items():
        run(folder, f"{clip}-whole", **changes)
        run(folder, f"{clip}-sharded", shard=True, **changes)
    if rank() == 0:
        rewound(folder, "unclipped-sharded", "again")
        rewound(folder, "alone", "from-one")
    torch.distributed.barrier()
    run(folder, "again", resume=True, shard=True, **UNCLIPPED)
    run(folder, "from-one", resume=True, shard=True, **CLIPPED)
    with patch.object(checkpoint, "write_file", full_disk):
        run(folder, "full", shard=True, **UNCLIPPED)
    (folder / f"done-{rank()}").touch()
    with patch.object(checkpoint, "write_folder", killed):
        run(folder, "killed", shard=True, **UNCLIPPED)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with process_group(CPU):
        if sys.argv[2] == "steps":
            take_steps(folder, STEPPED)
        else:
            make_runs(folder)


if __name__ == "__main__":
    main()
