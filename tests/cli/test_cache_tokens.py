"""Whole runs of train/cache_tokens.py at a tiny size: what they leave, how they go on, and what they refuse."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.runs import TRAIN, torchrun
from helpers.tiny_models import tiny_tokenizer
from helpers.token_caches import cache, contents
from PIL import Image

from regvq_fast.data import TokenDataset, encoding, tokenize_batch, training_batches
from regvq_fast.data.loading import collate
from regvq_fast.data.token_cache import read_info
from regvq_fast.ownership import FolderLock
from regvq_fast.scenes import ScenesDataset

SCRIPT = TRAIN / "cache_tokens.py"
SCENES = "--scenes 10 --views 2 --val-images 5 --shard-samples 8 --batch-size 3 --device cpu --workers 0".split()
"""20 training samples in shards of 8, 8 and 4, and one shard of 5 for validation."""
SHARDS = ["train-000000", "train-000001", "train-000002", "val-000000"]


@pytest.fixture(scope="module")
def scenes(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tokenizer, tmp_path_factory.mktemp("caches") / "scenes", *SCENES)


def test_a_cache_holds_what_its_description_says(scenes: Path, tokenizer: Path) -> None:
    assert sorted(contents(scenes)) == sorted(["cache.json", *(f"{shard}.safetensors" for shard in SHARDS)])
    info = read_info(scenes)
    assert info.complete
    assert info.tokenizer == str(tokenizer)
    assert (info.num_codes, info.token_shape, info.image_size, info.precision) == (32, (8, 8), 16, "fp32")
    assert (info.data, info.views, info.train_images, info.val_images) == (None, 2, 10, 5)
    assert (info.num_classes, info.fields) == (16, ("caption", "segmentation"))
    assert len(TokenDataset(scenes)) == 20
    assert len(TokenDataset(scenes, "val")) == 5


def test_cached_samples_are_those_made_on_the_way(scenes: Path) -> None:
    model = tiny_tokenizer()
    cached = training_batches(TokenDataset(scenes), 5)
    images = training_batches(ScenesDataset("train", 16, length=10), 5)
    distinct = set()
    for _ in range(4):  # both views
        expected, found = tokenize_batch(model, next(images)), next(cached)
        assert torch.equal(found["tokens"], expected["tokens"])
        assert torch.equal(found["segmentation"], expected["segmentation"])
        assert found["caption"] == expected["caption"]
        distinct |= set(found["tokens"].flatten().tolist())
    assert len(distinct) > 8
    scenes_val, tokens_val = ScenesDataset("val", 16, length=5), TokenDataset(scenes, "val")
    expected = tokenize_batch(model, collate([scenes_val[k] for k in range(5)]))
    assert torch.equal(tokens_val.__getitems__(range(5))["tokens"], expected["tokens"])


def test_neither_batch_size_nor_workers_change_a_byte(scenes: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = cache(tokenizer, tmp_path / "cache", *SCENES, "--batch-size", "20", "--workers", "1")
    assert contents(other) == contents(scenes)


def test_two_ranks_make_the_cache_of_one(tokenizer: Path, tmp_path: Path) -> None:
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        (photos / split).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(photos / split / f"{k}.png")
    (photos / "val" / "1.png").write_bytes(b"no image")  # of the last of four shards: rank 1 alone meets it
    flags = ["--data", photos, *"--views 2 --shard-samples 8 --batch-size 3 --device cpu --workers 0".split()]
    one, two = cache(tokenizer, tmp_path / "one", *flags), tmp_path / "two"
    command = torchrun(SCRIPT, "--tokenizer", tokenizer, "--out", two, *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(two) == contents(one)
    assert sorted(contents(two)) == sorted(["cache.json", *(f"{shard}.safetensors" for shard in SHARDS)])
    assert done.stdout.count("codes used") == 1
    assert re.search(r"unreadable images\W+1\b", done.stdout)


def test_missing_and_damaged_shards_are_made_anew(
    scenes: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cache(tokenizer, tmp_path / "cache", *SCENES)
    kept = out / "train-000000.safetensors"
    stamp = kept.stat().st_mtime_ns
    (out / "train-000001.safetensors").unlink()
    damaged = out / "val-000000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (out / ".train-000001.12345.safetensors").write_bytes(b"left by a run that was killed")
    capsys.readouterr()
    cache(tokenizer, out, *SCENES)
    said = capsys.readouterr().out
    assert contents(out) == contents(scenes)
    assert kept.stat().st_mtime_ns == stamp
    assert "2 of 4 shards are there" in said
    assert "val-000000.safetensors is truncated or damaged" in said.replace("\n", "")
    cache(tokenizer, out, *SCENES)  # which has nothing left to do
    assert contents(out) == contents(scenes)


def test_a_data_worker_that_ends_is_a_sentence(tokenizer: Path, tmp_path: Path) -> None:
    """It ends while the network works, not while a batch is waited for."""
    killed: list[int] = []

    def kill_at_first(*arguments: Any) -> Any:
        if not killed:
            killed.extend(process.pid for process in multiprocessing.active_children() if process.pid)
            for number in killed:
                os.kill(number, signal.SIGKILL)
            time.sleep(0.2)
        return tokenize_batch(*arguments)

    flags = "--scenes 60 --views 1 --val-images 5 --shard-samples 8 --batch-size 3 --device cpu --workers 1".split()
    with patch.object(encoding, "tokenize_batch", kill_at_first), pytest.raises(SystemExit) as stopped:
        cache(tokenizer, tmp_path / "cache", *flags)
    said = str(stopped.value.code)
    assert re.fullmatch(r"error: data worker 0 \(process \d+\) ended by SIGKILL; --workers 0 .*", said), said


def test_a_cache_that_is_removed_while_it_is_filled_can_be_continued(
    scenes: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards after its removal are there, and its description again."""
    out, original = tmp_path / "cache", encoding.ShardEncoder.encode

    def encode_and_remove(encoder: encoding.ShardEncoder, *inputs: Any) -> Iterator[int]:
        for done in original(encoder, *inputs):
            if (out / f"{SHARDS[0]}.safetensors").exists():
                shutil.rmtree(out)
            yield done

    monkeypatch.setattr(encoding.ShardEncoder, "encode", encode_and_remove)
    with pytest.raises(SystemExit, match=r"^error: "):
        cache(tokenizer, out, *SCENES)
    assert not (out / f"{SHARDS[0]}.safetensors").exists()
    monkeypatch.undo()
    assert contents(cache(tokenizer, out, *SCENES)) == contents(scenes)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_stopped_goes_on_from_its_shards(
    error: BaseException, scenes: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, written = tmp_path / "cache", []

    def stop_at_the_third(path: Path, *arguments: object) -> None:
        if len(written) == 2:
            raise error
        written.append(path)
        write_shard(path, *arguments)

    write_shard = encoding.write_shard
    with patch.object(encoding, "write_shard", stop_at_the_third), pytest.raises(SystemExit) as stopped:
        cache(tokenizer, out, *SCENES)
    if isinstance(error, KeyboardInterrupt):
        assert stopped.value.code == 130
        (said,) = capsys.readouterr().err.splitlines()
        assert "same command" in said
    else:
        assert "No space left on device" in stopped.value.code
    assert sorted(contents(out)) == ["cache.json", "train-000000.safetensors", "train-000001.safetensors"]
    with pytest.raises(ValueError, match="incomplete"):
        TokenDataset(out)
    cache(tokenizer, out, *SCENES)
    assert contents(out) == contents(scenes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views", "3"], "views is 3 here but 2 in"),
        (["--seed", "1"], "seed is 1 here but 0 in"),
        (["--scenes", "11"], "train_images is 11 here but 10 in"),
        (["--fields", "caption"], "fields is ('caption',) here but ('caption', 'segmentation') in"),
        (["--shard-samples", "9"], "shard_samples is 9 here but 8 in"),
        (["--views", "0"], "--views must be at least 1, got 0"),
        (["--scenes", "0"], "--scenes must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must not be negative, got -1"),
        (["--seed", str(2**64)], f"--seed must be an integer of 64 bits, got {2**64}"),
        (["--device", "tpu"], "--device tpu"),
        (["--data", "nowhere", "--scenes", "10"], "--scenes 10 is for the embedded scenes, not for --data nowhere"),
    ],
)
def test_other_settings_are_refused_by_name(flags: list[str], message: str, scenes: Path, tokenizer: Path) -> None:
    before = contents(scenes)
    with pytest.raises(SystemExit) as refused:
        cache(tokenizer, scenes, *SCENES, *flags)
    assert message in str(refused.value.code)
    assert contents(scenes) == before


