"""Folders of images: which files and splits they have, crops and orders, unreadable and left-out files."""

import errno
import logging
import os
import re

import numpy as np
import pytest
import torch
from helpers.flat_images import level_of, write_flat
from PIL import Image
from torch.utils.data import DataLoader

from regvq_fast.data import ImageFolder, reading
from regvq_fast.data.image_files import left_out_note
from regvq_fast.data.loading import collate, training_batches


@pytest.fixture
def folder(tmp_path):
    """40 images of gray level 0, 5, 10 ..., in three folders."""
    for k in range(40):
        write_flat(tmp_path / ("a", "b/c", ".")[k % 3] / f"{k:02d}.png", 5 * k)
    return tmp_path


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "WebP", "bmp", "tif", "TIFF", "gif"])
def test_finds_the_usual_formats_in_any_case(tmp_path, extension):
    format = {"jpg": "JPEG", "tif": "TIFF"}.get(extension.lower(), extension.upper())
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for k in range(2):
        Image.new("RGB", (20, 20), (80, 80, 80)).save(tmp_path / "deep" / "er" / f"{k}.{extension}", format=format)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("nor this")
    dataset = ImageFolder(tmp_path, "train", 8)
    assert [os.path.basename(file) for file in dataset.files] in (["0." + extension], ["1." + extension])
    assert dataset[0]["image"].shape == (3, 8, 8)
    assert abs(level_of(dataset[0]) - 80) <= 2


def test_hold_out_is_disjoint_complete_and_stable(folder):
    train, validation = ImageFolder(folder, "train", 8), ImageFolder(folder, "val", 8)
    assert 1 <= len(validation) <= 8
    assert len(train) + len(validation) == 40
    assert not set(train.files) & set(validation.files)
    held_out = set(validation.files)
    for k in range(40, 45):
        write_flat(folder / f"{k}.png")
    assert held_out <= set(ImageFolder(folder, "val", 8).files)


def test_two_images_make_two_splits_and_one_serves_both(tmp_path):
    write_flat(tmp_path / "0.png")
    with pytest.warns(UserWarning, match="one image"):
        assert len(ImageFolder(tmp_path, "train", 8)) == 1
    with pytest.warns(UserWarning, match="holds one image"):
        assert len(ImageFolder(tmp_path, "val", 8)) == 1
    write_flat(tmp_path / "1.png")
    files = [ImageFolder(tmp_path, split, 8).files for split in ("train", "val")]
    assert len(files[0]) == len(files[1]) == 1
    assert files[0] != files[1]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_the_folders_own_splits(tmp_path, name):
    for k in range(6):
        write_flat(tmp_path / ("train" if k < 4 else name) / "class" / f"{k}.png", 10 * k)
    assert len(ImageFolder(tmp_path, "train", 8)) == 4
    assert [level_of(sample) for sample in ImageFolder(tmp_path, "val", 8)] == [40, 50]


def test_a_train_folder_alone_is_split_by_hash(tmp_path):
    for k in range(6):
        write_flat(tmp_path / "train" / f"{k}.png")
    assert len(ImageFolder(tmp_path, "train", 8)) + len(ImageFolder(tmp_path, "val", 8)) == 6


def test_links_are_followed_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_flat(elsewhere / "linked.png", 7)
    os.symlink(elsewhere, folder / "link")
    os.symlink(elsewhere, folder / "second-link")
    os.symlink(folder, folder / "b" / "loop")
    os.symlink(folder / "gone.png", folder / "dangling.png")
    assert len(ImageFolder(folder, "train", 8)) + len(ImageFolder(folder, "val", 8)) == 41


