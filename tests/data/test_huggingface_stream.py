"""Hugging Face data sets that are streamed: what a stream still promises, and what it says that it doesn't."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flat_images import encode_flat, level_of, levels_of
from helpers.runs import FAST, resume, train
from torch.utils.data import DataLoader

from regvq_fast.data import HuggingFaceImages, HuggingFaceStream
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import collate, read_samples, training_batches

datasets = pytest.importorskip("datasets")
from helpers.hugging_face import ANIMALS, IMAGE, TEXT, source, table  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


def published(path: Path, shards: int = 4, each: int = 10, **columns: Any) -> str:
    """Write parquet files of `shards` x `each` training images, numbered by their levels, and three of validation."""
    for k in range(shards):
        table(range(k * each, (k + 1) * each), **columns).to_parquet(path / f"train-{k:05d}.parquet")
    table([200, 210, 220], **{name: (kind, values[:3]) for name, (kind, values) in columns.items()}).to_parquet(
        path / "validation-00000.parquet"
    )
    return source(path, stream="", length=str(shards * each))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_each_pass_has_every_image_once_whatever_the_workers(tmp_path: Path, workers: int) -> None:
    """Two workers have two files each; of three, for which four files are enough, one has two."""
    stream = build_dataset(published(tmp_path), split="train", image_size=8, crop="center")
    assert isinstance(stream, HuggingFaceStream)
    assert len(stream) == 40
    batches = training_batches(stream, 2, workers=workers)
    levels = [level_of({"image": image}) for _ in range(40) for image in next(batches)["image"]]
    counts = Counter(levels)
    assert counts.keys() == set(range(40))
    if workers < 3:
        assert set(counts.values()) == {2}
    assert levels[:40] != sorted(levels[:40])
    assert levels[:40] != levels[40:]


def test_more_processes_than_files_divide_the_rows(tmp_path: Path) -> None:
    stream = build_dataset(published(tmp_path, shards=1, each=12), split="train", image_size=8)
    batches = training_batches(stream, 2, workers=3)
    assert Counter(level_of({"image": image}) for _ in range(6) for image in next(batches)["image"]) == Counter(
        range(12)
    )


def test_ranks_have_different_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = published(tmp_path)
    levels = []
    for rank in range(2):
        monkeypatch.setattr("regvq_fast.data.huggingface.stream.rank", lambda rank=rank: rank)
        monkeypatch.setattr("regvq_fast.data.huggingface.stream.world_size", lambda: 2)
        stream = build_dataset(data, split="train", image_size=8)
        levels.append([level_of(stream[k]) for k in range(20)])
    assert sorted(levels[0] + levels[1]) == list(range(40))


def test_validation_is_exact_and_that_of_the_data_set_read_as_a_whole(tmp_path: Path) -> None:
    data = published(tmp_path)
    streamed, read = (build_dataset(name, split="val", image_size=8) for name in (data, source(tmp_path)))
    assert isinstance(read, HuggingFaceImages)
    assert levels_of(streamed) == levels_of(streamed) == levels_of(read) == [200, 210, 220]
    loader = DataLoader(streamed, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))["image"], torch.stack([read[k]["image"] for k in range(3)]))
    assert levels_of(build_dataset(data, split="val", image_size=8, length=2)) == [200, 210]
    with pytest.raises(IndexError):
        streamed[3]


@pytest.mark.parametrize("split", ["train", "val"])
def test_damage_in_the_middle_of_a_file_names_the_data_set(tmp_path: Path, split: str) -> None:
    data = published(tmp_path, shards=1)
    path = tmp_path / ("train-00000.parquet" if split == "train" else "validation-00000.parquet")
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)  # the footer, which is read first, is whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}.*can't be read"):
        build_dataset(data, split=split, image_size=8)[0]


def test_held_out_images_are_never_trained_on(tmp_path: Path) -> None:
    table(range(200)).to_parquet(tmp_path / "train-0.parquet")
    data = source(tmp_path, stream="", length="200")
    held_out = set(levels_of(build_dataset(data, split="val", image_size=8)))
    assert 1 <= len(held_out) <= 30
    stream = build_dataset(data, split="train", image_size=8)
    assert len(stream) == 190
    assert {level_of(stream[k]) for k in range(250)} == set(range(200)) - held_out


def test_fields_come_with_their_images(tmp_path: Path) -> None:
    columns = {
        "label": (ANIMALS, [0, 1, 2, -1, None] * 2),
        "caption": (TEXT, ["a", "b", "", "d", "e"] * 2),
    }
    data = published(tmp_path, shards=1, **columns)
    stream = build_dataset(data, split="train", image_size=8, fields=["label", "caption"])
    assert stream.label_names == ("cat", "dog", "owl")
    found = {(level_of(sample), sample["label"], sample["caption"]) for sample in (stream[k] for k in range(8))}
    assert found == {(0, 0, "a"), (1, 1, "b"), (5, 0, "a"), (6, 1, "b")}
    counts = HuggingFaceStream.count_fields(data)
    assert (counts.images, counts.having) == (10, {"caption": 10, "label": 10, "segmentation": 0})
    with pytest.raises(ValueError, match=r"'caption' .* has no class labels \(or, unless streamed"):
        build_dataset(data + "&label=caption", split="val", image_size=8, fields=["label"])


def test_a_label_beyond_the_names_is_refused(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    data = published(tmp_path, shards=1, label=(ANIMALS, [0, 1, 2, 0, 1] * 2))
    for path in tmp_path.glob("*.parquet"):
        rows = parquet.read_table(path)
        described = rows.schema.metadata[b"huggingface"].replace(b', "owl"', b"")
        parquet.write_table(rows.replace_schema_metadata({b"huggingface": described}), path)
    with pytest.raises(ValueError, match=r"has a label 2 and only 2 names"):
        build_dataset(data, split="val", image_size=8, fields=["label"])
    stream = build_dataset(data, split="train", image_size=8, fields=["label"], seed=1)
    with pytest.raises(ValueError, match=r"has a label 2 and only 2 names"):
        read_samples(stream, range(10))


def test_unreadable_images_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"bytes": data, "path": "x.png"} for data in (b"", encode_flat(7), b"no image")]
    one = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=IMAGE))
    one.to_parquet(tmp_path / "train-0.parquet")
    table([1]).to_parquet(tmp_path / "test-0.parquet")
    stream = build_dataset(source(tmp_path, stream="", length="3"), split="train", image_size=8)
    with caplog.at_level(logging.WARNING, logger="regvq_fast"):
        assert [level_of(stream[k]) for k in range(3)] == [7, 7, 7]
    assert "skipped unreadable image x.png" in caplog.text


def test_maps_come_with_their_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    maps = [{"bytes": encode_flat(255, mode="L"), "path": None}] * 10
    data = published(tmp_path, shards=1, mask=(IMAGE, maps))
    stream = build_dataset(data, split="train", image_size=8, fields=["segmentation"])
    assert {int(stream[k]["segmentation"].max()) for k in range(10)} == {255}
    assert sum("255" in message for message in caplog.messages) == 1


def test_it_says_once_what_a_stream_gives_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = published(tmp_path)
    for split in ("train", "val", "train"):
        build_dataset(data, split=split, image_size=8)
    (message,) = caplog.messages
    assert all(word in message for word in ("streamed", "--workers", "epoch", "resumed"))


def test_a_length_has_to_be_known(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(ValueError, match=r"number of images.*&length=N"):
        build_dataset(source(tmp_path, stream=""), split="train", image_size=8)


def test_a_tokenizer_trains_on_a_stream_and_resumes(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    train(*FAST, "--data", data, "--steps", 2, "--out", tmp_path / "run", "--workers", 1)
    resume(tmp_path / "run", "--steps", 3)
    assert (tmp_path / "run" / "summary.json").is_file()
