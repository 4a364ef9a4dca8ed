"""Costs of a row: medians, not means; codes of all training images; the fall of the prior's loss."""

import json

import numpy as np
import pytest

from regvq_fast.data.token_cache import CacheInfo, shard_path, write_info, write_shard
from regvq_fast.paper.costs import costs
from regvq_fast.paper.stages import Pipeline, Stage


@pytest.fixture
def pipeline(tmp_path):
    """A row whose prior is done."""
    folders = {"tokenizer": tmp_path / "vq", "token cache": tmp_path / "tokens", "prior": tmp_path / "prior"}
    for folder in folders.values():
        folder.mkdir()
    (tmp_path / "vq" / "config.json").write_text(json.dumps({"optimizer": {"batch_size": 8}}))
    summary = {"peak memory (GiB)": 0.5, "parameters": 1000, "parameters of the quantizer": 200}
    (tmp_path / "vq" / "summary.json").write_text(json.dumps(summary))
    speeds = (1.0, 16.0, 16.0, 16.0, 2.0)  # the first steps, and some while the machine did other work
    write_records(tmp_path / "vq", [{"split": "train", "images_per_second": speed} for speed in speeds])
    losses = {100: 8.0, 200: 6.0, 300: 4.0, 400: 3.0}
    write_records(tmp_path / "prior", [{"split": "val", "step": step, "loss": loss} for step, loss in losses.items()])
    (tmp_path / "prior" / "summary.json").touch()
    info = CacheInfo("vq", "0", 16, (1, 2), 32, "fp32", None, 0, "center", False, 1, 3, 1, (), 2)
    write_info(tmp_path / "tokens", info)
    for number, tokens in enumerate([[[[1, 2]], [[2, 2]]], [[[7, 1]]]]):
        write_shard(shard_path(tmp_path / "tokens", "train", number), np.array(tokens, np.uint16), None, None)
    return Pipeline(
        tmp_path,
        tuple(Stage(name, "", (), folder, folder / "summary.json", True) for name, folder in folders.items()),
    )


def write_records(run, records):
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def values(pipeline, codes=16):
    return {key: metric["value"] for key, metric in costs(pipeline, codes).items()}


def test_costs_by_hand(pipeline):
    found = values(pipeline)
    assert (found["seconds"], found["memory"], found["bits"]) == (0.5, 0.5, 4.0)
    assert (found["parameters"], found["quantizer_parameters"]) == (1000, 200)
    assert found["train_utilization"] == 3 / 16
    assert (found["prior_loss"], found["prior_fall"]) == (3.0, 0.25)
    assert values(pipeline, codes=240)["bits"] == pytest.approx(7.9069, abs=1e-4)


def test_without_a_prior_there_are_those_of_the_tokenizer(pipeline):
    (pipeline.folder / "prior" / "summary.json").unlink()
    assert values(pipeline).keys() == {"seconds", "memory", "bits", "parameters", "quantizer_parameters"}


def test_the_fall_needs_an_evaluation_before_the_last_quarter(pipeline):
    write_records(pipeline.folder / "prior", [{"split": "val", "step": 400, "loss": 3.0}])
    assert np.isnan(values(pipeline)["prior_fall"])
