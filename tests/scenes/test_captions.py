import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.data.loading import collate
from regvq_fast.scenes import CLASSES, ScenesDataset
from regvq_fast.scenes.captions import caption_accuracy, read_captions
from regvq_fast.scenes.judges import RegionClassifier
from regvq_fast.scenes.layouts import LAYOUTS, PHOTOGRAPHS, Region, parse_caption, region_map


@pytest.fixture(scope="module")
def validation() -> tuple[Tensor, list[str]]:
    scenes = ScenesDataset("val", 64, length=96)
    batch = collate([scenes[k] for k in range(96)])
    return batch["image"], batch["caption"]


def test_real_images_show_what_their_captions_say(classifier, validation) -> None:
    images, captions = validation
    found = caption_accuracy(classifier, images, captions)
    assert found.layout > 0.6
    assert found.classes > 0.8
    assert 0.45 < found.both < found.layout
    assert found.per_layout.keys() == LAYOUTS.keys()


def test_blurred_images_still_show_what_they_show(classifier, validation) -> None:
    images, captions = (part[:48] for part in validation)
    blurred = F.interpolate(F.avg_pool2d(images.float(), 2), scale_factor=2, mode="bilinear").round().to(torch.uint8)
    found = caption_accuracy(classifier, blurred, captions)
    assert found.layout > 0.5
    assert found.classes > 0.7


def test_other_images_do_not(classifier, validation) -> None:
    """Images of other captions, and of nothing; the layout "whole" alone is a quarter of the captions."""
    images, captions = (part[:48] for part in validation)
    exchanged = caption_accuracy(classifier, images.roll(1, dims=0), captions)
    grey = caption_accuracy(classifier, torch.full_like(images, 128), captions)
    for found in (exchanged, grey):
        assert found.layout < 0.3
        assert found.classes < 0.2
        assert found.both < 0.05


def test_classes_count_one_by_one_and_by_place(classifier, validation) -> None:
    """Captions made of what is read from the images, then falsified."""
    images = validation[0][:24]
    read = read_captions(classifier, images)
    assert caption_accuracy(classifier, images, read).scalars() == {
        "layout": 1.0,
        "classes": 1.0,
        "both": 1.0,
    } | {f"layout of {name}": 1.0 for name in LAYOUTS if any(parse_caption(each).layout == name for each in read)}

    k = next(k for k, caption in enumerate(read) if parse_caption(caption).layout == "quarters")
    first, second, *others = (PHOTOGRAPHS[label].phrase for label in parse_caption(read[k]).classes)
    exchanged = LAYOUTS["quarters"].caption.format(second, first, *others)
    found = caption_accuracy(classifier, images[k : k + 1], [exchanged])
    assert (found.layout, found.classes, found.both) == (1.0, 0.5, 0.0)


def test_a_wrong_layout_is_counted_for_the_caption_s_layout(classifier, validation) -> None:
    images, captions = validation
    k = next(k for k, caption in enumerate(captions) if parse_caption(caption).layout == "quarters")
    found = caption_accuracy(classifier, images[k : k + 1], ["a cat at the top and bricks at the bottom"])
    assert found.per_layout == {"top-bottom": 0.0}


def test_images_are_judged_one_by_one(classifier, validation) -> None:
    images = validation[0][:40]  # more than are read at a time
    parts = read_captions(classifier, images[:7]) + read_captions(classifier, images[7:])
    assert read_captions(classifier, images) == parts


def test_small_images_can_be_judged() -> None:
    scenes = ScenesDataset("train", 16)
    classifier = RegionClassifier.fit(scenes, samples=192)
    batch = collate([scenes[k] for k in range(1000, 1048)])
    found = caption_accuracy(classifier, batch["image"], batch["caption"])
    assert found.layout > 0.3
    assert found.classes > 0.3


def test_nothing_to_judge_is_nan(classifier) -> None:
    found = caption_accuracy(classifier, torch.empty(0, 3, 64, 64).byte(), [])
    assert all(math.isnan(share) for share in (found.layout, found.classes, found.both))
    assert found.per_layout == {}


def test_every_caption_is_parsed() -> None:
    rng = random.Random(0)
    for name, layout in LAYOUTS.items():
        count = len(layout.regions(32, rng))
        for _ in range(20):
            classes = tuple(rng.sample(range(len(CLASSES)), count))
            caption = layout.caption.format(*(PHOTOGRAPHS[label].phrase for label in classes))
            assert parse_caption(caption) == (name, classes)


def test_a_pixel_shows_the_last_region_that_takes_half_of_it() -> None:
    coverage = np.array([[0.4, 0.5], [0.6, 1.0]], dtype=np.float32)
    regions = [Region(0, 0, 4, 4), Region(1, 1, 3, 3, coverage), Region(2, 2, 4, 4)]
    expected = [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 2, 2], [0, 0, 2, 2]]
    assert region_map(regions, 4).tolist() == expected


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dog on the left and bricks on the right", "'a dog on the left and bricks on the right'"),
        ("a picture of a cat.", "not a caption"),
        ("a cat", "not a caption"),
        ("a cat in a square on a cat", "'a cat in a square on a cat' .*twice"),
    ],
)
def test_other_sentences_are_refused(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_caption(caption)


def test_what_is_no_image_is_refused(classifier) -> None:
    image, caption = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a picture of a cat"]
    with pytest.raises(ValueError, match=r"\b1 images .*\b2 captions"):
        caption_accuracy(classifier, image, caption * 2)
    with pytest.raises(TypeError, match=r"uint8.* torch\.float32"):
        caption_accuracy(classifier, image.float(), caption)
    with pytest.raises(ValueError, match=r"\b16\b.*\(1, 3, 32, 16\)"):
        caption_accuracy(classifier, image[..., :16], caption)
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        caption_accuracy(classifier, image[..., :8, :8], caption)
    with pytest.raises(ValueError, match=r"\b5 classes.*\b16$"):
        caption_accuracy(RegionClassifier(5, 5, 54), image, caption)
