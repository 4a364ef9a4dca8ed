"""The logic of the demo page: reconstructions and their codes, sampling under maps and captions, checks of requests."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.demo_server import save_tiny_models
from helpers.tiny_models import scenes_batch, tiny_tokenizer, tiny_vqgan

from regvq_fast.data.transforms import to_float
from regvq_fast.demo.workbench import MAX_IMAGES, Painter, Reconstructor, Request
from regvq_fast.precision import choose_precision
from regvq_fast.priors.conditions import no_conditions
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import SamplingConfig
from regvq_fast.scenes import CLASSES, embedded

CPU = choose_precision(False, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded models of a few weights."""
    folder = tmp_path_factory.mktemp("embedded")
    save_tiny_models(folder)
    return folder


@pytest.fixture
def painters(models: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Painter]:
    """The priors of the embedded models."""
    monkeypatch.setattr(embedded, "FOLDER", models)
    return {name: Painter(models / name, CPU) for name in ("ar", "diffusion")}


def test_reconstruction_and_codes() -> None:
    tokenizer = tiny_tokenizer()
    pixels = scenes_batch(1)["image"][0]
    shown = Reconstructor(tokenizer, CPU).reconstruct(pixels)
    tokens = tokenizer.tokenize(to_float(pixels[None]))[0]
    assert shown.used == len(tokens.unique()) > 3
    assert {code.code: code.positions for code in shown.codes} == {
        int(code): int((tokens == code).sum()) for code in tokens.unique()
    }
    assert [code.positions for code in shown.codes] == sorted((code.positions for code in shown.codes), reverse=True)
    assert all(code.patch.shape == (3, 2, 2) for code in shown.codes)
    error = (shown.reconstruction.double() - pixels.double()).square().mean().item()
    assert shown.psnr == pytest.approx(20 * math.log10(255) - 10 * math.log10(error))
    assert shown.reconstruction.shape == shown.image.shape == (3, 16, 16)


def test_equal_tokens_have_equal_colors_and_others_do_not() -> None:
    tokenizer = tiny_tokenizer()
    pixels = scenes_batch(1)["image"][0]
    colors = Reconstructor(tokenizer, CPU).reconstruct(pixels).token_map.flatten(1).T.tolist()
    tokens = tokenizer.tokenize(to_float(pixels[None])).flatten().tolist()
    assert len({(token, *color) for token, color in zip(tokens, colors, strict=True)}) == len(set(tokens))
    assert len(set(map(tuple, colors))) == len(set(tokens))


def test_an_image_is_shown_at_most_48_codes() -> None:
    tokenizer = tiny_tokenizer(num_codes=256)
    noise = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shown = Reconstructor(tokenizer, CPU).reconstruct(noise)
    assert len(shown.codes) == min(48, shown.used)


def test_only_rgb() -> None:
    with pytest.raises(ValueError, match="1 channels"):
        Reconstructor(tiny_vqgan(in_channels=1), CPU)


def test_embedded_priors_share_the_tokenizer_beside_them(models: Path) -> None:
    sampler = ImageSampler.from_run(models / "ar", SamplingConfig(), CPU)
    assert sampler.tokenizer.quantize.num_codes == 32


def test_embedded_models_are_found_by_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FOLDER", models)
    assert embedded.embedded_model("diffusion") == models / "diffusion"
    with pytest.raises(ValueError, match="vae"):
        embedded.embedded_model("vae")
    monkeypatch.setattr(embedded, "FOLDER", models / "nowhere")
    with pytest.raises(FileNotFoundError, match="regvq train ar"):
        embedded.embedded_model("ar")


def test_a_map_is_sampled_as_by_the_command(painters: dict[str, Painter], models: Path) -> None:
    painter = painters["ar"]
    assert painter.class_names == list(CLASSES)
    ids = painter.examples(3)[2]
    assert ids.shape == (painter.map_side,) * 2
    condition = painter.map_of(bytes(ids.flatten().tolist()).hex())
    assert torch.equal(condition[0], ids)
    steps: list[tuple[int, int]] = []
    request = Request(count=2, seed=5, temperature=0.7, top_p=0.9, guidance=2.0)
    images = painter.sample(condition, request, lambda *step: steps.append(step))
    assert images.shape == (2, 3, 16, 16)
    assert steps[-1] == (64, 64)
    config = SamplingConfig(seed=5, temperature=0.7, top_p=0.9, guidance=2.0)
    expected = ImageSampler.from_run(models / "ar", config, CPU).sample_under(condition.expand(2, -1, -1), 0)
    assert torch.equal(images, expected)


