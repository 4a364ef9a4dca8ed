"""Emoji as a folder of images with names and groups, from the npm package emoji-datasource-google."""

import json
import re
import tarfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from regvq_fast.data.transforms import Box, crop_rgb
from regvq_fast.files import atomic_folder
from regvq_fast.models.weights import RemoteWeights, download_file

PACKAGE = RemoteWeights(
    "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
"""74 MB; npm's registry lists the SHA-512 of the same bytes."""

_NAMES, _IMAGES = "package/emoji.json", "package/img/google/64/"


def prepare_emoji(out: Path, package: Path | None = None, *, console: Console) -> None:
    """Write each emoji as ``GROUP/NAME.png`` (64 px, transparency composited on white) and its names as ``NAME.txt``.

    The first name is Unicode's, such as "dog face", followed by short names, such as "dog". Skin tones are left out;
    with them 60 % of the images would be people and hands. The folder is created atomically.

    Args:
        out: new or empty folder.
        package: the npm package, a .tgz; None: download and verify it.
        console: for the counts.

    Raises:
        FileExistsError: `out` exists and is not empty. FileNotFoundError: `package` is not a file.
        ValueError: it is another package. OSError: it can't be downloaded.
    """
    if package is not None and not package.is_file():
        raise FileNotFoundError(f"--root {package} is no file: name the package's .tgz, or leave --root out")
    groups = set()
    count = 0
    with atomic_folder(out) as partial:
        downloaded = partial / PACKAGE.file_name
        if package is None:
            download_file(PACKAGE, downloaded)
        for emoji, image in _read(package or downloaded):
            folder = partial / _file_name(emoji["category"])
            folder.mkdir(exist_ok=True)
            path = folder / _file_name(emoji["short_name"])
            image.save(f"{path}.png")
            names = [emoji["name"].lower(), *(name.replace("_", " ") for name in emoji["short_names"])]
            Path(f"{path}.txt").write_text("\n".join(dict.fromkeys(names)) + "\n", encoding="utf-8")
            groups.add(folder)
            count += 1
        downloaded.unlink(missing_ok=True)
    console.print(Text(f"{out}: {count:,} images with captions in {len(groups)} groups"), soft_wrap=True)


def _read(package: Path) -> list[tuple[dict[str, Any], Image.Image]]:
    """Return the entries of emoji.json, without skin tones, each with its RGB image."""
    try:
        with tarfile.open(package, "r:gz") as tar:
            wanted = (member for member in tar if member.name == _NAMES or member.name.startswith(_IMAGES))
            files = {member.name: file.read() for member in wanted if (file := tar.extractfile(member))}
        listed = [emoji for emoji in json.loads(files[_NAMES]) if emoji["category"] != "Component"]
        # Emoji without an image by Google have other vendors' images, which are not free.
        return [(emoji, _rgb(files[_IMAGES + emoji["image"]])) for emoji in listed if emoji["has_img_google"]]
    except (tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise ValueError(f"{package} is no whole package of emoji-datasource-google ({error}): get it anew") from None


def _rgb(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        return crop_rgb(image, Box(0, 0, *image.size), *image.size, oversampling=1)


def _file_name(text: str) -> str:
    """Return the text without characters that are special in paths."""
    return re.sub(r"[^\w &+-]", "_", text)
