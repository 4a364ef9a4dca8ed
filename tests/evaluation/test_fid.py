"""Fréchet distances: against torchmetrics and the definition, over any batches, and references that are cached."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.tiny_models import TinyNet, noise_images
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from regvq_fast.data import ImageFolder, write_shards
from regvq_fast.data.datasets import build_dataset
from regvq_fast.evaluation import fid
from regvq_fast.evaluation.fid import (
    FeatureStatistics,
    Moments,
    TooFewImagesWarning,
    describe_data,
    frechet_distance,
    make_reference,
    statistics_of,
)
from regvq_fast.scenes import ScenesDataset


def statistics(features: Tensor, batch: int = 7) -> FeatureStatistics:
    sums = FeatureStatistics.zeros(features.shape[1])
    for part in features.split(batch):
        sums.add(part)
    return sums


def mixed(count: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(count, features, generator=generator) @ mix + 0.3 * seed


# ------------------------------------------------------------------------------------------------------- the distance


def test_by_hand() -> None:
    a, b = statistics(torch.tensor([[0.0], [2.0]])), statistics(torch.tensor([[0.0], [4.0]]))
    assert frechet_distance(a, b) == pytest.approx((1 - 2) ** 2 + (2**0.5 - 8**0.5) ** 2, rel=1e-12)


def test_equals_torchmetrics_on_images() -> None:
    net = TinyNet()
    real, fake = noise_images(40, seed=0), noise_images(33, seed=1, low=60)
    theirs = FrechetInceptionDistance(feature=net)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(statistics_of(real.split(9), net), statistics_of(fake.split(4), net))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert ours > 1


@pytest.mark.parametrize(("count", "features", "tolerance"), [(300, 48, 1e-10), (20, 32, 1e-5)])
def test_equals_the_definition(count: int, features: int, tolerance: float) -> None:
    x, y = (mixed(count + seed, features, seed).double().numpy() for seed in (0, 1))
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c @ d).real  # of singular matrices, its own rounding is the larger one
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooFewImagesWarning)
        ours = frechet_distance(statistics(torch.from_numpy(x)), statistics(torch.from_numpy(y)))
    assert ours == pytest.approx(expected, rel=tolerance)


def test_equal_sets_are_at_no_distance() -> None:
    a, b = statistics(mixed(100, 16, 1)), statistics(mixed(100, 16, 1).flip(0), batch=11)
    assert 0 <= frechet_distance(a, b) < 1e-10


def test_batches_do_not_move_the_sums() -> None:
    features = mixed(101, 32, 2)
    one, other = statistics(features, batch=101), statistics(features, batch=3)
    assert one.count == other.count == 101
    for name in ("mean", "covariance"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.covariance, features.double().T.cov(), rtol=1e-10, atol=1e-12)
    assert frechet_distance(one, statistics(mixed(90, 32, 3))) == pytest.approx(
        frechet_distance(other, statistics(mixed(90, 32, 3), batch=90)), rel=1e-9
    )


def test_few_images_are_told_of_and_too_few_refused() -> None:
    few, enough, single = (statistics(mixed(count, 8, 1)) for count in (8, 9, 1))
    with pytest.warns(TooFewImagesWarning, match=r"\b8 images .*\b9\b"):
        frechet_distance(few, enough)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(enough, enough)
    with pytest.raises(ValueError, match=r"\b2 images.*\b1$"):
        frechet_distance(enough, single)
    with pytest.raises(ValueError, match=r"\b8 and 4\b"):
        frechet_distance(enough, statistics(mixed(9, 4, 1)))


# -------------------------------------------------------------------------------------------------- data sets, cached


def reference_of(net: TinyNet, dataset: object, cache: Path | None, batch_size: int = 4) -> fid.Reference:
    net.seen = 0
    return make_reference(dataset, net, batch_size=batch_size, cache=cache)  # type: ignore[arg-type]


def test_statistics_of_a_data_set_are_computed_once(tmp_path: Path) -> None:
    net, dataset, done = TinyNet(), ScenesDataset("val", 16, length=10), []
    first = make_reference(dataset, net, batch_size=4, cache=tmp_path / "new", progress=done.append)
    assert (net.seen, done, first.statistics.count) == (10, [4, 8, 10], 10)
    again = reference_of(net, dataset, tmp_path / "new", batch_size=3)
    assert net.seen == 0
    assert again.statistics.count == 10
    assert torch.equal(again.statistics.total, first.statistics.total)
    assert torch.equal(again.statistics.products, first.statistics.products)
    images = torch.stack([dataset[k]["image"] for k in range(10)])
    torch.testing.assert_close(again.statistics.covariance, net(images).double().T.cov())
    assert again.distance(statistics_of([images], net)) < 1e-10
    assert not list((tmp_path / "new").glob(".*"))


def test_statistics_of_another_protocol_are_not_used(tmp_path: Path) -> None:
    reference_of(TinyNet(), ScenesDataset("val", 16, length=10), tmp_path)
    others = [
        (TinyNet(seed=1), ScenesDataset("val", 16, length=10)),
        (TinyNet(), ScenesDataset("val", 16, length=11)),
        (TinyNet(), ScenesDataset("val", 24, length=10)),
        (TinyNet(), ScenesDataset("val", 16, length=10, seed=1)),
    ]
    for net, dataset in others:
        assert reference_of(net, dataset, tmp_path).statistics.count == len(dataset) == net.seen
    assert len(list(tmp_path.iterdir())) == 5
    # A file under the name of another's would be found by its hash: what it says of itself decides.
    net, dataset = TinyNet(), ScenesDataset("val", 16, length=10)
    files = sorted(tmp_path.iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    reference_of(net, dataset, tmp_path)
    assert net.seen == 10


def test_damaged_and_unwritable_caches_cost_time_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, dataset = TinyNet(), ScenesDataset("val", 16, length=10)
    expected = reference_of(net, dataset, tmp_path / "cache").statistics
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(reference_of(net, dataset, tmp_path / "cache").statistics.total, expected.total)
    assert "damaged" in caplog.text
    assert net.seen == 10
    reference_of(net, dataset, tmp_path / "cache")
    assert net.seen == 0
    content = file.read_bytes()
    for changed in (
        content[:-4] + bytes([content[-4] ^ 1]) + content[-3:],
        content.replace(b'"unreadable":"0"', b'"unreadable":"7"'),
    ):
        assert changed != content
        file.write_bytes(changed)
        caplog.clear()
        again = reference_of(net, dataset, tmp_path / "cache")
        assert torch.equal(again.statistics.products, expected.products)
        assert (again.unreadable, net.seen) == (0, 10)
        assert f"{file} are damaged (its checksum" in caplog.text
    (tmp_path / "file").write_text("")
    reference_of(net, dataset, tmp_path / "file")
    assert "can't be cached" in caplog.text
    assert net.seen == 10


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for k, image in enumerate(noise_images(4, seed=5, size=20)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / split / f"{k}.png")
    return folder


def test_a_changed_file_is_another_data_set(photos: Path) -> None:
    before = describe_data(ImageFolder(photos, "val", 16))
    assert before["data"] == str(photos)
    assert (before["split"], before["images"], before["image_size"]) == ("val", 4, 16)
    assert before["crop"] == "largest central square"
    assert "Lanczos" in before["resize"]
    assert describe_data(ImageFolder(photos, "val", 16)) == before
    with (photos / "val" / "2.png").open("ab") as file:  # neither the first nor the last
        file.write(b"\0")
    assert describe_data(ImageFolder(photos, "val", 16))["fingerprint"] != before["fingerprint"]


def test_shards_are_known_by_their_files_and_fields(tmp_path: Path) -> None:
    png = BytesIO()
    Image.new("RGB", (20, 20)).save(png, "PNG")
    samples = ({"__key__": f"{k:03d}", "png": png.getvalue(), "txt": "black"} for k in range(40))
    write_shards(samples, str(tmp_path / "val-%03d.tar"))
    plain, captioned = (build_dataset(tmp_path, split="val", image_size=16, fields=f) for f in ((), ("caption",)))
    assert describe_data(plain)["fingerprint"] == describe_data(plain)["fingerprint"]
    assert describe_data(plain)["fingerprint"] != describe_data(captioned)["fingerprint"]


def test_a_folder_is_known_by_its_fields(photos: Path) -> None:
    """Images without a caption are skipped if captions are needed."""
    for file in (photos / "val").iterdir():
        file.with_suffix(".txt").write_text("black")
    plain, captioned = (ImageFolder(photos, "val", 16, fields=fields) for fields in ((), ("caption",)))
    assert describe_data(plain)["fingerprint"] != describe_data(captioned)["fingerprint"]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        make_reference([], TinyNet())  # type: ignore[arg-type]


def test_published_moments_stand_for_statistics() -> None:
    a, b = mixed(60, 5, seed=1), mixed(50, 5, seed=2)
    published = Moments(a.double().mean(0), a.T.double().cov())
    expected = frechet_distance(statistics(a), statistics(b))
    assert frechet_distance(statistics(b), published) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="5 and 4 features"):
        frechet_distance(published, statistics(b[:, :4]))
    with pytest.warns(TooFewImagesWarning, match="4 images"):
        frechet_distance(published, statistics(b[:4]))
