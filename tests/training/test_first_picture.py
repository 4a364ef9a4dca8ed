"""bench/first_picture.py on two finished runs."""

import shutil
import sys
from pathlib import Path

import first_picture
import numpy as np
import pytest
from helpers.runs import FAST, train
from PIL import Image


def test_the_first_picture_has_three_labelled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: tmp_path / name for name in ("vq-gan", "reg-vq")}
    for name, out in runs.items():
        train("--out", out, *FAST, "--quantizer", name)
    picture = tmp_path / "first.png"
    flags = [flag for name, out in runs.items() for flag in (f"--{name}", str(out))]
    monkeypatch.setattr(sys, "argv", ["first_picture.py", *flags, "--out", str(picture)])
    first_picture.main()
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows = np.split(pixels, 3)
    assert all(row[:, :150].min() < 100 for row in rows), "each has a label"
    images = [row[:, 150:] for row in rows]
    assert pixels.shape == (3 * 104, 150 + 8 * 100 + 4, 3)
    assert all(not np.array_equal(a, b) for a, b in ((images[0], images[1]), (images[1], images[2])))

    (runs["vq-gan"] / "summary.json").unlink()
    with pytest.raises(SystemExit, match="finished run"):
        first_picture.main()
    shutil.rmtree(runs["vq-gan"])
    train("--out", runs["vq-gan"], *FAST, "--seed", 1)
    with pytest.raises(SystemExit, match="differ in data, image size or seed"):
        first_picture.main()
