"""Token caches as data sets: samples, order, labels, and damage that is named."""

import dataclasses
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from regvq_fast.data import TokenDataset, training_batches, validation_batches
from regvq_fast.data.token_cache import (
    CacheInfo,
    open_shard,
    read_info,
    shard_path,
    token_type,
    write_info,
    write_shard,
)

INFO = CacheInfo(
    tokenizer="runs/tiny",
    tokenizer_sha256="5eed",
    num_codes=1000,
    token_shape=(2, 3),
    image_size=16,
    precision="fp32",
    data="photos",
    seed=7,
    crop="center",
    flip=False,
    views=2,
    train_images=5,
    val_images=3,
    fields=("caption", "segmentation"),
    shard_samples=4,
    num_classes=10,
    complete=True,
)


def write_cache(folder: Path, info: CacheInfo = INFO) -> Path:
    """Sample g of training is full of 10 + g, of validation 100 + g; maps of g, captions "caption g", labels g % 3."""
    for split, first in (("train", 10), ("val", 100)):
        for number in range(info.num_shards(split)):
            numbers = np.array(info.shard_range(split, number))
            grid = np.ones((len(numbers), *info.token_shape), dtype=np.int64) * numbers[:, None, None]
            write_shard(
                shard_path(folder, split, number),
                (grid + first).astype(token_type(info.num_codes)),
                grid.astype(np.uint8) if "segmentation" in info.fields else None,
                [f"caption {g} é" for g in numbers] if "caption" in info.fields else None,
                (numbers % 3).astype(np.int32) if "label" in info.fields else None,
            )
    write_info(folder, info)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def first_tokens(dataset: TokenDataset, indices) -> list[int]:
    return dataset.__getitems__(list(indices))["tokens"][:, 0, 0].tolist()


# ------------------------------------------------------------------------------------------------------------- samples


def test_samples_and_batches_hold_the_same(cache: Path) -> None:
    dataset = TokenDataset(cache, "val")
    batch = dataset.__getitems__([2, 0])
    assert torch.equal(batch["tokens"], torch.tensor([102, 100])[:, None, None].expand(2, 2, 3))
    assert torch.equal(batch["segmentation"], torch.tensor([2, 0], dtype=torch.uint8)[:, None, None].expand(2, 2, 3))
    assert batch["caption"] == ["caption 2 é", "caption 0 é"]
    sample = dataset[2]
    assert torch.equal(sample["tokens"], batch["tokens"][0])
    assert torch.equal(sample["segmentation"], batch["segmentation"][0])
    assert sample["caption"] == "caption 2 é"
    assert len(dataset) == 3


def test_fields_that_a_cache_lacks_are_left_out(tmp_path: Path) -> None:
    write_cache(tmp_path, dataclasses.replace(INFO, fields=()))
    assert TokenDataset(tmp_path)[0].keys() == {"tokens"}


def test_the_first_pass_is_the_stream_and_others_are_shuffled(cache: Path) -> None:
    own = TokenDataset(cache, seed=7)
    assert first_tokens(own, range(10)) == list(range(10, 20))
    second, third = first_tokens(own, range(10, 20)), first_tokens(own, range(20, 30))
    other = first_tokens(TokenDataset(cache, seed=8), range(10))
    for order in (second, third, other):
        assert sorted(order) == list(range(10, 20)) != order
    assert len({tuple(order) for order in (second, third, other)}) == 3


def test_indices_beyond_the_split_are_refused(cache: Path) -> None:
    with pytest.raises(IndexError):
        TokenDataset(cache, "val")[3]
    with pytest.raises(IndexError):
        TokenDataset(cache)[-1]


