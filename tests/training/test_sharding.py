"""Sharded weights: two ranks that share them out make the run of two that have all of them, and of one process."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_sharded
from helpers.runs import assert_equal, checkpoints, records, state_of, torchrun, train, without_clock
from helpers.tiny_models import tiny_tokenizer
from helpers.train_sharded import CLIPPED, STEPPED, UNCLIPPED, config_of, rewound, run
from safetensors.torch import load_file

from regvq_fast.cli.cache_tokens import CacheConfig, cache_tokens
from regvq_fast.priors.autoregressive.recipe import ARRecipe
from regvq_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokens."""
    folder = tmp_path_factory.mktemp("sharding")
    tiny_tokenizer(16).save_pretrained(folder / "tokenizer")
    few = {"views": 1, "scenes": 32, "val_images": 6, "workers": 0, "device": "cpu"}
    cache_tokens(CacheConfig(tokenizer=folder / "tokenizer", out=folder / "cache", **few))
    return folder


def on_ranks(folder: Path, part: str) -> str:
    """Run a part of `train_sharded.py` on two ranks, to start which takes longer than their steps."""
    command = torchrun(train_sharded.__file__, folder, part)
    return subprocess.run(command, capture_output=True, text=True, timeout=300).stderr


@pytest.fixture(scope="module")
def steps(folder: Path) -> Path:
    errors = on_ranks(folder, "steps")
    assert (folder / "flops-1.pt").exists(), errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    run(folder, "alone", **CLIPPED)
    errors = on_ranks(folder, "runs")
    assert all((folder / f"done-{rank}").exists() for rank in range(2)), errors[-3000:]
    assert "SIGKILL" in errors
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_close_runs(one: Path, two: Path) -> None:
    """Up to the order of sums, of which AdamW makes a whole step where a gradient is all but zero."""
    first, second = weights(one), weights(two)
    difference = sum(float((second[name] - value).square().sum()) for name, value in first.items())
    assert difference <= 1e-8 * sum(float(value.square().sum()) for value in first.values())
    assert len(records(one)) == len(records(two)) > 4
    for row, other in zip(without_clock(records(one)), without_clock(records(two)), strict=True):
        for name, value in row.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


def assert_same_steps(folder: Path, case: str) -> None:
    for rank in range(2):
        results = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        whole, sharded = results["whole"], results["sharded"]
        norms = [[row.pop("grad_norm", 0.0) for row in result["records"]] for result in (whole, sharded)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)  # summed up in another order
        assert [row["skipped"] for row in whole["records"]] == [int(case == "skipped" and k == 1) for k in range(4)]
        shares = {kind: result.pop("bytes") for kind, result in results.items()}
        assert_equal(whole, sharded, case)
        for name, all_bytes in shares["whole"].items():
            assert 0.4 < shares["sharded"][name] / all_bytes < 0.6, (name, shares)


@pytest.mark.parametrize("case", STEPPED)
def test_steps_are_those_of_whole_weights_to_the_last_bit(steps: Path, case: str) -> None:
    assert_same_steps(steps, case)


@pytest.mark.slow
def test_compiled_parts_take_the_same_steps(runs: Path) -> None:
    assert_same_steps(runs, "compiled")


