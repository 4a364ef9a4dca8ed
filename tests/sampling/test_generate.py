"""What train/sample.py is given as files; what it draws is tested with the priors, in tests/training."""

from pathlib import Path

import pytest
from PIL import Image

from regvq_fast.sampling.generate import _read_ids, _read_square


def test_files_that_cannot_be_read_are_named_with_their_flag(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.effect_noise((64, 48), 90).save(path)
    square, size = _read_square("--edit", path, 16)
    assert (square.shape, size) == ((3, 16, 16), (64, 48))
    assert _read_ids(path).shape == (1, 48, 64)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^--edit {path}: .*truncated"):
        _read_square("--edit", path, 16)
    with pytest.raises(ValueError, match=f"^--map {path}: .*truncated"):
        _read_ids(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match=f"^--mask {path} is not an image$"):
        _read_square("--mask", path, 16)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^--mask {path}: no such file$"):
        _read_square("--mask", path, 16)
