"""Token caches of folders of images: crops, captions, maps, labels, and images that changed."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_tokenizer
from helpers.token_caches import cache, contents
from PIL import Image

from regvq_fast.data import ImageFolder, TokenDataset, encoding, tokenize_batch, training_batches
from regvq_fast.data.loading import collate
from regvq_fast.data.token_cache import read_info


def test_other_images_under_the_same_path_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    def draw(level: int) -> None:
        for split in ("train", "val"):
            (tmp_path / "photos" / split).mkdir(parents=True, exist_ok=True)
            for k in range(2):
                Image.new("RGB", (20, 20), (level, k, 0)).save(tmp_path / "photos" / split / f"{k}.png")

    flags = ["--data", tmp_path / "photos", "--views", 1, "--device", "cpu", "--workers", 0]
    draw(50)
    made = cache(tokenizer, tmp_path / "cache", *flags)
    before = contents(made)
    cache(tokenizer, made, *flags)
    draw(200)
    with pytest.raises(SystemExit, match=r"first images .*cache"):
        cache(tokenizer, made, *flags)
    assert contents(made) == before
    # A cache that was made before they were kept goes on, without a word on them.
    info = json.loads((made / "cache.json").read_text())
    (made / "cache.json").write_text(json.dumps({k: v for k, v in info.items() if k != "first_images"}))
    cache(tokenizer, made, *flags)


def test_crops_are_central_unless_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{k}.png")
        (tmp_path / "photos" / f"{k}.txt").write_text("one\ntwo\nthree")
    flags = ["--data", tmp_path / "photos", "--device", "cpu", "--workers", 0]
    plain = read_info(cache(tokenizer, tmp_path / "plain", *flags, "--fields"))
    assert (plain.crop, plain.flip, plain.views) == ("center", True, 2)
    assert read_info(cache(tokenizer, tmp_path / "captions", *flags)).views == 4
    out = cache(tokenizer, tmp_path / "random", *flags, "--crop", "random-resized")
    assert read_info(out).crop == "random-resized"
    assert TokenDataset(out).info == read_info(out)  # as one of an earlier version
    with pytest.raises(SystemExit, match=r"crop.*center.*random-resized"):
        cache(tokenizer, out, *flags)
    model, images = tiny_tokenizer(), ImageFolder(tmp_path / "photos", "train", 16, crop="center")
    first = collate([images[k] for k in range(len(images))])
    expected = tokenize_batch(model, first)["tokens"]
    assert torch.equal(TokenDataset(tmp_path / "plain").__getitems__(range(len(images)))["tokens"], expected)


def test_images_with_captions_and_maps(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(photos / f"{k}.png")
        Image.fromarray(np.full((20, 24), k, dtype=np.uint8)).save(photos / f"{k}.seg.png")
        (photos / f"{k}.txt").write_text(f"image {k}")
    (photos / "9.png").write_bytes(b"no image")
    (photos / "9.seg.png").write_bytes(b"no map")
    (photos / "9.txt").write_text("no caption")
    flags = ["--data", photos, *"--views 2 --shard-samples 5 --batch-size 4 --device cpu --workers 0".split()]
    plain = cache(tokenizer, tmp_path / "plain", *flags, "--fields")
    capsys.readouterr()
    out = cache(tokenizer, tmp_path / "cache", *flags)
    said = capsys.readouterr().out
    assert "unreadable images" in said
    assert "fields  caption, segmentation\n" in said
    assert "priors  ar by segmentation" in said
    assert "diffusion by caption" in said

    assert TokenDataset(plain)[0].keys() == {"tokens"}
    assert read_info(plain).num_classes is None
    assert read_info(out).num_classes == 8
    images, tokens, model = ImageFolder(photos, "train", 16, crop="center"), TokenDataset(out), tiny_tokenizer()
    assert len(tokens) == 2 * len(images)
    for index in range(len(tokens)):
        sample = tokens[index]
        assert torch.equal(sample["tokens"], tokenize_batch(model, collate([images[index]]))["tokens"][0])
        assert sample["caption"] == f"image {int(sample['segmentation'].unique())}"


def test_fields_that_all_images_have_are_kept_and_others_named_before_encoding(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for k in range(count):
            path = photos / split / ("wolf", "ant")[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
            if k != 1:
                path.with_suffix(".txt").write_text(f"image {k}")
    flags = ["--data", photos, *"--views 2 --shard-samples 5 --batch-size 4 --device cpu --workers 0".split()]
    with (
        patch.object(encoding.ShardEncoder, "encode", side_effect=ValueError("encoding begins")),
        pytest.raises(SystemExit),
    ):
        cache(tokenizer, tmp_path / "stopped", *flags)
    said = capsys.readouterr().out
    assert "fields  label\n" in said
    assert "left out  caption: 5 of 6 images; --fields caption label keeps only these\n" in said
    assert re.search(r"priors  ar by label, diffusion by label, maskgit by label\n", said)

    out = cache(tokenizer, tmp_path / "cache", *flags)
    info, tokens = read_info(out), TokenDataset(out)
    assert (info.fields, info.label_names) == (("label",), ("ant", "wolf"))
    images = ImageFolder(photos, "train", 16, crop="center", fields=["label"])
    assert [tokens[k]["label"] for k in range(12)] == [images[k]["label"] for k in range(12)]
    assert sorted(TokenDataset(out, "val").__getitems__([0, 1])["label"].tolist()) == [0, 1]
    assert next(training_batches(tokens, 4))["label"].shape == (4,)

    both = cache(tokenizer, tmp_path / "both", *flags, "--fields", "label", "caption")
    assert read_info(both).train_images == 5
    (photos / "train" / "ant").rename(photos / "train" / "bee")
    (photos / "val" / "ant").rename(photos / "val" / "bee")
    with pytest.raises(SystemExit, match="names of the classes differ"):
        cache(tokenizer, out, *flags)