def test_an_epoch_visits_every_image_once_in_its_own_order(folder):
    dataset = ImageFolder(folder, "train", 8, seed=1)
    n = len(dataset)
    epochs = [[level_of(dataset[epoch * n + position]) for position in range(n)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == n
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != [level_of(ImageFolder(folder, "train", 8, seed=2)[position]) for position in range(n)]


def test_augmentation_is_a_function_of_seed_and_index(gradients):
    dataset = ImageFolder(gradients, "train", 16, seed=5)
    images = [dataset[index]["image"] for index in range(20)]
    again = ImageFolder(gradients, "train", 16, seed=5)
    assert all(torch.equal(images[index], again[index]["image"]) for index in reversed(range(20)))
    assert len({image.numpy().tobytes() for image in images}) == 20
    rising = [bool(image[0, :, -1].float().mean() > image[0, :, 0].float().mean()) for image in images]
    assert 3 < sum(rising) < 17  # mirrored about as often as not
    unflipped = ImageFolder(gradients, "train", 16, flip=False)
    assert all(unflipped[k]["image"][0, 0, -1] > unflipped[k]["image"][0, 0, 0] for k in range(12))


def test_central_crops(gradients):
    validation = ImageFolder(gradients, "val", 64)
    expected = torch.arange(32, 96).mul(2).to(torch.uint8)
    assert torch.equal(validation[0]["image"][0, 5], expected)
    training = ImageFolder(gradients, "train", 64, crop="center", flip=False)
    assert torch.equal(training[3]["image"][0, 5], expected)


def test_validation_can_be_limited_evenly(tmp_path):
    for k in range(2, 12):
        write_flat(tmp_path / "val" / f"{k:02d}.png", k)
    write_flat(tmp_path / "train" / "0.png")
    assert [level_of(sample) for sample in ImageFolder(tmp_path, "val", 8, limit=5)] == [2, 4, 6, 8, 10]
    assert len(ImageFolder(tmp_path, "val", 8, limit=50)) == 10


def spoil(folder) -> None:
    (folder / "train" / "03.png").write_bytes(b"")
    (folder / "train" / "04.jpg").write_text("an error page saved as a picture\nin two lines")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "train" / "06.png").write_bytes(whole[: len(whole) // 2])  # its header is sound


@pytest.fixture
def damaged(tmp_path):
    for k in (0, 1, 2, 5, 7):
        write_flat(tmp_path / "train" / f"{k:02d}.png", 10 * k)
    write_flat(tmp_path / "val" / "0.png")
    spoil(tmp_path)
    return tmp_path


def test_unreadable_images_are_skipped_with_a_line_each_and_replaced_by_the_next(damaged, caplog):
    with caplog.at_level(logging.WARNING, logger="regvq_fast"):
        dataset = ImageFolder(damaged, "train", 8)
        levels = [level_of(dataset[index]) for index in range(3 * 8)]
    assert dataset.unreadable == 3
    assert len(dataset) == 8
    for epoch in range(3):  # 03 and 04 are replaced by 05, and 06 by 07
        assert sorted(levels[8 * epoch : 8 * epoch + 8]) == [0, 10, 20, 50, 50, 50, 70, 70]
    assert len(caplog.messages) == 3
    assert all("\n" not in message and "unreadable" in message for message in caplog.messages)
    assert {name for message in caplog.messages for name in ("03.png", "04.jpg", "06.png") if name in message} == {
        "03.png",
        "04.jpg",
        "06.png",
    }


def test_what_workers_find_is_counted_in_the_parent_and_reported_once(damaged, tmp_path):
    log = tmp_path / "log.txt"
    handler = logging.FileHandler(log)
    logger = logging.getLogger("regvq_fast")
    logger.addHandler(handler)
    try:
        dataset = ImageFolder(damaged, "train", 8)
        batches = training_batches(dataset, 4, workers=2)
        from_workers = torch.cat([next(batches)["image"] for _ in range(6)])
        del batches
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert dataset.unreadable == 3
    assert len(log.read_text().splitlines()) == 3
    here = ImageFolder(damaged, "train", 8)
    assert torch.equal(from_workers, torch.stack([here[index]["image"] for index in range(24)]))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_storage_that_fails_is_asked_again_and_drops_no_picture(folder, caplog, monkeypatch, number):
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    dataset = ImageFolder(folder, "val", 8)
    expected, read, failures = dataset[0]["image"], dataset._read, []

    def fail(times):
        def read_or_fail(*place):
            if len(failures) < times:
                failures.append(place)
                raise OSError(number, os.strerror(number))
            return read(*place)

        failures.clear()
        monkeypatch.setattr(dataset, "_read", read_or_fail)

    fail(2)
    assert torch.equal(dataset[0]["image"], expected)
    fail(3)
    with pytest.raises(OSError, match=re.escape(f"{os.strerror(number)}: '{dataset.files[0]}'")):
        dataset[0]
    assert dataset.unreadable == 0
    assert not caplog.messages
    os.unlink(dataset.files[0])  # which is of the file
    with pytest.raises(ValueError, match="none of the 1 images"):
        dataset[0]
    assert dataset.unreadable == 1


def test_two_workers_that_meet_one_file_at_once_give_it_one_line(folder, caplog):
    dataset = ImageFolder(folder, "train", 8)
    for _ in range(2):
        with dataset._skipping_unreadable(3):
            raise OSError("truncated")
    assert len(caplog.messages) == 1
    assert dataset.unreadable == 1


def test_an_error_when_no_image_is_left(damaged):
    for name in ("00.png", "01.png", "02.png", "05.png", "07.png"):
        (damaged / "train" / name).unlink()
    with pytest.raises(ValueError, match=r"\b3 .*'train'"):
        ImageFolder(damaged, "train", 8)[0]  # 06 has a sound header
    (damaged / "train" / "06.png").unlink()
    with pytest.raises(ValueError, match="none of the 2 images"):
        ImageFolder(damaged, "train", 8)


def test_opening_a_folder_reads_one_header_only(folder, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest, **options: opened.append(path) or original(path))
    ImageFolder(folder, "train", 8)
    assert len(opened) == 1


def test_missing_folder_file_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    write_flat(tmp_path / "one.png")
    with pytest.raises(NotADirectoryError, match=r"one\.png is a file"):
        ImageFolder(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*jpg"):
        ImageFolder(tmp_path / "empty")


def test_bad_arguments_name_the_value(folder):
    for arguments, message in (
        ({"split": "dev"}, "'dev'"),
        ({"crop": "corner"}, "'corner'"),
        ({"fields": ["depth"]}, "'depth'"),
        ({"image_size": 0}, "got 0"),
        ({"limit": 0}, "got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder, **arguments)
    with pytest.raises(IndexError):
        ImageFolder(folder, "val", 8)[40]
    with pytest.raises(IndexError):
        ImageFolder(folder, "train", 8)[-1]


def test_spawned_workers_share_what_they_find(tmp_path):
    """With spawned instead of forked processes the data set is pickled."""
    for k in range(3):
        write_flat(tmp_path / "val" / f"{k}.png", 10 * k)
    write_flat(tmp_path / "train" / "0.png")
    dataset = ImageFolder(tmp_path, "val", 8)
    (tmp_path / "val" / "1.png").write_bytes(b"")
    loader = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    assert [level_of(batch) for batch in loader] == [40 // 3]  # 0, and 20 for itself and its neighbour
    assert dataset.unreadable == 1


def test_images_that_a_folder_leaves_out_are_counted_once_by_reason(folder):
    for name in ("gone.png", "a/gone"):
        (folder / name).symlink_to(folder / "nowhere")
    for name in ("b/1.AVIF", "2.jfif", "3.jpe", "4.jpe", "notes.json", "5.txt", ".hidden.avif"):
        (folder / name).write_bytes(b"")
    splits = [ImageFolder(folder, split, 8) for split in ("train", "val")]
    assert left_out_note(*splits) == ("; left out: 6 files (2 .jpe, 2 dangling links, 1 .avif, 1 .jfif)")
    assert left_out_note(object()) == ""


def test_unreadable_images_and_folders_of_both_splits_are_left_out(tmp_path):
    for split in ("train", "val"):
        for k in range(3):
            write_flat(tmp_path / split / f"{k}.png")
        (tmp_path / split / "0.png").write_bytes(b"not an image")
        (tmp_path / split / "3.avif").write_bytes(b"")
    splits = [ImageFolder(tmp_path, split, 8) for split in ("train", "val")]
    assert left_out_note(*splits) == "; left out: 4 files (2 .avif, 2 unreadable)"
    assert left_out_note(ImageFolder(tmp_path / "val", "train", 8, limit=1)).startswith("; left out: ")


def test_a_link_to_itself_and_a_closed_folder_are_left_out(folder, tmp_path_factory, monkeypatch, caplog):
    (folder / "me").symlink_to("me")
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):  # root may read anything
        if os.fspath(path) == str(folder / "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    splits = [ImageFolder(folder, split, 8) for split in ("train", "val")]
    assert sum(map(len, splits)) == 40
    assert left_out_note(*splits) == "; left out: 2 files (1 dangling link, 1 unreadable folder)"
    (said,) = caplog.messages
    assert f"{folder}/lost+found" in said
    with pytest.raises(PermissionError):
        ImageFolder(folder / "lost+found")
