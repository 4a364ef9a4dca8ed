import copy
import math

import pytest
import torch
import torch.nn.functional as F

from regvq_fast.data.loading import collate
from regvq_fast.scenes import ScenesDataset
from regvq_fast.scenes.judges import RegionClassifier, region_accuracy
from regvq_fast.scenes.regions import region_statistics


@pytest.fixture(scope="module")
def validation():
    scenes = ScenesDataset("val", 64, length=160)
    return collate([scenes[k] for k in range(160)])


def test_real_images_agree_with_their_maps(classifier, validation) -> None:
    found = region_accuracy(classifier, validation["image"], validation["segmentation"])
    assert found.accuracy > 0.8
    assert found.per_class.shape == (16,)
    assert found.confusion.sum() > 250
    assert float(found.confusion.trace() / found.confusion.sum()) == pytest.approx(found.accuracy)


def test_blurred_images_still_show_what_they_show(classifier, validation) -> None:
    halved = F.avg_pool2d(validation["image"].float(), 2)
    blurred = F.interpolate(halved, scale_factor=2, mode="bilinear").round().to(torch.uint8)
    assert region_accuracy(classifier, blurred, validation["segmentation"]).accuracy > 0.75


def test_other_images_do_not_agree(classifier, validation) -> None:
    """Maps of other scenes, and images of nothing, are no better than chance, 1/16."""
    exchanged = region_accuracy(classifier, validation["image"], validation["segmentation"].roll(1, dims=0))
    assert exchanged.accuracy < 0.2
    grey = region_accuracy(classifier, torch.full_like(validation["image"], 128), validation["segmentation"])
    assert grey.accuracy < 0.2


def test_confusions_of_parts_add_up(classifier, validation) -> None:
    images, maps = validation["image"], validation["segmentation"]
    whole = classifier.confusion(images, maps)
    assert whole.shape == (16, 16)
    assert torch.equal(whole, classifier.confusion(images[:7], maps[:7]) + classifier.confusion(images[7:], maps[7:]))


def test_fitting_is_deterministic_and_state_is_whole(classifier) -> None:
    scenes = ScenesDataset("train", 64)
    counted: list[tuple[int, int]] = []
    progress = (None, lambda *done: counted.append(done))
    a, b = (RegionClassifier.fit(scenes, samples=90, progress=each).state_dict() for each in progress)
    assert counted == [(32, 90), (64, 90), (90, 90)]
    assert all(torch.equal(a[name], b[name]) for name in a)
    restored = RegionClassifier(16, *classifier.centers.shape)
    restored.load_state_dict(copy.deepcopy(classifier.state_dict()))
    batch = collate([scenes[k] for k in range(500, 510)])
    confusions = [each.confusion(batch["image"], batch["segmentation"]) for each in (restored, classifier)]
    assert torch.equal(*confusions)


def test_what_a_tokenizer_makes_of_images_can_be_learned(validation) -> None:
    """Here one that knows no colours and shows everything upside down in brightness."""

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return 255 - images[:, 1:2].expand(-1, 3, -1, -1)

    scenes = ScenesDataset("train", 64)
    images, maps = reconstruct(validation["image"]), validation["segmentation"]
    plain, adapted = (RegionClassifier.fit(scenes, samples=128, reconstruct=r) for r in (None, reconstruct))
    assert region_accuracy(plain, images, maps).accuracy < 0.4
    assert region_accuracy(adapted, images, maps).accuracy > 0.6
    assert region_accuracy(adapted, validation["image"], maps).accuracy > 0.75


def half_and_half(left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of two greys, and its map with the classes 3 and 1."""
    image = torch.full((1, 3, 32, 32), left, dtype=torch.uint8)
    image[..., 16:] = right
    maps = torch.full((1, 32, 32), 3, dtype=torch.uint8)
    maps[..., 16:] = 1
    return image, maps


def test_statistics_are_of_the_region_alone() -> None:
    first = region_statistics(*half_and_half(51, 204), 16)
    other = region_statistics(*half_and_half(51, 0), 16)
    assert first.labels.tolist() == [1, 3]  # by class
    assert first.values[:, 0].tolist() == pytest.approx([0.8, 0.2], abs=1e-5)  # mean luminance
    luminance_to_correlation = slice(0, 9)
    torch.testing.assert_close(first.values[1, luminance_to_correlation], other.values[1, luminance_to_correlation])
    assert first.values.isfinite().all()


def test_slivers_are_no_regions() -> None:
    image, maps = half_and_half(10, 20)
    maps[0, 0, :7] = 5  # 7 of 1024 pixels; 8 are 1/128
    assert region_statistics(image, maps, 16).labels.tolist() == [1, 3]
    maps[0, 0, 7] = 5
    assert region_statistics(image, maps, 16).labels.tolist() == [1, 3, 5]
    assert region_statistics(image, maps, 16).values.isfinite().all()


def test_nothing_to_judge_is_nan(classifier) -> None:
    found = region_accuracy(classifier, torch.empty(0, 3, 64, 64).byte(), torch.empty(0, 64, 64).byte())
    assert math.isnan(found.accuracy)
    assert found.per_class.isnan().all()


def test_what_is_no_image_or_map_is_refused(classifier) -> None:
    image, maps = half_and_half(1, 2)
    with pytest.raises(TypeError, match=r"uint8.* torch\.float32 and torch\.uint8"):
        region_accuracy(classifier, image.float(), maps)
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) and \(1, 16, 32\)"):
        region_accuracy(classifier, image, maps[:, :16])
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) and \(2, 32, 32\)"):
        region_accuracy(classifier, image, maps.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"class 16\b"):
        region_accuracy(classifier, image, maps + 13)
    with pytest.raises(ValueError, match=r"\[.*\].* \b2 samples"):
        RegionClassifier.fit(ScenesDataset("train", 32), samples=2)
