"""Checkpoints of a run: written atomically, verified when read; the newest and the best are kept.

    runs/NAME/checkpoints/step-0000400/
        config.json         the run's configuration and the model's architecture
        model.safetensors   the weights to evaluate: averaged ones if there are any
        training.pt         everything else the next step depends on: tensors and plain values, read with weights_only
        shard-0-of-2.safetensors    in a sharded run, one for each rank: its rows of the tensors in training.pt
        manifest.json       size and SHA-256 of each file
    runs/NAME/checkpoints/best.json     the checkpoint with the best evaluation

`VQGAN.from_pretrained` reads such a folder without this module.
"""

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regvq_fast.config import Config, TrainConfig, config_from_dict, read_config
from regvq_fast.files import atomic_path
from regvq_fast.json_values import parse_json
from regvq_fast.models.pretrained import (
    CHECKPOINTS,
    CONFIG,
    WEIGHTS,
    Entry,
    check_files,
    read_folder,
    read_manifest,
    step_folders,
    to_json,
    weights_from_file,
    weights_to_bytes,
    write_file,
    write_folder,
)
from regvq_fast.ranks import all_gather_strings, raise_on_all_ranks, rank, world_size
from regvq_fast.settings import flag_of
from regvq_fast.training.sharding import joined, split

TRAINING, BEST = "training.pt", "best.json"

# Fields that a resumed run may change, since they don't change a training step. Two exceptions are checked elsewhere:
# steps and epochs with a schedule (Checkpoint.check), and the contents of files (Networks.identity).
_FREE = (
    "out resume device compile workers data cache tokenizer val_images perceptual_weights contrastive_weights steps "
    "epochs log log_every image_every eval_every checkpoint_every keep_checkpoints max_skipped collapse_threshold "
    "activation_checkpointing deterministic trace_steps find_batch_size shard"
).split()
# Fields that it may change with a warning: remedies for non-finite values and for too little memory.
_REMEDIES = ("amp", "lr", "disc_lr", "clip_grad", "accumulate")

# The best checkpoint is chosen by the first of these metrics that an evaluation has.
_LOWER_IS_BETTER = {"perceptual": True, "psnr": False, "loss": True}


