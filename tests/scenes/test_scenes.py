import re

import numpy as np
import pytest
import torch
from PIL import Image

from regvq_fast.scenes import CLASSES, ScenesDataset
from regvq_fast.scenes import dataset as scenes_module
from regvq_fast.scenes.layouts import LAYOUTS, PHOTOGRAPHS, Photograph

PHRASES = {photograph.phrase: label for label, photograph in enumerate(PHOTOGRAPHS)}

# What each caption promises: for each slot, a point (y, x) of the unit square that always belongs to it. The middle of
# the scene is the inset's wherever the inset lies, and the corner is the background's.
SENTENCES = {
    "a picture of {0}": [(0.5, 0.5)],
    "{0} on the left and {1} on the right": [(0.5, 0.1), (0.5, 0.9)],
    "{0} at the top and {1} at the bottom": [(0.1, 0.5), (0.9, 0.5)],
    "{0} on the left, {1} in the middle and {2} on the right": [(0.5, 0.1), (0.5, 0.5), (0.5, 0.9)],
    "{0} at the top, {1} in the middle and {2} at the bottom": [(0.1, 0.5), (0.5, 0.5), (0.9, 0.5)],
    "{0} at the top left, {1} at the top right, {2} at the bottom left and {3} at the bottom right": [
        (0.1, 0.1),
        (0.1, 0.9),
        (0.9, 0.1),
        (0.9, 0.9),
    ],
    "{0} in a square on {1}": [(0.5, 0.5), (0.0, 0.0)],
    "{0} in a circle on {1}": [(0.5, 0.5), (0.0, 0.0)],
    "{0} in the upper left half and {1} in the lower right half": [(0.1, 0.1), (0.9, 0.9)],
    "{0} in the upper right half and {1} in the lower left half": [(0.1, 0.9), (0.9, 0.1)],
}
PATTERNS = {
    sentence: re.sub(r"\\{\d\\}", f"({'|'.join(map(re.escape, PHRASES))})", re.escape(sentence))
    for sentence in SENTENCES
}


def parse(caption: str) -> tuple[str, list[int]]:
    """The sentence of a caption and the class ids in its slots; exactly one reading must exist."""
    matches = {sentence: re.fullmatch(pattern, caption) for sentence, pattern in PATTERNS.items()}
    readings = [
        (sentence, [PHRASES[phrase] for phrase in match.groups()]) for sentence, match in matches.items() if match
    ]
    assert len(readings) == 1, (caption, readings)
    return readings[0]


@pytest.fixture(scope="module")
def samples():
    dataset = ScenesDataset("train", 64)
    return [dataset[index] for index in range(600)]


def test_captions_state_layout_and_classes(samples):
    for sample in samples:
        sentence, classes = parse(sample["caption"])
        assert set(sample["segmentation"].unique().tolist()) == set(classes)
        assert len(set(classes)) == len(classes)
        for (y, x), label in zip(SENTENCES[sentence], classes, strict=True):
            assert sample["segmentation"][int(y * 63), int(x * 63)] == label, (sample["caption"], y, x)


def test_every_layout_and_class_occurs_and_whole_crops_as_often_as_stated(samples):
    parsed = [parse(sample["caption"]) for sample in samples]
    assert {sentence for sentence, _ in parsed} == set(SENTENCES)
    assert len(LAYOUTS) == len(SENTENCES)
    assert {label for _, classes in parsed for label in classes} == set(range(len(CLASSES)))
    expected = scenes_module.WHOLE_PROBABILITY
    whole = np.mean([sentence == "a picture of {0}" for sentence, _ in parsed])
    assert abs(whole - expected) < 4 * (expected * (1 - expected) / len(samples)) ** 0.5


def test_a_circle_is_round_and_holds_its_class(samples):
    for sample in samples:
        sentence, classes = parse(sample["caption"])
        if "circle" in sentence:
            inside = sample["segmentation"] == classes[0]
            rows, columns = inside.any(1).sum().item(), inside.any(0).sum().item()
            assert rows == columns
            assert inside.sum().item() == pytest.approx(np.pi / 4 * rows**2, rel=0.04)


@pytest.mark.parametrize("size", [16, 64, 100, 256])
@pytest.mark.parametrize("split", ["train", "val"])
def test_shapes_types_and_content_at_any_resolution(split, size):
    dataset = ScenesDataset(split, size, length=12)
    assert len(dataset) == 12
    for index in range(12):
        sample = dataset[index]
        assert sample["image"].shape == (3, size, size)
        assert sample["segmentation"].shape == (size, size)
        assert sample["image"].dtype == sample["segmentation"].dtype == torch.uint8
        assert sample["image"].is_contiguous()
        parse(sample["caption"])
    assert sum(dataset[index]["image"].float().std() > 20 for index in range(12)) >= 9  # images, not blanks


def test_deterministic_in_seed_split_and_index():
    first, again = ScenesDataset("train", 32, seed=3), ScenesDataset("train", 32, seed=3)
    for index in (0, 7, 10**12):
        sample, repeated = first[index], again[index]
        assert torch.equal(sample["image"], repeated["image"])
        assert torch.equal(sample["segmentation"], repeated["segmentation"])
        assert sample["caption"] == repeated["caption"]
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert not torch.equal(first[0]["image"], ScenesDataset("train", 32, seed=4)[0]["image"])
    assert parse(first[0]["caption"]) != parse(ScenesDataset("val", 32, seed=3)[0]["caption"])


def test_training_never_ends_and_validation_does():
    assert ScenesDataset("train", 32, length=2)[2]["image"].shape == (3, 32, 32)
    validation = ScenesDataset("val", 32, length=2)
    assert len(list(validation)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=rf"sample {index}\b"):
            validation[index]
    with pytest.raises(IndexError):
        ScenesDataset("train", 32)[-1]


def test_splits_share_no_pixel_of_any_photograph(monkeypatch):
    """With the left two thirds of every photograph painted black and the rest white, no scene may mix the two."""

    def painted():
        for width, height in [photograph.size for photograph in originals]:
            pixels = np.full((height, width, 3), 255, dtype=np.uint8)
            pixels[:, : round(width * 2 / 3)] = 0
            yield Image.fromarray(pixels)

    originals = scenes_module._open_photographs()
    monkeypatch.setattr(scenes_module, "_open_photographs", lambda: list(painted()))
    scenes_module._load_photographs.cache_clear()
    try:
        for split, value in (("train", 0), ("val", 255)):
            for size in (16, 96, 256):
                dataset = ScenesDataset(split, size, length=60)
                assert all((dataset[index]["image"] == value).all() for index in range(60)), (split, size)
    finally:
        scenes_module._load_photographs.cache_clear()


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="'test'"):
        ScenesDataset("test")
    with pytest.raises(ValueError, match=r"\b16\b.*\b8$"):
        ScenesDataset("train", 8)
    with pytest.raises(ValueError, match=r"length .*\b0$"):
        ScenesDataset("val", 32, length=0)


def test_a_missing_photograph_is_named(monkeypatch):
    extra = Photograph("unicorn", "a unicorn", "unicorn.png")
    monkeypatch.setattr(scenes_module, "PHOTOGRAPHS", (*PHOTOGRAPHS, extra))
    with pytest.raises(FileNotFoundError, match=r"unicorn\.png.*reinstall"):
        scenes_module._open_photographs()