@pytest.mark.slow
def test_runs_are_those_of_whole_weights(runs: Path) -> None:
    whole, sharded = runs / "unclipped-whole", runs / "unclipped-sharded"
    assert (whole / "model.safetensors").read_bytes() == (sharded / "model.safetensors").read_bytes()
    assert_close_runs(whole, sharded)
    assert_close_runs(runs / "clipped-whole", runs / "clipped-sharded")
    assert records(runs / "clipped-whole")[0]["grad_norm"] > 2 * CLIPPED["clip_grad"]


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process_and_either_resumes_the_other(runs: Path) -> None:
    assert_close_runs(runs / "alone", runs / "clipped-sharded")
    assert_close_runs(runs / "alone", runs / "from-one")
    assert checkpoints(runs / "from-one") == ["step-0000002", "step-0000004"]
    rewound(runs, "clipped-sharded", "to-one")
    run(runs, "to-one", resume=True, shard=True, **CLIPPED)
    assert_close_runs(runs / "alone", runs / "to-one")
    newest = runs / "to-one" / "checkpoints" / "step-0000004"
    assert not list(newest.glob("shard-*"))
    first, second = (
        state_of(path)["optimizers"][0]["state"] for path in (runs / "alone/checkpoints" / newest.name, newest)
    )
    for k, moments in first.items():
        torch.testing.assert_close(second[k]["exp_avg"], moments["exp_avg"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_sharded_run_is_the_one_without_a_break(runs: Path) -> None:
    whole, again = runs / "unclipped-sharded", runs / "again"
    assert without_clock(records(whole)) == without_clock(records(again))
    for path in sorted((whole / "checkpoints" / "step-0000004").iterdir()):
        if path.name.endswith(".safetensors"):
            assert path.read_bytes() == (again / "checkpoints" / "step-0000004" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_checkpoint_has_a_shard_of_each_rank_and_no_tensor_twice(runs: Path) -> None:
    checkpoint = runs / "unclipped-sharded" / "checkpoints" / "step-0000004"
    shards = sorted(checkpoint.glob("shard-*"))
    assert [path.name for path in shards] == [f"shard-{rank}-of-2.safetensors" for rank in range(2)]
    assert {path.name for path in shards} <= json.loads((checkpoint / "manifest.json").read_text())["files"].keys()
    first, second = map(load_file, shards)
    alone = state_of(runs / "alone" / "checkpoints" / "step-0000004")
    for name, value in alone["model"].items():
        assert torch.cat([first[f"model/{name}"], second[f"model/{name}"]]).shape == value.shape
    assert (checkpoint / "training.pt").stat().st_size < 50_000


@pytest.mark.parametrize("run_name", ["killed", "full"])
@pytest.mark.slow
def test_a_checkpoint_that_a_kill_or_a_full_disk_ends_is_not_there(runs: Path, run_name: str) -> None:
    out = runs / run_name
    left = [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()]
    if run_name == "killed":
        assert sorted(left) == [".step-0000004.shards", "step-0000002"]
        shutil.copytree(out, runs / "resumed")
        run(runs, "resumed", resume=True, **UNCLIPPED)
        assert_close_runs(runs / "unclipped-sharded", runs / "resumed")
        assert not list((runs / "resumed").rglob(".*"))
    else:
        assert left == ["step-0000004"]
        assert (out / "model.safetensors").read_bytes() == (runs / "unclipped-whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_taken(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "unclipped-sharded", runs / "damaged")
    shard = runs / "damaged" / "checkpoints" / "step-0000004" / "shard-1-of-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    run(runs, "damaged", resume=True, **UNCLIPPED)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"warning: \S*shard-1-of-2.safetensors is truncated.*step-0000004 is skipped", said)
    assert_close_runs(runs / "unclipped-sharded", runs / "damaged")


def test_one_process_has_nothing_to_shard_and_says_so(folder: Path) -> None:
    def weights_after_a_step(**changes: Any) -> dict[str, torch.Tensor]:
        trainer = Trainer(ARRecipe, config_of(folder, **changes))
        assert ("sharding" in trainer.metadata) == bool(changes)
        assert "one process" in trainer.metadata.get("sharding", "one process")
        trainer.step(0)
        return trainer.networks.model.state_dict()

    assert_equal(weights_after_a_step(shard=True), weights_after_a_step(), "weights")


def test_tokenizers_and_a_search_for_the_batch_size_have_no_shards(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("--shard")
    assert "Unrecognized options: --shard" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--find-batch-size .*--shard"):
        config_of(folder, shard=True, find_batch_size=True).check()
