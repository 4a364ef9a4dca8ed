"""``regvq encode`` and ``regvq decode``: a file of tokens, and back."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flat_images import write_flat
from helpers.tiny_models import tiny_tokenizer
from PIL import Image

from regvq_fast.cli.decode import DecodeConfig, decode
from regvq_fast.cli.encode import EncodeConfig, encode
from regvq_fast.cli.main import run
from regvq_fast.cli.reconstruct import ReconstructConfig, reconstruct
from regvq_fast.data import EncodedImages
from regvq_fast.data.tiles import tokenize_images
from regvq_fast.image_grids import save_image
from regvq_fast.models import weights_hash


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    noise = Image.effect_noise((40, 31), 90).convert("RGB")
    for name, size in (("a.png", (40, 31)), ("b.png", (40, 31)), ("sub/a.bmp", (16, 16)), ("sub/é.png", (1, 9))):
        noise.resize(size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def encoded(tokenizer: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "photos.npz"
    run("encode", ["--run", tokenizer, str(photos), "--out", str(out), "--device", "cpu"])
    return out


def test_a_file_has_names_tokens_and_sizes(encoded: Path, photos: Path, tokenizer: str) -> None:
    with np.load(encoded, allow_pickle=False) as file:
        assert file["names"].tolist() == ["a.png", "b.png", "sub/a.bmp", "sub/é.png"]
        assert file["shapes"].tolist() == [[16, 20], [16, 20], [8, 8], [5, 1]]
        assert file["sizes"].tolist() == [[31, 40], [31, 40], [16, 16], [9, 1]]
        assert file["tokens"].dtype == np.uint16
        third = file["tokens"][2 * 16 * 20 :][:64].reshape(8, 8)
        assert (str(file["tokenizer"]), int(file["num_codes"]), int(file["downsampling_factor"])) == (
            weights_hash(tiny_tokenizer()),
            32,
            2,
        )
    with Image.open(photos / "sub" / "a.bmp") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    assert np.array_equal(third, tiny_tokenizer().tokenize(pixels)[0].numpy())
    assert len(np.unique(third)) > 4


def test_decoding_gives_the_reconstructions(encoded: Path, photos: Path, tokenizer: str, tmp_path: Path) -> None:
    run("decode", ["--run", tokenizer, str(encoded), "--out", str(tmp_path / "decoded"), "--device", "cpu"])
    reconstruct(ReconstructConfig(run=tokenizer, images=(photos,), out=tmp_path / "reconstructed", device="cpu"))
    names = sorted(path.relative_to(tmp_path / "decoded") for path in (tmp_path / "decoded").rglob("*.png"))
    assert [str(name) for name in names] == ["a.png", "b.png", "sub/a.png", "sub/é.png"]
    for name in names:
        assert (tmp_path / "decoded" / name).read_bytes() == (tmp_path / "reconstructed" / name).read_bytes()


@pytest.mark.parametrize("name", ["decode", "reconstruct"])
def test_a_folder_removed_between_two_images_is_an_error(
    name: str, encoded: Path, photos: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = import_module(f"regvq_fast.cli.{name}"), tmp_path / "out"

    def save_and_remove(path: Path, image: torch.Tensor) -> None:
        save_image(path, image)
        if path.name == "a.png":
            shutil.rmtree(out)

    monkeypatch.setattr(module, "save_image", save_and_remove)
    source = encoded if name == "decode" else photos
    with pytest.raises(SystemExit, match=f"^error: --out {out} was removed"):
        run(name, ["--run", tokenizer, str(source), "--out", str(out), "--device", "cpu"])


def test_a_file_that_appears_meanwhile_is_kept(
    photos: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with one --out both found no file, and the second replaced that of the first."""
    module, out = import_module("regvq_fast.cli.encode"), tmp_path / "x.npz"

    def tokenize(*arguments: Any) -> torch.Tensor:
        out.write_text("of another process")
        return tokenize_images(*arguments)

    monkeypatch.setattr(module, "tokenize_images", tokenize)
    with pytest.raises(SystemExit, match=f"^error: --out {out} exists; name a new file"):
        run("encode", ["--run", tokenizer, str(photos), "--out", str(out), "--device", "cpu"])
    assert out.read_text() == "of another process"


