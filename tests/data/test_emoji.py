"""`regvq data emoji` makes a folder of images, names and groups of the npm package, whole or not at all."""

import hashlib
import io
import json
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from regvq_fast.cli import main
from regvq_fast.cli.data import DataCommand, manage_data
from regvq_fast.data import emoji
from regvq_fast.data.datasets import build_dataset
from regvq_fast.models.weights import RemoteWeights


def entry(name: str, short_names: list[str], category: str, image: str, *, google: bool = True) -> dict:
    return {
        "name": name,
        "short_name": short_names[0],
        "short_names": short_names,
        "category": category,
        "image": image,
        "has_img_google": google,
        "skin_variations": {"1F3FB": {"image": "tone.png", "has_img_google": True}},
    }


ENTRIES = [
    entry("DOG FACE", ["dog", "good_dog"], "Animals & Nature", "1.png"),
    entry("THUMBS UP", ["+1"], "People & Body", "2.png"),
    entry("UP", ["../up"], "../../Symbols", "3.png"),
    entry("MEDIUM SKIN TONE", ["skin-tone-4"], "Component", "1.png"),
    entry("APPLE LOGO", ["apple_logo"], "Symbols", "1.png", google=False),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package as npm packs it: a half-transparent red, a greyscale and a palette image, and a skin tone."""
    images = {
        "1": Image.new("RGBA", (8, 8), (255, 0, 0, 128)),
        "2": Image.new("LA", (8, 8), (0, 0)),
        "3": Image.new("P", (8, 8)),
        "tone": Image.new("RGBA", (8, 8), "brown"),
    }
    return packed(tmp_path / "package.tgz", {f"img/google/64/{name}.png": png(image) for name, image in images.items()})


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {"emoji.json": json.dumps(ENTRIES).encode(), "img/other.png": b"", **files}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def run(out: Path, package: Path | None = None, **options) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    manage_data(DataCommand("emoji", package, out=out, **options), console)
    return console.export_text()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_emoji_is_an_image_with_its_names_in_the_folder_of_its_group(package, tmp_path):
    assert run(tmp_path / "emoji", package) == f"{tmp_path}/emoji: 3 images with captions in 3 groups\n"
    found = files(tmp_path / "emoji")
    paths = ["Animals & Nature/dog", "People & Body/+1", "______Symbols/___up"]
    assert sorted(found) == sorted(f"{path}{suffix}" for path in paths for suffix in (".png", ".txt"))
    captions = [found[f"{path}.txt"].decode() for path in paths]
    assert captions == ["dog face\ndog\ngood dog\n", "thumbs up\n+1\n", "up\n../up\n"]
    pixels = [np.asarray(Image.open(tmp_path / "emoji" / f"{path}.png")) for path in paths]
    assert [np.unique(image.reshape(-1, 3), axis=0).tolist() for image in pixels] == [
        [[255, 127, 127]],
        [[255, 255, 255]],
        [[0, 0, 0]],
    ]
    run(tmp_path / "again", package)
    assert files(tmp_path / "again") == found


def test_names_are_captions_and_groups_are_labels(package, tmp_path):
    run(tmp_path / "emoji", package)
    splits = [
        build_dataset(tmp_path / "emoji", split=split, image_size=8, fields=["caption", "label"])
        for split in ("train", "val")
    ]
    names = {"Animals & Nature": ["dog face", "dog", "good dog"], "People & Body": ["thumbs up", "+1"]}
    names["______Symbols"] = ["up", "../up"]
    for split in splits:
        assert split.label_names == tuple(sorted(names))
        assert all(
            sample["caption"] in names[split.label_names[sample["label"]]]
            for sample in map(split.__getitem__, range(len(split)))
        )


def test_the_package_is_downloaded_and_checked(package, tmp_path, monkeypatch):
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    monkeypatch.setattr(emoji, "PACKAGE", RemoteWeights(package.as_uri(), digest))
    run(tmp_path / "emoji")
    run(tmp_path / "local", package)
    assert files(tmp_path / "emoji") == files(tmp_path / "local")
    monkeypatch.setattr(emoji, "PACKAGE", RemoteWeights(package.as_uri(), digest[::-1]))
    with pytest.raises(OSError, match="not the expected file"):
        run(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "local", "package.tgz"]


def test_nothing_is_left_of_a_run_that_fails_or_is_killed(package, tmp_path, monkeypatch):
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(package.read_bytes()[:-40])
    other = packed(tmp_path / "other.tgz", {})
    for path in (broken, other, Path(__file__)):
        with pytest.raises(ValueError, match=r"not a complete .* package .*: download it again"):
            run(tmp_path / "emoji", path)
    for number in (signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(Image.Image, "save", lambda *_, number=number: signal.raise_signal(number))
        with pytest.raises(SystemExit) as ended:
            main.run("data", ["emoji", "--root", str(package), "--out", str(tmp_path / "emoji")])
        assert ended.value.code == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.tgz", "other.tgz", "package.tgz"]


def test_settings_are_checked_before_anything_is_written(package, tmp_path):
    out = tmp_path / "emoji"
    for command, message in (
        (DataCommand("emoji", package), "emoji needs a folder to write to: name a new one with --out"),
        (DataCommand("emoji", tmp_path, out=out), "is not a file: give the package's .tgz"),
        (DataCommand("emoji", package, out=package), "exists and is not an empty folder"),
        (DataCommand("emoji", package, out=out, size=32), "--size 32 is for the archives of verify and prepare"),
        (DataCommand("verify"), "verify needs the folder of the unpacked archives: give it with --root"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            manage_data(command)
    assert [path.name for path in tmp_path.iterdir()] == ["package.tgz"]
