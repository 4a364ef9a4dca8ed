"""Costs of a row: bits, parameters, time and memory of a step, and the loss of its prior."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from regvq_fast.data.token_cache import open_shard, read_info
from regvq_fast.paper.stages import Pipeline

NAMES = {
    "train_utilization": "codes used, training images",
    "prior_loss": "prior, nats a token",
    "prior_fall": "fall of that in the last quarter",
    "seconds": "seconds a step",
    "memory": "peak memory, GiB",
    "bits": "bits a token",
    "parameters": "parameters",
    "quantizer_parameters": "parameters of the quantizer",
}
"""Titles of the columns, by key."""

FRACTIONS = frozenset({"train_utilization", "prior_fall"})
COUNTS = frozenset({"parameters", "quantizer_parameters"})
EQUAL = frozenset({"bits", *COUNTS})
"""Costs that do not depend on the seed."""


def costs(pipeline: Pipeline, codes: int) -> dict[str, dict[str, Any]]:
    """Return the costs of a row by their keys in `NAMES`; without a prior, only those of the tokenizer.

    Args:
        pipeline: of the row, with a trained tokenizer.
        codes: N of the tokenizer: a lattice may have fewer codes than --num-codes.
    """
    stages = pipeline.by_name()
    run = stages["tokenizer"].folder
    summary, batch = _read(run / "summary.json"), _read(run / "config.json")["optimizer"]["batch_size"]
    # A median, so that other load on the machine and the first steps don't count.
    speed = statistics.median(record["images_per_second"] for record in _records(run, "train"))
    found: dict[str, float] = {
        "seconds": batch / speed,
        "memory": summary["peak memory (GiB)"],
        "bits": math.log2(codes),
        "parameters": summary["parameters"],
        "quantizer_parameters": summary["parameters of the quantizer"],
    }
    if "prior" in stages and stages["prior"].result.exists():
        found["train_utilization"] = _used(stages["token cache"].folder) / codes
        curve = {record["step"]: record["loss"] for record in _records(stages["prior"].folder, "val")}
        last = max(curve)
        before = curve[max(step for step in curve if step <= 0.75 * last)] if min(curve) <= 0.75 * last else math.nan
        found |= {"prior_loss": curve[last], "prior_fall": 1 - curve[last] / before}
    return {key: {"name": NAMES[key], "value": found[key]} for key in NAMES if key in found}


def _used(cache: Path) -> int:
    """Return the number of different codes of the training images in a token cache."""
    info = read_info(cache)
    shards = (open_shard(cache, info, "train", number).tokens for number in range(info.num_shards("train")))
    return len(np.unique(np.concatenate([np.unique(tokens) for tokens in shards])))


def _records(run: Path, split: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in lines if record["split"] == split]


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())