def test_square_images_have_the_tokenizers_size(tokenizer: str, photos: Path, tmp_path: Path) -> None:
    config = EncodeConfig(run=tokenizer, images=(photos,), out=tmp_path / "x.npz", device="cpu", square=True)
    found = encode(config)
    assert {tuple(tokens.shape) for tokens in found.tokens} == {(8, 8)}
    assert set(found.sizes) == {(16, 16)}


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    given = EncodedImages(
        ["b", "sub/a"], [torch.tensor([[70000, 1]]), torch.tensor([[2]])], [(3, 8), (4, 1)], "f0", 70001, 4
    )
    given.save(tmp_path / "x.npz")
    read = EncodedImages.load(tmp_path / "x.npz")
    assert [tokens.tolist() for tokens in read.tokens] == [[[70000, 1]], [[2]]]
    assert all(tokens.dtype == torch.int64 for tokens in read.tokens)
    assert (read.names, read.sizes) == (given.names, given.sizes)
    assert (read.tokenizer, read.num_codes, read.downsampling_factor) == ("f0", 70001, 4)


def test_encode_refuses_before_it_reads_a_tokenizer(photos: Path, tmp_path: Path) -> None:
    def refused(out: Path, *images: Path) -> EncodeConfig:
        return EncodeConfig(run="nowhere", images=images, out=out, device="cpu")

    (tmp_path / "there.npz").touch()
    with pytest.raises(FileExistsError, match=r"there\.npz"):
        encode(refused(tmp_path / "there.npz", photos))
    with pytest.raises(ValueError, match=r"\.npz"):
        encode(refused(tmp_path / "tokens.pt", photos))
    write_flat(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg .*a\.png"):
        encode(refused(tmp_path / "x.npz", tmp_path / "a.jpg", photos / "a.png"))


def changed(encoded: Path, path: Path, **arrays: Any) -> Path:
    """A copy of a file in which some arrays are others; None leaves one out."""
    with np.load(encoded) as file:
        kept = {name: file[name] for name in file}
    np.savez(path, **{name: value for name, value in (kept | arrays).items() if value is not None})
    return path


def test_decode_refuses_what_is_not_of_this_tokenizer(encoded: Path, tokenizer: str, tmp_path: Path) -> None:
    def decoded(path: Path, run: str = tokenizer) -> None:
        decode(DecodeConfig(run=run, tokens=path, out=tmp_path / "out", device="cpu"))

    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"photos\.npz .*another tokenizer"):
        decoded(encoded, str(tmp_path / "other"))
    with np.load(encoded) as file:
        tokens, names = file["tokens"], file["names"].tolist()
    tokens[3] = 32
    cases: dict[str, dict[str, Any]] = {
        r"\[0, 32\).*a\.png": {"tokens": tokens},
        "states.*33": {"num_codes": 33},
        "damaged": {"tokens": tokens[:-1]},
        "not a file of regvq encode.*shapes": {"shapes": None},
        r"\.\./b": {"names": ["a.png", "../b.png", *names[2:]]},
        "/etc": {"names": ["a.png", "/etc/b.png", *names[2:]]},
        r"two images.*a\.png": {"names": ["a.png", "a.jpg", *names[2:]]},
        "token maps": {"names": names[1:]},
        r"31 x 44": {"sizes": [[31, 44], [31, 40], [16, 16], [9, 1]]},
    }
    for number, (message, arrays) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            decoded(changed(encoded, tmp_path / f"{number}.npz", **arrays))
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        decoded(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no tokens")
    cut = tmp_path / "cut.npz"
    shutil.copy(encoded, cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    for path in (tmp_path / "text.npz", cut):
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            decoded(path)
    assert not (tmp_path / "out").exists()
