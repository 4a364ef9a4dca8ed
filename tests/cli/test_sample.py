"""Input files of train/sample.py. The samples themselves are tested in tests/priors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regvq_fast.cli.sample_inputs import _read_ids, _read_square


def test_files_that_cannot_be_read_are_named_with_their_flag(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.effect_noise((64, 48), 90).save(path)
    square, size = _read_square("--edit", path, 16)
    assert (square.shape, size) == ((3, 16, 16), (64, 48))
    assert _read_ids(path, 1, 1).shape == (1, 48, 48)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^--edit {path}: .*truncated"):
        _read_square("--edit", path, 16)
    with pytest.raises(ValueError, match=f"^--map {path}: .*truncated"):
        _read_ids(path, 1, 1)
    path.write_text("no image")
    with pytest.raises(ValueError, match=f"^--mask {path} is not an image$"):
        _read_square("--mask", path, 16)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^--mask {path}: no such file$"):
        _read_square("--mask", path, 16)


@pytest.mark.parametrize("turned", [False, True])
def test_a_map_lies_where_the_image_to_edit_does(tmp_path: Path, turned: bool) -> None:
    columns = np.arange(128, dtype=np.uint8)[None].repeat(64, axis=0)
    ids = Image.fromarray(columns.T if turned else columns)
    ids.save(tmp_path / "map.png")
    ids.convert("RGB").save(tmp_path / "photo.png")
    square, _ = _read_square("--edit", tmp_path / "photo.png", 64)
    assert torch.equal(_read_ids(tmp_path / "map.png", 16, 16), square[:1])
