"""Hugging Face data sets: saved ones and parquet files, their splits, identity and errors, and runs on them."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flat_images import encode_flat, level_of, levels_of, write_flat
from helpers.runs import FAST, assert_same_run, resume, run_script, train
from torch.utils.data import DataLoader

from regvq_fast.data import HuggingFaceImages, ImageFolder, ImageShards, write_shards
from regvq_fast.data.datasets import build_dataset, dataset_class
from regvq_fast.data.huggingface.table import row_hashes
from regvq_fast.data.loading import collate
from regvq_fast.evaluation.fid import describe_data

datasets = pytest.importorskip("datasets")
from helpers.hugging_face import ANIMALS, IMAGE, TEXT, saved, source, table  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


# -------------------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("form", ["saved dictionary", "saved", "parquet", "one parquet file"])
def test_every_form_serves_the_images_of_a_folder(tmp_path: Path, form: str) -> None:
    for k in range(30):
        write_flat(tmp_path / "folder" / "train" / f"{k:02d}.png", 5 * k)
        write_flat(tmp_path / "folder" / "val" / f"{k:02d}.png", 5 * k + 1)
    path, training, validation = tmp_path / "data", table(range(0, 150, 5)), table(range(1, 151, 5))
    if form == "saved dictionary":
        saved(path, train=training, validation=validation)
    elif form == "saved":
        training.save_to_disk(path)
    else:
        path = path / "train-0.parquet" if form == "one parquet file" else path
        training.to_parquet(tmp_path / "data" / "train-0.parquet")
        if form == "parquet":
            validation.to_parquet(path / "validation-0.parquet")
    options: Any = {"image_size": 8, "seed": 3}
    if form in ("saved", "one parquet file"):
        rows = [levels_of(build_dataset(path, split=split, **options)) for split in ("train", "val")]
        assert sorted(rows[0] + rows[1]) == list(range(0, 150, 5))
        assert rows[1]
        return
    for split in ("train", "val"):
        ours, theirs = (build_dataset(root, split=split, **options) for root in (path, tmp_path / "folder"))
        assert isinstance(ours, HuggingFaceImages)
        assert isinstance(theirs, ImageFolder)
        assert len(ours) == 30
        assert all(torch.equal(ours[k]["image"], theirs[k]["image"]) for k in range(30))


def test_orientation_and_crops_are_those_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        (tmp_path / "folder" / split).mkdir(parents=True)
        image.save(tmp_path / "folder" / split / "0.jpg", exif=exif, quality=100)
    value = {"bytes": (tmp_path / "folder" / "train" / "0.jpg").read_bytes(), "path": None}
    one = datasets.Dataset.from_dict({"image": [value]}, datasets.Features(image=IMAGE))
    path = saved(tmp_path / "data", train=one, validation=one)
    for split in ("train", "val"):
        ours, theirs = (build_dataset(root, split=split, image_size=16) for root in (path, tmp_path / "folder"))
        assert all(torch.equal(ours[k]["image"], theirs[k]["image"]) for k in range(1 if split == "val" else 5))


def test_parquet_beside_images_or_shards_leaves_them_what_they_are(tmp_path: Path) -> None:
    """As img2dataset writes both."""
    write_flat(tmp_path / "files" / "00000" / "0.png")
    write_shards([{"__key__": "0", "png": encode_flat(0)}], f"{tmp_path}/shards/%d.tar")
    for folder in ("files", "shards"):
        table([0]).to_parquet(tmp_path / folder / "00000.parquet")
    assert dataset_class(tmp_path / "files") is ImageFolder
    assert dataset_class(tmp_path / "shards") is ImageShards


def test_images_by_path_and_as_plain_bytes(tmp_path: Path) -> None:
    for k in range(4):
        write_flat(tmp_path / f"{k}.png", 10 * k)
    paths = [{"bytes": None, "path": str(tmp_path / f"{k}.png")} for k in range(4)]
    by_path = datasets.Dataset.from_dict({"photo": paths}, datasets.Features(photo=IMAGE))
    plain = datasets.Dataset.from_dict({"jpg": [encode_flat(10 * k) for k in range(4)]})
    for name, one in (("a", by_path), ("b", plain)):
        path = saved(tmp_path / name, train=one, test=one)
        assert levels_of(HuggingFaceImages(path, "val", 8)) == [0, 10, 20, 30]


def test_a_saved_format_does_not_matter(tmp_path: Path) -> None:
    one = table([3, 9], text=(TEXT, ["a", "b"]))
    path = saved(tmp_path, train=one.with_format("numpy"), test=one.with_format("numpy"))
    val = HuggingFaceImages(path, "val", 8, fields=["caption"])
    assert [(level_of(sample), sample["caption"]) for sample in (val[0], val[1])] == [(3, "a"), (9, "b")]


def test_workers_get_file_names_instead_of_images(tmp_path: Path) -> None:
    noise = [{"bytes": np.random.default_rng(k).bytes(10_000), "path": None} for k in range(20)]
    noise[0] = {"bytes": encode_flat(7), "path": None}
    one = datasets.Dataset.from_dict({"image": noise}, datasets.Features(image=IMAGE))
    dataset = HuggingFaceImages(saved(tmp_path, train=one, test=one.select([0])), "train", 8)
    assert len(pickle.dumps(dataset._tables)) < 10_000
    val = HuggingFaceImages(tmp_path, "val", 8)
    loader = DataLoader(val, batch_size=1, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    assert [level_of(batch) for batch in loader] == [7]


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "test"])
def test_own_splits(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, train=table([1, 2]), **{name: table([5, 6, 7])}, unsupervised=table([9]))
    assert sorted(levels_of(HuggingFaceImages(path, "train", 8))) == [1, 2]
    assert levels_of(HuggingFaceImages(path, "val", 8)) == [5, 6, 7]
    assert levels_of(HuggingFaceImages(path, "val", 8, limit=2)) == [5, 6]


def test_stated_splits(tmp_path: Path) -> None:
    path = saved(tmp_path, big=table([1, 2]), small=table([5]), test=table([9]))
    names = source(path, train="big", val="small")
    assert sorted(levels_of(HuggingFaceImages(names, "train", 8))) == [1, 2]
    assert levels_of(HuggingFaceImages(names, "val", 8)) == [5]
    assert levels_of(HuggingFaceImages(source(path, train="big"), "val", 8)) == [9]
    with pytest.raises(ValueError, match=r"no split 'huge'.*'big', 'small', 'test'"):
        HuggingFaceImages(source(path, train="huge"))
    with pytest.raises(ValueError, match=r"no split 'train'.*'big', 'small', 'test'.*\?train="):
        HuggingFaceImages(path)


def test_added_rows_move_none_to_the_other_split(tmp_path: Path) -> None:
    few, many = saved(tmp_path / "a", train=table(range(100))), saved(tmp_path / "b", train=table(range(150)))
    held_out = [set(levels_of(HuggingFaceImages(path, "val", 8))) for path in (few, many)]
    assert held_out[0] <= held_out[1]
    training = levels_of(HuggingFaceImages(few, "train", 8))
    assert sorted([*training, *held_out[0]]) == list(range(100))


def test_row_hashes_hold_out_five_percent_of_any_stretch() -> None:
    low = row_hashes(np.arange(200_000)) < 0.05 * 2**32
    assert all(400 < count < 600 for count in low.reshape(20, 10_000).sum(1))
    assert all(400 < low[k::20].sum() < 600 for k in range(20))  # nor does it go with a class that comes every 20 rows


# -------------------------------------------------------------------------------------------- damage, identity and runs


def test_unreadable_rows_are_skipped_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"bytes": data, "path": None} for data in (encode_flat(0), b"", b"no image", encode_flat(30))] + [None]
    one = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=IMAGE))
    val = HuggingFaceImages(saved(tmp_path, train=one, test=one), "val", 8)
    with caplog.at_level(logging.WARNING, logger="regvq_fast"):
        assert levels_of(val) == levels_of(val) == [0, 30, 30, 30, 0]
    assert val.unreadable == 3
    assert len(caplog.messages) == 3
    assert f"row 2 of {tmp_path} (test)" in caplog.text


def test_the_fingerprint_is_of_the_data_not_of_the_file_times(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", train=table([0, 1]), test=table([5, 6]))
    found = [describe_data(HuggingFaceImages(path, "val", 8))["fingerprint"]]
    for file in path.rglob("*.arrow"):
        file.touch()
    found.append(describe_data(HuggingFaceImages(source(path, val="test"), "val", 8))["fingerprint"])
    assert found[0] == found[1]
    other = saved(tmp_path / "b", train=table([0, 1]), test=table([5, 7, 6]))
    assert describe_data(HuggingFaceImages(other, "val", 8))["fingerprint"] != found[0]


def test_a_tokenizer_trains_on_it_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 40, 40, 3), dtype=np.uint8)
    one = datasets.Dataset.from_dict({"img": list(noise)}, datasets.Features(img=IMAGE))
    saved(tmp_path / "data", train=one, test=one.select(range(6)))
    data = ["--data", source(tmp_path / "data", image="img"), "--checkpoint-every", 2]
    train(*FAST, *data, "--out", tmp_path / "whole")
    assert "12 training images, 6 validation images" in " ".join(capsys.readouterr().out.split())
    train(*FAST, *data, "--steps", 2, "--out", tmp_path / "halves")
    resume(tmp_path / "halves", "--steps", 4)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_prior_trains_on_its_labels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    features = datasets.Features(image=IMAGE, kind=ANIMALS)
    one = datasets.Dataset.from_dict({"image": list(noise), "kind": [0, 1, 2] * 2}, features)
    data = saved(tmp_path / "data", train=one, test=one)
    train(*FAST, "--data", data, "--steps", 1, "--out", tmp_path / "tokenizer")
    small = "--steps 1 --batch-size 2 --val-images 6 --width 16 --depth 1 --heads 2 --device cpu --on-the-fly".split()
    flags = ["--tokenizer", tmp_path / "tokenizer", "--data", data, "--out", tmp_path / "prior"]
    run_script(*small, *flags, script="ar.py")
    assert '"condition": "label"' in (tmp_path / "prior" / "config.json").read_text()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("hf:{}?picture=x", ValueError, "unknown key 'picture'.*image"),
        ("hf:{}?image=", ValueError, "no value for image"),
        ("hf:{}?length=0", ValueError, "length must be .*'0'"),
        ("hf:somewhere/on/the/disk", FileNotFoundError, "no such folder.*hf:ORGANIZATION/NAME"),
        ("hf:{}?stream", ValueError, "leave out stream"),
        ("hf:nobody/nothing", OSError, "nobody/nothing .*HF_HUB_OFFLINE.*network"),
    ],
)
def test_names_that_mean_nothing(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    saved(tmp_path / "data", train=table([1, 2]))
    with pytest.raises(error, match=message):
        build_dataset(text.format(tmp_path / "data"), split="train", image_size=8)


def test_configurations_have_to_be_chosen(tmp_path: Path) -> None:
    configs = ""
    for k, name in enumerate(("small", "large")):
        table([k, k + 10]).to_parquet(tmp_path / name / "train-0.parquet")
        table([k + 20]).to_parquet(tmp_path / name / "test-0.parquet")
        configs += f"- config_name: {name}\n  data_dir: {name}\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for options in ({}, {"config": "huge"}):
        with pytest.raises(ValueError, match=r"configurations small, large.*\?config="):
            HuggingFaceImages(source(tmp_path, **options))
    assert levels_of(HuggingFaceImages(source(tmp_path, config="large"), "val", 8)) == [21]


def test_damaged_files_are_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=f"{tmp_path} can't be read.*") as caught:
        HuggingFaceImages(tmp_path)
    assert "\n" not in str(caught.value)
    table([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet can't be read.*no data"):
        HuggingFaceImages(tmp_path / "none.parquet")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"install datasets: pip install .*\[hf\]"):
        build_dataset("hf:somebody/something", split="train", image_size=8)