def test_the_loader_gathers_whole_batches(cache: Path) -> None:
    dataset = TokenDataset(cache)
    expected = [first_tokens(dataset, range(first, first + 4)) for first in (8, 12, 16)]
    for workers in (0, 2):
        batches = training_batches(dataset, 4, start=8, workers=workers)
        assert [next(batches)["tokens"][:, 0, 0].tolist() for _ in expected] == expected
    validation = list(validation_batches(TokenDataset(cache, "val"), 2, workers=1))
    assert [batch["tokens"][:, 0, 0].tolist() for batch in validation] == [[100, 101], [102]]
    assert validation[1]["caption"] == ["caption 2 é"]


def test_a_pickled_data_set_opens_the_cache_anew(cache: Path) -> None:
    dataset = TokenDataset(cache)
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[5]["tokens"], dataset[5]["tokens"])


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_cache_of_another_tokenizer_is_refused(cache: Path) -> None:
    TokenDataset(cache, tokenizer_hash="5eed")
    with pytest.raises(ValueError, match=r"runs/tiny .*5eed.*beef"):
        TokenDataset(cache, tokenizer_hash="beef")


def test_a_folder_without_a_whole_cache_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TokenDataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cache\.json.* --out"):
        TokenDataset(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"cache\.json is a file"):
        TokenDataset(cache / "cache.json")
    with pytest.raises(ValueError, match="split"):
        TokenDataset(cache, "test")
    write_info(cache, dataclasses.replace(INFO, complete=False))
    with pytest.raises(ValueError, match=r"regvq tokens"):
        TokenDataset(cache)


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", "{}", '{"format": 1, "views": 3}', '{"format": 1, "token_shape": 4}']
)
def test_damaged_descriptions_are_named(cache: Path, content: str) -> None:
    (cache / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=r"cache\.json is damaged"):
        TokenDataset(cache)


def test_other_versions_of_the_format_are_refused(cache: Path) -> None:
    values = json.loads((cache / "cache.json").read_text()) | {"format": 2}
    (cache / "cache.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"format 2\b"):
        TokenDataset(cache)


def test_missing_and_truncated_shards_are_named(cache: Path) -> None:
    shard = shard_path(cache, "train", 1)
    whole = shard.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"train-000001.safetensors .*(truncated|damaged)"):
            TokenDataset(cache)
    shard.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"train-000001\.safetensors .*(truncated|damaged)"):
        TokenDataset(cache)
    TokenDataset(cache, "val")  # which needs other files
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.safetensors .*regvq tokens"):
        TokenDataset(cache)


def test_shards_of_another_cache_are_named(tmp_path: Path, cache: Path) -> None:
    other = write_cache(tmp_path / "other", dataclasses.replace(INFO, token_shape=(2, 2)))
    shard_path(cache, "val", 0).write_bytes(shard_path(other, "val", 0).read_bytes())
    with pytest.raises(ValueError, match=r"U16 \[3, 2, 2\].*U16 \[3, 2, 3\]"):
        TokenDataset(cache, "val")


def test_tokens_that_no_code_has_are_refused(cache: Path) -> None:
    shard = open_shard(cache, read_info(cache), "val", 0)
    damaged = shard.tokens.copy()
    damaged[1, 1, 1] = 1000
    write_shard(shard_path(cache, "val", 0), damaged, shard.segmentation, [shard.caption_of(row) for row in range(3)])
    dataset = TokenDataset(cache, "val")
    assert len(dataset[0]["tokens"]) == 2
    with pytest.raises(ValueError, match=r"token 1000\b"):
        dataset.__getitems__([0, 1])


def test_classes_that_the_cache_has_not_are_refused(cache: Path) -> None:
    write_info(cache, dataclasses.replace(INFO, num_classes=2))  # as older versions wrote of a data set that names two
    dataset = TokenDataset(cache, "val")
    assert len(dataset.__getitems__([0, 1])["segmentation"]) == 2
    with pytest.raises(ValueError, match=r"class id 2\b"):
        dataset[2]


