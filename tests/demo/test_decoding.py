"""The process that decodes uploads: what it answers, and what ends it without harm."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.hostile_images import encoded, gradient, many_scans, refused
from PIL import Image

from regvq_fast.demo import decoding
from regvq_fast.demo.decoding import Decoder
from regvq_fast.demo.uploads import read_square


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(seconds=3.0, memory=2**28)
    yield made
    made.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(gradient()))
    return path


def test_the_answers_are_those_of_this_process(decoder: Decoder, photo: Path, tmp_path: Path) -> None:
    read, expected = decoder.read_square(photo, 16), read_square(photo, 16)
    assert torch.equal(read.pixels, expected.pixels)
    assert read[1:] == expected[1:] == (40, 24)
    for name, (content, word) in refused().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=word):
            decoder.read_square(tmp_path / name, 16)
    with pytest.raises(FileNotFoundError):
        decoder.read_square(tmp_path / "gone", 16)


def test_an_image_that_takes_hours_is_refused(decoder: Decoder, photo: Path, tmp_path: Path) -> None:
    decoder.read_square(photo, 16)
    (tmp_path / "bomb.jpg").write_bytes(many_scans(20_000))
    start = time.monotonic()
    with pytest.raises(ValueError, match="over 3 seconds"):
        decoder.read_square(tmp_path / "bomb.jpg", 16)
    assert time.monotonic() - start < 15
    assert decoder.read_square(photo, 16).width == 40


def test_an_image_that_takes_too_much_memory_is_refused(decoder: Decoder, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.webp").write_bytes(encoded(Image.new("RGBA", (16_000, 3000)), "WEBP", lossless=True, method=0))
    with pytest.raises(ValueError, match=r"over 0\.2 GiB|damaged"):
        decoder.read_square(tmp_path / "wide.webp", 16)
    assert decoder.read_square(photo, 16).width == 40


def test_a_decoder_that_crashes_is_replaced(decoder: Decoder, photo: Path, tmp_path: Path) -> None:
    decoder.read_square(photo, 16)
    (tmp_path / "bomb.jpg").write_bytes(many_scans(20_000))
    crash = threading.Timer(1.0, os.kill, (decoder._process.pid, signal.SIGSEGV))
    crash.start()
    with pytest.raises(ValueError, match="crashed"):
        decoder.read_square(tmp_path / "bomb.jpg", 16)
    assert decoder.read_square(photo, 16).width == 40
    decoder._process.kill()  # between two images
    decoder._process.join()
    assert decoder.read_square(photo, 16).width == 40


def test_a_decoder_ends_in_the_middle_of_an_image_though_its_parent_was_killed(tmp_path: Path) -> None:
    (tmp_path / "bomb.jpg").write_bytes(many_scans(20_000))
    spawn = multiprocessing.get_context("spawn")
    pipe, other = spawn.Pipe()
    arguments = (other, 1.0 - decoding._AFTER_SECONDS, 2**28)  # an alarm after one second
    process = spawn.Process(target=decoding._decode, args=arguments, daemon=True)
    process.start()
    pipe.send((tmp_path / "bomb.jpg", 16))
    process.join(60)
    assert process.exitcode == -signal.SIGALRM
