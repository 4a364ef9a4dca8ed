"""A new data set is a class and its line in DATASETS: a tokenizer and a prior train on it."""

import json
import os
from pathlib import Path
from typing import Self

import pytest
import torch
from helpers.runs import FAST, records, run_script, train

from regvq_fast.data.datasets import DATASETS
from regvq_fast.data.image_dataset import FieldCounts, ImageDataset, SplitSettings, TrainedPrior
from regvq_fast.data.loading import collate
from regvq_fast.data.samples import Sample, check_index, sample_random


class Stripes(ImageDataset):
    """Dark and bright rows, as many as an image has, from a random row on: what `--data stripes` names."""

    title = "stripes"
    num_classes = 2
    class_names = ("dark", "bright")

    def __init__(self, settings: SplitSettings) -> None:
        self.settings = settings

    @classmethod
    def recognizes(cls, data: str | os.PathLike[str] | None) -> bool:
        return data == Path("stripes")

    @classmethod
    def open(cls, data: str | os.PathLike[str] | None, settings: SplitSettings) -> Self:
        return cls(settings)

    @classmethod
    def count_fields(cls, data: str | os.PathLike[str] | None) -> FieldCounts:
        return FieldCounts(20, {"segmentation": 20})

    @classmethod
    def evaluate_samples(cls, prior: TrainedPrior) -> dict[str, float]:
        dataset = cls(SplitSettings("val", prior.image_size, prior.val_images, prior.seed))
        batch = collate([dataset[k] for k in range(4)])
        with prior.stage("sampling") as progress:
            samples = prior.sample(batch, progress)
        assert samples.shape == prior.reconstruct(batch["image"]).shape == batch["image"].shape
        assert prior.condition == "segmentation"
        return {"brightness of samples": float(samples.float().mean())}

    def __len__(self) -> int:
        return self.settings.length or 20

    def __getitem__(self, index: int) -> Sample:
        split, size = self.settings.split, self.settings.image_size
        check_index(index, len(self), split)
        first = sample_random(f"stripes-{split}", self.settings.seed, index).randrange(size)
        rows = ((torch.arange(size) + first) // (size // 4) % 2).to(torch.uint8)
        segmentation = rows[:, None].expand(size, size).contiguous()
        return Sample(image=(segmentation * 200 + 20).expand(3, size, size).contiguous(), segmentation=segmentation)


def test_a_class_and_a_line_make_a_data_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, prior = tmp_path / "tokenizer", tmp_path / "prior"
    flags = [*FAST, "--data", "stripes", "--steps", 1, "--batch-size", 2]
    with pytest.raises(SystemExit, match="stripes"):
        train(*flags, "--out", tmp_path / "unknown")
    monkeypatch.setattr("regvq_fast.data.datasets.DATASETS", [Stripes, *DATASETS])
    train(*flags, "--out", tokenizer)
    assert "stripes: 20 training images, 6 validation images of 32 px" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in records(tokenizer)] == [1, 1]

    small = "--steps 1 --batch-size 2 --val-images 6 --width 16 --depth 1 --heads 2 --device cpu".split()
    source = ["--on-the-fly", "--tokenizer", tokenizer, "--data", "stripes"]
    run_script(*small, *source, "--out", prior, script="ar.py")
    summary = json.loads((prior / "summary.json").read_text())
    assert 0 <= summary["brightness of samples"] <= 255
    assert not [name for name in summary if name.startswith("agreement")], "the scenes' evaluation"
