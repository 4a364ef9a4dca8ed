"""Captions and segmentation maps beside the images of a folder."""

import re

import numpy as np
import pytest
import torch
from helpers.flat_images import write_flat
from PIL import Image
from torch.utils.data import DataLoader

from regvq_fast.data import ImageFolder
from regvq_fast.data.loading import collate


def test_captions_and_segmentation_lie_beside_the_images(tmp_path, caplog):
    pixels = np.arange(64 * 128).reshape(64, 128) // 97 % 256
    for split in ("train", "val"):
        for k in range(4):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(np.stack([pixels.astype(np.uint8)] * 3, axis=-1)).save(tmp_path / split / f"{k}.x.png")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / f"{k}.x.seg.png")
            if k != 2:
                (tmp_path / split / f"{k}.x.txt").write_text(f" photograph {k}, très belle \n", encoding="utf-8")
    for split in ("train", "val"):
        dataset = ImageFolder(tmp_path, split, 64, crop="center", fields=["caption", "segmentation"])
        assert len(dataset) == 3
        for k in range(3):  # central crops of 64 x 64 pixels are not resized: the map is the image
            sample = dataset[k]
            assert torch.equal(sample["segmentation"], sample["image"][0])
        assert {dataset[k]["caption"] for k in range(3)} == {f"photograph {k}, très belle" for k in (0, 1, 3)}
    assert len(caplog.messages) == 2
    assert all(re.search(rf"\b1 of 4 .*{tmp_path}: .*caption.* segmentation", said) for said in caplog.messages)
    assert len(ImageFolder(tmp_path, "train", 64)) == 4
    assert ImageFolder(tmp_path, "train", 64)[0].keys() == {"image"}


def test_an_image_whose_caption_is_empty_is_skipped(tmp_path, caplog):
    """No text encoder takes an empty caption: a prior in training would stop at it, hours after its start."""
    for split in ("train", "val"):
        for k in range(3):
            write_flat(tmp_path / split / f"{k}.png", 10 * k)
            (tmp_path / split / f"{k}.txt").write_text(" \n\n" if k == 1 else f"photograph {k}")
    for split in ("train", "val"):
        dataset = ImageFolder(tmp_path, split, 8, fields=["caption"])
        assert {dataset[k]["caption"] for k in range(3)} == {"photograph 0", "photograph 2"}
        assert dataset.unreadable == 1
        assert re.search(rf"{tmp_path}/{split}/1\.png .*caption", caplog.messages.pop())


def test_segmentation_is_cut_and_mirrored_with_its_image(gradients):
    for k in range(2):
        red = Image.open(gradients / f"{k}.png").getchannel(0)
        red.resize((64, 32), Image.Resampling.NEAREST).save(gradients / f"{k}.seg.png")  # half the size will do
    dataset = ImageFolder(gradients, "train", 32, seed=1, fields=["segmentation"])
    samples = [dataset[k] for k in range(16)]
    for sample in samples:
        assert (sample["image"][0].int() - sample["segmentation"].int()).abs().max() <= 5  # 4 levels a pixel of the map
    rising = [bool(sample["segmentation"][0, -1] > sample["segmentation"][0, 0]) for sample in samples]
    assert 2 < sum(rising) < 14


def test_fields_are_found_whatever_the_case_of_their_suffix(tmp_path):
    for k in range(2):
        write_flat(tmp_path / "val" / f"{k}.PNG", 10 * k)
        write_flat(tmp_path / "train" / f"{k}.PNG", 10 * k)
    for split in ("train", "val"):
        (tmp_path / split / "0.TXT").write_text("photograph 0")
        (tmp_path / split / "1.txt").write_text("photograph 1")
        (tmp_path / split / "1.TXT").write_text("another spelling")
        for k in range(2):
            write_flat(tmp_path / split / f"{k}.png", k, mode="L")
            (tmp_path / split / f"{k}.png").rename(tmp_path / split / f"{k}.Seg.PNG")
    dataset = ImageFolder(tmp_path, "val", 8, fields=["caption", "segmentation"])
    assert [dataset[k]["caption"] for k in range(2)] == ["photograph 0", "photograph 1"]
    assert [int(dataset[k]["segmentation"].max()) for k in range(2)] == [0, 1]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_line_breaks_part_captions_and_a_byte_order_mark_is_none_of_them(tmp_path, mark):
    breaks = {"\u2028", "\x85", "\x0b", "\x0c", "\x1c"}
    for k in range(2):
        write_flat(tmp_path / "train" / f"{k}.png")
        write_flat(tmp_path / "val" / f"{k}.png")
        for split in ("train", "val"):
            text = mark + "".join(f"one{other}line" for other in sorted(breaks)) + "\r\ntwo\rthree\nfour"
            (tmp_path / split / f"{k}.txt").write_bytes(text.encode())
    assert ImageFolder(tmp_path, "val", 8, fields=["caption"])[0]["caption"] == "".join(
        f"one{other}line" for other in sorted(breaks)
    )
    train = ImageFolder(tmp_path, "train", 8, fields=["caption"])
    assert {train[k]["caption"][:3] for k in range(60)} == {"one", "two", "thr", "fou"}


def test_ignored_pixels_of_maps_are_a_class_with_one_warning(tmp_path, caplog):
    for split in ("train", "val"):
        for k in range(8):
            write_flat(tmp_path / split / f"{k}.png")
            write_flat(tmp_path / split / f"{k}.seg.png", 255 if k > 3 else k, mode="L")
    dataset = ImageFolder(tmp_path, "val", 8, fields=["segmentation"])
    batches = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate)
    maps = torch.cat([batch["segmentation"] for batch in batches])
    assert maps[:, 0, 0].tolist() == [0, 1, 2, 3, 255, 255, 255, 255]
    assert bool(dataset._has_255)  # set by a worker, seen here: the others keep quiet
    assert caplog.messages == []
    alone = ImageFolder(tmp_path, "val", 8, fields=["segmentation"])
    assert [alone[k]["segmentation"].max() for k in range(4)] == [0, 1, 2, 3]
    assert caplog.messages == []
    assert [alone[k]["segmentation"].max() for k in range(4, 8)] == [255] * 4
    (said,) = caplog.messages
    assert re.search(rf"{tmp_path} .*\b255\b", said)