@dataclass
class Checkpoint:
    """The state from which a run continues."""

    step: int
    """Steps done."""
    folder: Path | None = None
    """The checkpoint; None if there is none yet, and the run starts from its beginning."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    """Length of the run in steps; None if unknown."""
    notes: list[str] = field(default_factory=list)
    """Warnings: skipped checkpoints, changed settings, changed data."""

    def check(self, identity: Mapping[str, str], fingerprint: str, steps: int, scheduled: Collection[str] = ()) -> None:
        """Compare with the run that continues, in what the configuration does not record.

        Args:
            identity: of the run, see `Networks.identity`.
            fingerprint: of the first training samples; a different one adds a note.
            steps: of the whole run.
            scheduled: quantities with a schedule over all ``steps``; a different length then adds a note.

        Raises:
            ValueError: other data, other losses, or more steps done than the run has.
        """
        if self.step > steps:
            raise ValueError(
                f"{self.folder} already has {self.step} steps, but the run ends after {steps}: give more --steps or "
                "--epochs, or neither"
            )
        for name, value in identity.items():
            saved = self.state["identity"].get(name)
            if value != saved:
                raise ValueError(
                    f"this run has {value} {name}, the checkpoint {self.folder} has {saved}: resume with the same"
                )
        if scheduled and self.steps not in (None, steps):
            self.notes.append(
                f"--steps is {steps} from here on; it was {self.steps}: the schedule of {' and '.join(scheduled)} "
                f"spans {steps} steps now"
            )
        if fingerprint != self.state["fingerprint"]:
            self.notes.append(
                "the first training images differ from those of the checkpoint, though their number is the same: "
                "another folder, or another version of Pillow?"
            )

    def release(self) -> None:
        """Release the tensors."""
        self.weights.clear()
        for name in ("model", "others", "optimizers"):
            del self.state[name]


def find_checkpoint(config: TrainConfig) -> Checkpoint:
    """Return the newest complete checkpoint of the run in ``--out``. Each rank reads it; nothing is written.

    Raises:
        ValueError: there is no run, none of its checkpoints can be read, or the configuration is of another run.
    """
    run = config.run.out
    if run is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    started_with = read_config(run, type(config))
    notes: list[str] = []
    for step, folder in reversed(step_folders(run).items()):
        try:
            checkpoint, started_with = _read(step, folder, type(config))
        except (ValueError, OSError) as error:
            notes.append(f"{error}; checkpoint {folder.name} is skipped")
            continue
        checkpoint.notes = notes + _compare(config, started_with, folder)
        return checkpoint
    if notes:
        raise ValueError(f"none of the checkpoints in {run / CHECKPOINTS} can be read: {notes[0].split('; ')[0]}")
    changes = _compare(config, started_with, run)
    return Checkpoint(0, notes=[*changes, f"there is no checkpoint in {run} yet: the run starts from its beginning"])


def _read(step: int, folder: Path, kind: type[Config]) -> tuple[Checkpoint, Config]:
    contents = read_folder(folder, (CONFIG, TRAINING))
    try:
        config = config_from_dict(parse_json(contents[CONFIG]), kind)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run: {error}") from None
    state = training_state(contents[TRAINING], folder / TRAINING)
    if state.get("step") != step:
        raise ValueError(f"{folder / TRAINING} is not the state of training after step {step}")
    # Only checked here, and memory-mapped below: every rank reads them, and memory may not hold several copies.
    large = [WEIGHTS, *sorted((name for name in read_manifest(folder) if name.startswith("shard-")), key=_shard_rank)]
    check_files(folder, large)
    weights, *shards = (weights_from_file(folder / name) for name in large)
    try:
        state = joined(state, shards)
    except ValueError as error:
        raise ValueError(f"{folder} is not complete: {error}") from None
    return Checkpoint(step, folder, weights, state, config.optimizer.steps), config


def _shard_rank(name: str) -> int:
    return int(name.split("-")[1])


def training_state(content: bytes, path: Path) -> dict[str, Any]:
    """Return the training state in the contents of ``path``; ValueError if they are something else, or damaged."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything, in many lines
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a training state or is damaged ({reason})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a training state")
    return state


def _compare(config: TrainConfig, saved: TrainConfig, source: Path) -> list[str]:
    """Return notes on changed settings; ValueError for the first one that must not change."""
    notes = []
    for section in dataclasses.fields(config):
        now, then = getattr(config, section.name), getattr(saved, section.name)
        for name in (item.name for item in dataclasses.fields(now)):
            value, old = getattr(now, name), getattr(then, name)
            if value == old or name in _FREE:
                continue
            flag = flag_of(type(now), name)
            if name not in _REMEDIES:
                raise ValueError(
                    f"{flag} is {value} here but {old} in {source}: resume with the same, or start a new run in "
                    "another --out"
                )
            notes.append(f"{flag} is {value} from here on; it was {old}")
    return notes


