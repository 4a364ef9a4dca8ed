"""Images through ``regvq reconstruct``, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.flat_images import write_flat
from helpers.tiny_models import tiny_tokenizer
from PIL import Image

from regvq_fast.cli.main import run
from regvq_fast.cli.reconstruct import ReconstructConfig, reconstruct
from regvq_fast.data import Tiling, decode_tokens, tokenize_images
from regvq_fast.evaluation.reconstruction_metrics import image_psnr


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several sizes and formats, one of them lying on its side."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    # Not Image.effect_noise, which continues one unseeded sequence per process.
    noise = Image.fromarray(np.random.default_rng(0).normal(128, 90, (31, 40)).clip(0, 255).astype(np.uint8))
    noise.convert("RGB").save(folder / "a.png")
    noise.save(folder / "sub" / "a.tif")
    turned = Image.Exif()
    turned[0x112] = 6
    noise.resize((20, 10)).save(folder / "turned.jpg", exif=turned)
    (folder / "notes.txt").write_text("no image")
    return folder


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def config(tokenizer: str, out: Path, *images: Path, **changes: object) -> ReconstructConfig:
    return ReconstructConfig(run=tokenizer, out=out, images=images, device="cpu", **changes)


def test_each_image_comes_back_under_its_name_in_its_size(
    tokenizer: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_flat(tmp_path / "single.webp", 90, (5, 7))
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    flags = ["--run", tokenizer, tmp_path / "single.webp", photos, "--out", out, "--sheet", sheet, "--device", "cpu"]
    run("reconstruct", list(map(str, flags)))
    assert files(out) == ["a.png", "single.png", "sub/a.png", "turned.png"]
    model = tiny_tokenizer()
    original = pixels(photos / "a.png")
    # sub/a.tif has the same pixels and is in the same batch, whose size may change the last bit of a convolution.
    tokens = tokenize_images(model, original.expand(2, -1, -1, -1))
    expected = decode_tokens(model, tokens, (31, 40))[0]
    assert torch.equal(pixels(out / "a.png"), expected)
    assert pixels(out / "turned.png").shape == (3, 20, 10)  # upright
    assert pixels(out / "single.png").shape == (3, 7, 5)
    printed = capsys.readouterr().out
    assert f"{image_psnr(expected, original):.2f} dB  a.png, 40 x 31, {len(tokens[0].unique())} codes" in printed
    assert "of 32 used" in printed
    assert f"4 in {out}" in printed
    assert pixels(sheet).shape[1] > 2 * 256


def test_tiles_and_squares(tokenizer: str, photos: Path, tmp_path: Path) -> None:
    model, image = tiny_tokenizer(), photos / "a.png"
    reconstruct(config(tokenizer, tmp_path / "tiles", image, tile=16, overlap=4))
    tiling = Tiling(16, 4)
    tokens = tokenize_images(model, pixels(image)[None], tiling)
    assert torch.equal(pixels(tmp_path / "tiles" / "a.png"), decode_tokens(model, tokens, (31, 40), tiling)[0])
    reconstruct(config(tokenizer, tmp_path / "squares", photos, square=True))
    assert {pixels(tmp_path / "squares" / name).shape for name in files(tmp_path / "squares")} == {(3, 16, 16)}


def test_a_batch_size_changes_nothing(tokenizer: str, photos: Path, tmp_path: Path) -> None:
    for size in (1, 64):
        reconstruct(config(tokenizer, tmp_path / str(size), photos, batch_size=size))
    for name in files(tmp_path / "1"):
        a, b = pixels(tmp_path / "1" / name).int(), pixels(tmp_path / "64" / name).int()
        assert (a - b).abs().max() <= 1


def test_the_run_of_a_prior_brings_its_tokenizer(tokenizer: str, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "prior" / "tokenizer")
    reconstruct(config(str(tmp_path / "prior"), tmp_path / "out", photos / "a.png"))
    assert files(tmp_path / "out") == ["a.png"]


def test_a_damaged_image_is_left_out_with_a_warning(
    tokenizer: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = photos / "b.png"
    damaged.write_bytes((photos / "a.png").read_bytes()[:600])
    reconstruct(config(tokenizer, tmp_path / "out", photos))
    assert files(tmp_path / "out") == ["a.png", "sub/a.png", "turned.png"]
    assert str(damaged) in caplog.text
    assert "1 left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="can be read"):
        reconstruct(config(tokenizer, tmp_path / "none", damaged))
    assert not (tmp_path / "none").exists()


def test_errors_come_before_anything_is_written(tokenizer: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_flat(photos / "sub" / "a.jpg")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[Path, ...], dict[str, object], str]] = [
        ((), {}, "no images"),
        ((tmp_path / "empty",), {}, "no images in"),
        ((photos / "x.png",), {}, r"x\.png: no such file"),
        ((photos / "notes.txt",), {}, "is not an image"),
        ((photos,), {}, r"a\.jpg .*a\.tif .*sub/a\.png"),
        ((photos / "a.png", photos / "sub" / "a.jpg"), {}, r"a\.png"),
        ((photos / "a.png",), {"tile": 15}, "14 or 16"),
        ((photos / "a.png",), {"overlap": 4}, "--tile"),
        ((photos / "a.png",), {"batch_size": 0}, "--batch-size"),
        ((photos / "a.png",), {"sheet": photos / "a.png"}, "exists"),
        ((photos / "a.png",), {"sheet": tmp_path / "sheet"}, r"\.png"),
    ]
    for images, changes, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            reconstruct(config(tokenizer, out, *images, **changes))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        reconstruct(config(str(tmp_path / "nowhere"), out, photos / "a.png"))
    assert not out.exists()
    with pytest.raises(FileExistsError, match="--out"):
        reconstruct(config(tokenizer, photos, photos / "a.png"))


def test_psnr() -> None:
    image = torch.full((3, 300, 4), 100, dtype=torch.uint8)
    assert image_psnr(image, image) == float("inf")
    assert image_psnr(image, image + 1) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
    other = image.clone()
    other[0, 299, 3] = 160  # of the last rows
    assert image_psnr(image, other) == pytest.approx(10 * np.log10(255**2 * 3600 / 60**2))