def test_a_cache_that_another_process_fills_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    half = tmp_path / "cache" / ".train-000000.1.safetensors"
    half.write_bytes(b"being written")
    with FolderLock(tmp_path / "cache", "cache"), pytest.raises(SystemExit, match=f"in use by process {os.getpid()}"):
        cache(tokenizer, tmp_path / "cache", *SCENES)
    assert half.exists()
    assert list((tmp_path / "cache").iterdir()) == [half]


def test_other_tokenizers_and_folders_are_refused(scenes: Path, tokenizer: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = tiny_tokenizer()
    torch.nn.init.normal_(other.quantize.embedding.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"tokenizer_sha256.*cache\.json"):
        cache(tmp_path / "other", scenes, *SCENES)
    with pytest.raises(SystemExit, match="--out"):
        cache(tokenizer, tokenizer, *SCENES)
    with pytest.raises(SystemExit, match=r"--out .*config\.json"):
        cache(tokenizer, tokenizer / "config.json", *SCENES)
    with pytest.raises(SystemExit, match="no such folder"):
        cache(tmp_path / "nowhere", tmp_path / "cache", *SCENES)
    assert not (tmp_path / "cache").exists()


def test_crops_say_nothing_of_scenes(scenes: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A cache of scenes that an earlier version left goes on, whichever crop it recorded."""
    out = shutil.copytree(scenes, tmp_path / "cache")
    info = json.loads((out / "cache.json").read_text())
    (out / "cache.json").write_text(json.dumps(info | {"crop": "random-resized"}))
    (out / "val-000000.safetensors").unlink()
    cache(tokenizer, out, *SCENES)
    assert contents(out)["val-000000.safetensors"] == contents(scenes)["val-000000.safetensors"]


@pytest.mark.parametrize("num_codes", [2**16, 2**16 + 1])
def test_the_largest_token_fits(tmp_path: Path, num_codes: int) -> None:
    model = tiny_tokenizer(num_codes=num_codes)
    with torch.no_grad():  # all latents are those of the last code
        model.quant_conv.weight.zero_()
        model.quant_conv.bias.copy_(model.quantize.embedding.weight[-1])
    model.save_pretrained(tmp_path / "large")
    out = cache(tmp_path / "large", tmp_path / "cache", *SCENES)
    assert TokenDataset(out)[0]["tokens"].eq(num_codes - 1).all()


def test_classes_that_the_data_set_does_not_name_are_refused(
    scenes: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, an embedding that is asked for one of them would end the process."""
    monkeypatch.setattr(ScenesDataset, "num_classes", 2)
    with pytest.raises(SystemExit, match=r"class id 15\b"):
        cache(tokenizer, scenes, *SCENES)
