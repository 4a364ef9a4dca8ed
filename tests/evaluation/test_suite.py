"""ADM's evaluation suite: its reference files, and what is measured against them."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.tiny_models import TinyNet
from torch import Tensor

from regvq_fast.evaluation.metrics import open_samples
from regvq_fast.evaluation.sample_metrics import inception_score, precision_and_recall
from regvq_fast.evaluation.suite import ReferenceBatch, evaluate_samples
from regvq_fast.image_grids import save_images


class Inception(TinyNet):
    """Stands for Inception: features, spatial features and a classifier."""

    standard = True
    num_spatial = 4

    @property
    def classifier(self) -> Tensor:
        return self.mix.weight.new_tensor(range(24)).view(3, 8).sin()

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self(images), images[:, 0, :2, :2].flatten(1).float() / 255


def noise(count: int, seed: int, low: int = 0, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def save(path: Path, images: Tensor, **arrays: np.ndarray) -> Path:
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path


def moments(features: Tensor, suffix: str = "") -> dict[str, np.ndarray]:
    rows = features.double().numpy()
    return {f"mu{suffix}": rows.mean(axis=0), f"sigma{suffix}": np.cov(rows, rowvar=False)}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray], suffix: str = "") -> float:
    """As the suite computes it."""
    mu, sigma = f"mu{suffix}", f"sigma{suffix}"
    root = scipy.linalg.sqrtm(a[sigma] @ b[sigma]).real
    return float(np.square(a[mu] - b[mu]).sum() + np.trace(a[sigma]) + np.trace(b[sigma]) - 2 * np.trace(root))


@pytest.mark.parametrize("workers", [0, 1])
def test_published_statistics_and_images_are_both_used(tmp_path: Path, workers: int) -> None:
    """The distances are from the statistics, which are of more images; precision and recall from the images."""
    net, images, samples = Inception(), noise(30, seed=0), noise(25, seed=1, low=60)
    pooled, spatial = net.with_spatial(noise(90, seed=2))
    published = moments(pooled) | moments(spatial, "_s")
    reference = ReferenceBatch(save(tmp_path / "reference.npz", images, **published))
    found = open_samples(save(tmp_path / "samples.npz", samples))
    reference.check(found, net)
    metrics = evaluate_samples(found, reference, net, batch_size=7, workers=workers)

    ours, ours_spatial = net.with_spatial(samples)
    expected = {
        "fid_g": distance(moments(ours), published),
        "sfid": distance(moments(ours_spatial, "_s"), published, "_s"),
        "inception_score": inception_score(ours, net.classifier),
    }
    expected["precision"], expected["recall"] = precision_and_recall(net(images), ours)
    assert metrics.values == pytest.approx(expected, rel=1e-6)
    assert not metrics.left_out
    assert len(set(metrics.values.values())) == 5


def test_another_network_sees_the_images(tmp_path: Path) -> None:
    """Published statistics are of Inception: another network's features have no part in them."""
    net, images, samples = TinyNet(), noise(30, seed=0), noise(25, seed=1, low=60)
    nonsense = {"mu": np.zeros(8), "sigma": np.eye(8), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    path = save(tmp_path / "reference.npz", images, **nonsense)
    reference = ReferenceBatch(path)
    save_images(tmp_path / "samples", samples)
    found = open_samples(tmp_path / "samples")
    reference.check(found, net)
    metrics = evaluate_samples(found, reference, net, batch_size=25)
    precision, recall = precision_and_recall(net(images), net(samples))
    fid = distance(moments(net(samples)), moments(net(images)))
    assert metrics.values == pytest.approx({"fid_g": fid, "precision": precision, "recall": recall}, rel=1e-6)
    assert metrics.left_out.keys() == {"sfid", "inception_score"}
    own = Inception()
    without = evaluate_samples(found, ReferenceBatch(save(tmp_path / "images.npz", images)), own).values
    spatial = [moments(own.with_spatial(x)[1], "_s") for x in (samples, images)]
    assert without["sfid"] == pytest.approx(distance(*spatial, "_s"), rel=1e-6)
    assert without["fid_g"] == pytest.approx(fid, rel=1e-6)


def test_statistics_alone_leave_the_rest_out(tmp_path: Path) -> None:
    net, samples = Inception(), noise(25, seed=1)
    published = moments(net(noise(90, seed=2)))
    np.savez(tmp_path / "reference.npz", **published)
    reference, found = ReferenceBatch(tmp_path / "reference.npz"), open_samples(save(tmp_path / "x.npz", samples))
    reference.check(found, net)
    metrics = evaluate_samples(found, reference, net)
    assert metrics.values["fid_g"] == pytest.approx(distance(moments(net(samples)), published), rel=1e-6)
    assert metrics.values.keys() == {"fid_g", "inception_score"}
    assert "mu_s" in metrics.left_out["sfid"]
    assert "no images" in metrics.left_out["precision, recall"]
    with pytest.raises(ValueError, match=r"tiny needs images in arr_0"):
        reference.check(found, TinyNet())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3)}, "neither images .* nor statistics"),
        ({"mu": np.zeros(8)}, "only one of mu and sigma"),
        ({"mu": np.zeros(8), "sigma": np.eye(7)}, r"\(8,\) .*\(7, 7\)"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "7 features, Inception 8"),
        ({"mu": np.full(8, np.nan), "sigma": np.eye(8)}, r"mu \(float64\) .*not finite"),
        ({"mu": np.zeros(8), "sigma": np.eye(8) * 1e300}, r"sigma .*not finite float32"),
        ({"mu": np.zeros(8, np.complex128), "sigma": np.eye(8)}, r"mu \(complex128\)"),
        ({"mu": np.array(["x"] * 8), "sigma": np.eye(8)}, r"reference.npz is damaged.* mu \(<U1\)"),
        ({"mu": np.zeros(8), "sigma": np.tri(8)}, "sigma is no covariance: it is not symmetric"),
        ({"mu": np.zeros(8), "sigma": -np.eye(8)}, "sigma is no covariance: .*negative variance"),
        ({"arr_0": np.zeros((9, 16, 8, 3), np.uint8)}, "16 x 8 pixels.* 8 x 8: resize"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.uint8)}, "at least 4 reference images, there are 3"),
    ],
)
def test_references_that_will_not_do(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    samples = open_samples(save(tmp_path / "samples.npz", noise(5, seed=0)))
    with pytest.raises(ValueError, match=message):
        ReferenceBatch(tmp_path / "reference.npz").check(samples, Inception())


def change_member(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the file of mu in an .npz file, whose checksum is right again."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    changed = change(members["mu.npy"])
    assert changed != members["mu.npy"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"mu.npy": changed}).items():
            archive.writestr(name, content)


def overwrite_file(path: Path, at: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: change_member(path, lambda member: member[:49]),
        lambda path: change_member(path, lambda member: member[:-49]),
        lambda path: change_member(path, lambda member: member.replace(b"(8,), }" + b" " * 11, b"(99999999999999,),}")),
        lambda path: overwrite_file(path, path.read_bytes().index(b"mu.npy") + 40),
    ],
    ids=["header cut", "values cut", "more values than there is memory", "overwritten"],
)
def test_a_damaged_reference_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Kinds found by tests/fuzz.py."""
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, mu=np.arange(8.0), sigma=np.eye(8))
    assert ReferenceBatch(path).pooled is not None
    damage(path)
    with pytest.raises(ValueError, match=r"reference.npz is damaged, or no reference: "):
        ReferenceBatch(path)