def test_a_caption_is_sampled_as_by_the_command(painters: dict[str, Painter], models: Path) -> None:
    painter = painters["diffusion"]
    caption = painter.caption_of("  a cat\non the left  and bricks on the right ")
    assert caption == "a cat on the left and bricks on the right"
    images = painter.sample(caption, Request(count=3, seed=7, steps=4))
    config = SamplingConfig(seed=7, steps=4)
    expected = ImageSampler.from_run(models / "diffusion", config, CPU).sample_under([caption] * 3, 0)
    assert torch.equal(images, expected)


def test_a_label_and_nothing_are_sampled_as_by_the_command(models: Path) -> None:
    painter = Painter(models / "label", CPU)
    images = painter.sample(painter.read("red fox"), Request(count=2, seed=7, steps=3, guidance=1.5))
    sampler = ImageSampler.from_run(models / "label", SamplingConfig(seed=7, steps=3, guidance=1.5), CPU)
    assert torch.equal(images, sampler.sample_under(torch.tensor([1, 1]), 0))
    with pytest.raises(ValueError, match=r"'fox' .*'red fox'"):
        painter.sample(painter.read("fox"), Request())

    painter = Painter(models / "none", CPU)
    images = painter.sample(painter.read(None), Request(count=3, seed=7))
    sampler = ImageSampler.from_run(models / "none", SamplingConfig(seed=7), CPU)
    assert torch.equal(images, sampler.sample_under(no_conditions(3), 0))
    assert not painter.guided


def test_words_outside_the_training_captions_are_named(painters: dict[str, Painter]) -> None:
    painter = painters["diffusion"]
    assert painter.unknown_words("A dragon over Paris, a dragon") == ["dragon", "over", "paris"]
    assert all(painter.unknown_words(caption) == [] for caption in painter.examples(50))


def test_nothing_is_known_of_a_prior_elsewhere(models: Path) -> None:
    ar, diffusion = Painter(models / "ar", CPU), Painter(models / "diffusion", CPU)
    assert ar.class_names[15] == "class 15"
    assert ar.examples(3) == diffusion.examples(3) == []
    assert diffusion.unknown_words("a dragon") == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("00" * 64 * 63, "can't be read"),
        ("zz" * 64 * 64, "can't be read"),
        (None, "can't be read"),
        ({"path": "/etc/passwd"}, "can't be read"),
        ("10" * 64 * 64, "class 16"),
    ],
)
def test_maps_that_are_none(painters: dict[str, Painter], text: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        painters["ar"].map_of(text)


@pytest.mark.parametrize(("text", "word"), [("  ", "No caption"), (None, "No caption"), ("x" * 501, "501 characters")])
def test_captions_that_are_none(painters: dict[str, Painter], text: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        painters["diffusion"].caption_of(text)


def test_too_many_words(painters: dict[str, Painter]) -> None:
    with pytest.raises(ValueError, match="25 words"):
        painters["diffusion"].sample("a " * 25, Request())


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        ("count", [0, MAX_IMAGES + 1, "4", None, True], "number of images"),
        ("seed", [-1, 2**60, float("nan")], "seed"),
        ("temperature", [float("inf"), [1]], "temperature"),
        ("guidance", [-0.5], "guidance"),
        ("top_p", [None], "top-p"),
        ("steps", [0, "all"], "[Ss]teps"),
    ],
)
def test_settings_that_a_page_may_not_send(name: str, values: list[Any], word: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=word):
            Request.of(**{name: value})


def test_settings_out_of_the_priors_range(painters: dict[str, Painter]) -> None:
    with pytest.raises(ValueError, match="top_p"):
        painters["ar"].sample(painters["ar"].map_of("00" * 64 * 64), Request(top_p=0.0))
    with pytest.raises(ValueError, match="steps"):
        painters["diffusion"].sample("a cat", Request(steps=7))
