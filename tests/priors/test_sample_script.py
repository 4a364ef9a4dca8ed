"""train/sample.py on runs of the priors: maps, captions, edits, and what cannot be sampled."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import run_script
from PIL import Image


def sample(*flags: object) -> None:
    run_script(*flags, "--device", "cpu", script="sample.py")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_images_under_their_semantic_maps(runs: dict[str, Path], tmp_path: Path) -> None:
    sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path / "a", "--num-images", 6, "--batch-size", 2)
    sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path / "b", "--num-images", 6, "--guidance", 1.0)
    names = ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "00005.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:  # in batches of two as in one of six; convolutions round a batch of one otherwise
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))
    assert pixels(tmp_path / "a" / "00000.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "a" / "grid.png").shape[0] >= 8 + 2 * 128 + 2 + 8 + 20, "a legend is below"
    assert not np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "a" / "00001.png"))


def test_a_map_of_a_file_and_an_edited_image(runs: dict[str, Path], tmp_path: Path) -> None:
    ids = np.zeros((48, 48), dtype=np.uint8)
    ids[:, 24:] = 7
    Image.fromarray(ids).save(tmp_path / "map.png")
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    mask = np.zeros((40, 40), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "nothing.png")
    flags = ["--prior", "ar", "--run", runs["ar"], "--map", tmp_path / "map.png", "--num-images", 2]
    edit = ["--edit", tmp_path / "photo.png", "--mask", tmp_path / "nothing.png"]
    sample(*flags, *edit, "--out", tmp_path / "kept", "--top-k", 4, "--top-p", 0.9, "--temperature", 0.7)
    first, second = (pixels(tmp_path / "kept" / f"0000{k}.png") for k in range(2))
    assert np.array_equal(first, second)  # the whole image is kept
    mask[:20] = 255
    Image.fromarray(mask).save(tmp_path / "half.png")
    sample(*flags, *edit[:2], "--mask", tmp_path / "half.png", "--out", tmp_path / "half")
    first, second = (pixels(tmp_path / "half" / f"0000{k}.png") for k in range(2))
    assert not np.array_equal(first, second)


def test_images_of_captions_with_their_states(runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--run", runs["diffusion"], "--num-images", 3, "--steps", 4]
    sample(*flags, "--text", "a cat", "bricks", "--strip", "--guidance", 2, "--out", tmp_path / "said")
    assert (tmp_path / "said" / "strip.png").exists()
    assert len(list((tmp_path / "said").glob("0*.png"))) == 3
    sample(*flags, "--out", tmp_path / "validation")
    assert len(list((tmp_path / "validation").glob("0*.png"))) == 3


def test_images_grow_beyond_the_grid(runs: dict[str, Path], tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    flags = ["--run", runs["diffusion"], "--num-images", 2, "--steps", 2, "--text", "a cat"]
    sample(*flags, "--extend", "right", "down", "--edit", tmp_path / "photo.png", "--out", tmp_path / "out")
    first, second = (pixels(tmp_path / "out" / f"0000{k}.png") for k in range(2))
    assert first.shape == (48, 48, 3)
    assert not np.array_equal(first, second)

    ids = np.zeros((60, 90), dtype=np.uint8)
    ids[:, 30:] = 7
    Image.fromarray(ids).save(tmp_path / "map.png")
    flags = ["--run", runs["ar"], "--map", tmp_path / "map.png", "--num-images", 1, "--extend", "right"]
    sample(*flags, "--out", tmp_path / "wide")
    assert pixels(tmp_path / "wide" / "00000.png").shape == (32, 48, 3)
    assert pixels(tmp_path / "wide" / "grid.png").shape[1] >= 144


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{ar}", "--extend", "right"], "--extend .*--map"),
        (["--run", "{ar}", "--label", "cat"], "--label .*segmentation"),
        (["--run", "{diffusion}", "--per-class", "2"], "--per-class .*caption"),
        (["--run", "{diffusion}", "--strip", "--extend", "up"], "--strip .*--extend"),
        (["--run", "{diffusion}", "--mask", "ids.png"], "--mask .*--edit"),
        (["--prior", "ar", "--run", "{ar}", "--text", "a cat"], "--text .*segmentation"),
        (["--run", "{ar}", "--strip"], "--strip .*autoregressive"),
        (["--run", "{diffusion}", "--map", "map.png"], "--map .*caption"),
        (["--prior", "diffusion", "--run", "{ar}"], "TokenTransformer.* VQDiffusion"),
        (["--prior", "ar", "--run", "nothing"], "nothing"),
        (["--prior", "ar", "--run", "{ar}", "--num-images", "0"], r"--num-images .*\b0$"),
        (["--prior", "ar", "--run", "{ar}", "--edit", "photo.png"], "--edit .*--mask"),
        (["--prior", "ar", "--run", "{ar}", "--map", "ids.png"], r"ids\.png .*\b16\b"),
        (
            ["--prior", "ar", "--run", "{ar}", "--map", "small.png"],
            r"--map small\.png .*2 x 2 .*\b8\b",
        ),
        (["--prior", "ar", "--run", "{ar}", "--map", "colours.png"], "class id"),
        (["--prior", "ar", "--run", "{ar}", "--map", "text.png"], r"text\.png"),
        (
            ["--prior", "ar", "--run", "{ar}", "--seed", str(2**63)],
            f"--seed .*{2**63}",
        ),
        (["--prior", "ar", "--run", "{ar}", "--top-p", "0"], "top_p"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--steps", "1000"], "steps"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--text", " "], "empty"),
        (["--prior", "diffusion", "--run", "{diffusion}", "--text", "a cat " * 40], "80 words"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 16, dtype=np.uint8)).save("ids.png")
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save("small.png")
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save("colours.png")
    Path("text.png").write_text("no image")
    with pytest.raises(SystemExit, match=message):
        sample(*(flag.format(**runs) for flag in flags), "--out", "samples")
    assert not Path("samples").exists()


def test_guidance_needs_a_null_condition_that_was_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["ar"], run)
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["condition_dropout"] > 0
    config["model"]["condition_dropout"] = 0.0
    (run / "config.json").write_text(json.dumps(config))
    flags = ["--prior", "ar", "--run", run, "--num-images", 1]
    with pytest.raises(SystemExit, match=r"--guidance 2 .*null condition"):
        sample(*flags, "--guidance", 2, "--out", tmp_path / "guided")
    sample(*flags, "--out", tmp_path / "plain")


def test_conditions_are_of_the_cache_that_the_prior_was_trained_on(
    runs: dict[str, Path], tokenizer: Path, cache: Path, tmp_path: Path
) -> None:
    """Another one may have taken its place: with other fields, or of another tokenizer."""
    run, remade = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(runs["ar"], run)
    config = json.loads((run / "config.json").read_text())
    config["tokens"]["cache"] = str(remade)
    (run / "config.json").write_text(json.dumps(config))
    flags = ["--run", run, "--num-images", 1, "--out", tmp_path / "samples"]
    with pytest.raises(SystemExit, match=rf"{remade} .*{run} .*--data, .*--map"):
        sample(*flags)
    made = ["--scenes", 4, "--views", 1, "--val-images", 2, "--fields", "caption", "--device", "cpu"]
    run_script("--tokenizer", tokenizer, "--out", remade, *made, script="cache_tokens.py")
    with pytest.raises(SystemExit, match=rf"{remade} .*{run} .*segmentation"):
        sample(*flags)
    shutil.rmtree(remade)
    shutil.copytree(cache, remade)
    info = json.loads((remade / "cache.json").read_text())
    (remade / "cache.json").write_text(json.dumps(info | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(SystemExit, match=rf"{remade} .*000000000000"):
        sample(*flags)
    assert not (tmp_path / "samples").exists()


def test_samples_are_not_mixed_with_others(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(SystemExit, match="empty folder"):
        sample("--prior", "ar", "--run", runs["ar"], "--out", tmp_path)