def test_labels_come_with_their_samples_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, fields=("label",), label_names=("ant", "bee", "cat"))
    dataset = TokenDataset(write_cache(tmp_path, info), seed=7)
    assert read_info(tmp_path) == info
    batch = dataset.__getitems__([4, 5])
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [1, 2]
    assert dataset[5]["label"] == 2
    shard = shard_path(tmp_path, "train", 1)
    for wrong in (-1, 3):
        tokens = open_shard(tmp_path, info, "train", 1).tokens.copy()
        write_shard(shard, tokens, None, None, np.array([1, wrong, 0, 1], dtype=np.int32))
        damaged = TokenDataset(tmp_path, seed=7)
        assert damaged[4]["label"] == 1
        with pytest.raises(ValueError, match=rf"labels .*\b{wrong}, of 3 classes" if wrong > 0 else r"labels from -1"):
            damaged.__getitems__([4, 5])


def test_caches_from_before_labels_still_open(cache: Path) -> None:
    values = json.loads((cache / "cache.json").read_text())
    del values["label_names"]
    (cache / "cache.json").write_text(json.dumps(values))
    assert read_info(cache) == INFO
    assert first_tokens(TokenDataset(cache, seed=7), range(3)) == [10, 11, 12]


@pytest.mark.parametrize(("num_codes", "name"), [(2**16, "U16"), (2**16 + 1, "U32"), (2**18, "U32")])
def test_ids_of_many_codes_take_four_bytes(tmp_path: Path, num_codes: int, name: str) -> None:
    info = dataclasses.replace(INFO, num_codes=num_codes, fields=())
    write_cache(tmp_path, info)
    tokens = open_shard(tmp_path, info, "val", 0).tokens.copy()
    tokens[1] = num_codes - 1
    write_shard(shard_path(tmp_path, "val", 0), tokens, None, None)
    assert first_tokens(TokenDataset(tmp_path, "val"), range(3)) == [100, num_codes - 1, 102]
    assert name.encode() in shard_path(tmp_path, "val", 0).read_bytes()[:200]


def test_a_cache_has_more_shards_than_a_process_may_have_files(tmp_path: Path) -> None:
    sizes = {"views": 1, "train_images": 2000, "val_images": 1, "shard_samples": 1, "num_codes": 4000}
    info = dataclasses.replace(INFO, fields=("caption",), **sizes)
    write_cache(tmp_path, info)
    script = (
        "import sys, torch; from regvq_fast.data import TokenDataset, training_batches; d = TokenDataset(sys.argv[1]);"
        "print(sum(int(next(b)['tokens'][:, 0, 0].sum()) for b in [training_batches(d, 100)] for _ in range(20)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(sum(range(10, 2010)))], done.stderr


def test_a_cache_may_lie_in_a_folder_whose_name_is_not_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    assert first_tokens(TokenDataset(write_cache(folder), seed=7), range(3)) == [10, 11, 12]


def test_an_empty_caption_is_refused_before_a_step_meets_it(cache: Path) -> None:
    shard = open_shard(cache, read_info(cache), "val", 0)
    for captions in (["", "b", "c"], ["a", "", "c"]):
        write_shard(shard_path(cache, "val", 0), shard.tokens.copy(), shard.segmentation.copy(), captions)
        with pytest.raises(ValueError, match=r"val-000000\.safetensors .*caption"):
            TokenDataset(cache, "val")


def test_random_damage_never_passes_for_data(cache: Path) -> None:
    """A header that says something else is an error in words, whatever it says."""
    shard = shard_path(cache, "val", 0)
    whole = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = TokenDataset(cache, "val")[2]
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] = rng.randrange(256)
        shard.write_bytes(damaged)
        try:
            found = TokenDataset(cache, "val")[2]
        except ValueError as error:
            message = str(error)
        else:
            message = "val-000000.safetensors"
            assert torch.equal(found["tokens"], expected["tokens"])
            assert found["caption"] == expected["caption"]
        assert "val-000000.safetensors" in message