class Checkpoints:
    """Writes a run's checkpoints, and keeps the ``keep`` newest and the best.

    Rank 0 writes; the others keep track, and write their shards.

    Args:
        run: the run's folder.
        keep: at least 1.
        start: where the run begins. Checkpoints of later steps, which could not be read, are renamed; what a kill left
            of a checkpoint is removed.
    """

    def __init__(self, run: Path, keep: int, start: Checkpoint | None = None) -> None:
        self.run, self.keep, self.writes = run, keep, rank() == 0
        self.newest = start.folder if start else None
        """The newest complete checkpoint; None if there is none yet."""
        begin = start.step if start else 0
        self._best = self._read_best(begin)
        if self.writes:
            for leftover in (run / CHECKPOINTS).glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for step, path in step_folders(run).items():
                if step > begin:
                    aside = path.with_name(f"damaged-{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)

    @property
    def newest_name(self) -> str:
        """Name of the newest checkpoint, for messages."""
        return "the beginning" if self.newest is None else self.newest.name

    def has(self, step: int) -> bool:
        """Return whether the newest checkpoint is of this step."""
        return self.newest == self._path(step)

    def save(self, step: int, config: Mapping[str, Any], weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, then remove old ones.

        Args:
            step: steps done.
            config: the run's configuration, and the model's "architecture".
            weights: the ones to evaluate.
            state: everything else: tensors, which may be sharded, and plain values, in dicts, lists and tuples.

        Raises:
            OSError: it could not be written. Nothing is left of it, and the others are untouched. On every rank.
        """
        path = self._path(step)
        state, rows = split(state)
        shards = path.with_name(f".{path.name}.shards")  # until rank 0 moves them into the checkpoint
        try:
            written = self._write_shard(shards, rows) if rows else {}
            with raise_on_all_ranks():
                if self.writes:
                    buffer = io.BytesIO()
                    torch.save({**state, "step": step}, buffer)
                    files: dict[str, bytes | memoryview] = {TRAINING: buffer.getbuffer()}
                    files |= {CONFIG: to_json(config), WEIGHTS: weights_to_bytes(weights)}
                    write_folder(path, files, written)
        finally:
            if self.writes and rows:
                shutil.rmtree(shards, ignore_errors=True)
        self.newest = path
        self._remove_old()

    def _write_shard(self, folder: Path, rows: Mapping[str, Tensor]) -> dict[Path, Entry]:
        """Write this rank's rows into a folder; return the files of all ranks, with their entries in a manifest."""
        entry: Entry = {}
        with raise_on_all_ranks():
            name = f"shard-{rank()}-of-{world_size()}.safetensors"
            entry = write_file(folder / name, weights_to_bytes(rows))
        return {
            folder / f"shard-{k}-of-{world_size()}.safetensors": json.loads(text)
            for k, text in enumerate(all_gather_strings(json.dumps(entry)))
        }

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Return whether an evaluation is the best so far: by perceptual distance, else PSNR, else loss."""
        name = next(name for name in _LOWER_IS_BETTER if name in metrics)
        if not math.isfinite(metrics[name]):
            return False
        if self._best.get("metric") != name:
            return True
        gain = metrics[name] - self._best["value"]
        return gain < 0 if _LOWER_IS_BETTER[name] else gain > 0

    def mark_best(self, metrics: Mapping[str, float]) -> None:
        """Keep the newest checkpoint as the best one, until another is better."""
        if self.newest is None:
            return
        name = next(name for name in _LOWER_IS_BETTER if name in metrics)
        self._best = {"checkpoint": self.newest.name, "metric": name, "value": metrics[name]}
        if self.writes:
            with atomic_path(self.run / CHECKPOINTS / BEST) as temporary:
                temporary.write_bytes(to_json(self._best))
            self._remove_old()

    def _path(self, step: int) -> Path:
        return self.run / CHECKPOINTS / f"step-{step:07d}"

    def _read_best(self, begin: int) -> dict[str, Any]:
        """Return the record of the best checkpoint up to the step that the run begins at."""
        try:
            best = parse_json((self.run / CHECKPOINTS / BEST).read_bytes())
            known = {path.name for step, path in step_folders(self.run).items() if step <= begin}
            return {**best, "value": float(best["value"])} if best["checkpoint"] in known else {}
        except (OSError, ValueError, KeyError, TypeError):  # harmless: it only keeps the best from being removed
            return {}

    def _remove_old(self) -> None:
        if not self.writes:
            return
        folders = list(step_folders(self.run).values())
        for path in folders[: -self.keep]:
            if path.name != self._best.get("checkpoint"):
                hidden = path.with_name(f".{path.name}")  # so that a kill leaves no half-removed checkpoint
                with suppress(OSError):
                    path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)
