"""``regvq evaluate --reference`` with image files, and evaluation without the FID network."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_tokenizer
from PIL import Image

from regvq_fast.cli import sample
from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.cli.sample import SampleConfig, generate
from regvq_fast.data.image_arrays import ImageArray
from regvq_fast.evaluation.feature_nets import NoFeaturesError, load_feature_net
from regvq_fast.evaluation.fid import frechet_distance, statistics_of
from regvq_fast.evaluation.measurement import Measurement
from regvq_fast.image_grids import save_images
from regvq_fast.models.features import RANDOM
from regvq_fast.priors.autoregressive import TokenTransformer


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def measure(**settings: Any) -> dict[str, Measurement]:
    return evaluate(EvaluateConfig(**{"device": "cpu", "workers": 0, "fid_features": "random-vgg16", **settings}))


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"token_shape": (8, 8), "condition_shape": (4, 4), "width": 16, "depth": 1, "heads": 2}
    TokenTransformer(32, 16, **sizes).save_pretrained(tmp_path / "ar")
    tiny_tokenizer().save_pretrained(tmp_path / "ar" / "tokenizer")
    return tmp_path / "ar"


def test_from_a_prior_to_the_suites_numbers(prior: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Image.new("L", (16, 16), 3).save(tmp_path / "map.png")
    settings: dict[str, Any] = {"run": prior, "map": tmp_path / "map.png", "num_images": 6, "device": "cpu"}
    generate(SampleConfig(**settings, out=out, npz=out / "samples.npz", batch_size=4))
    generate(SampleConfig(**settings, out=tmp_path / "images"))
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "samples.npz"]
    np.savez(tmp_path / "reference.npz", noise(9, 0).permute(0, 2, 3, 1).numpy())

    in_one = measure(images=out / "samples.npz", reference=tmp_path / "reference.npz", batch_size=4)
    in_files = measure(images=tmp_path / "images", reference=tmp_path / "reference.npz", batch_size=4)
    assert {key: number.value for key, number in in_one.items()} == {key: n.value for key, n in in_files.items()}
    assert in_one.keys() == {"fid_g", "precision", "recall"}
    net = load_feature_net("random-vgg16")
    samples = torch.stack([sample["image"] for sample in map(ImageArray(out / "samples.npz").__getitem__, range(6))])
    with pytest.warns(UserWarning, match="too few"):
        expected = frechet_distance(statistics_of([samples], net), statistics_of([noise(9, 0)], net))
    assert in_one["fid_g"].value == pytest.approx(expected, rel=1e-4)
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved["fid_g"]["name"] == "Fréchet distance[G] (random VGG-16, relu5_3 averaged)"
    assert (saved["fid_g"]["samples"], saved["fid_g"]["reference_statistics"]) == (6, "of its images")
    assert "6 images are too few for 512 features" in saved["fid_g"]["note"]
    assert (saved["recall"]["reference_images"], saved["recall"]["neighbors"]) == (9, 3)
    assert saved["recall"]["suite"].startswith("ADM")
    # A file of images is evaluated against a data set, too.
    against = {"data": Path("scenes"), "val_images": 4, "image_size": 16, "cache_dir": tmp_path / "cache"}
    found = [measure(images=images, **against) for images in (out / "samples.npz", tmp_path / "images")]
    assert found[0]["fid_g"].value == found[1]["fid_g"].value
    with pytest.raises(ValueError, match=r"samples\.npz has 16 x 16 .*32 x 32"):
        measure(images=out / "samples.npz", **(against | {"image_size": 32}))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"images": None}, ValueError, "--reference .*--images"),
        ({"data": Path("photos")}, ValueError, "--data photos is not used"),
        ({"image_size": 16}, ValueError, "--image-size 16"),
        ({"top_p": 0.5}, ValueError, r"--top-p 0\.5"),
        ({"fid_features": "none"}, ValueError, "--fid-features none"),
        ({"reference": Path("nowhere.npz")}, FileNotFoundError, "nowhere"),
        ({"images": Path("nowhere.npz")}, FileNotFoundError, "nowhere"),
        ({"images": Path("nowhere")}, FileNotFoundError, "nowhere"),
    ],
)
def test_what_has_no_part_in_it_is_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_images(tmp_path / "images", noise(5, 0))
    np.savez(tmp_path / "reference.npz", noise(9, 0).permute(0, 2, 3, 1).numpy())
    given = {"images": tmp_path / "images", "reference": tmp_path / "reference.npz", "out": tmp_path / "out"}
    with pytest.raises(error, match=message):
        measure(**(given | settings))
    assert not (tmp_path / "out").exists()


def test_files_for_sampled_images_are_new_and_end_in_npz(tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    for name, error in (("x.npz", FileExistsError), ("y.npy", ValueError)):
        with pytest.raises(error, match=name):
            generate(SampleConfig(out=tmp_path / "out", npz=tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_a_folder_removed_before_the_grid_is_an_error(
    prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new folder had the grid only."""
    out, show = tmp_path / "out", sample._Generator.show

    def remove(self: sample._Generator, count: int) -> Any:
        shutil.rmtree(out)
        return show(self, count)

    Image.new("L", (16, 16), 3).save(tmp_path / "map.png")
    monkeypatch.setattr(sample._Generator, "show", remove)
    with pytest.raises(FileNotFoundError, match=f"^--out {out} was removed"):
        generate(SampleConfig(run=prior, map=tmp_path / "map.png", num_images=2, device="cpu", out=out))


def test_a_file_of_images_that_appears_meanwhile_is_kept(prior: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 3).save(tmp_path / "map.png")
    npz = tmp_path / "x.npz"
    config = SampleConfig(run=prior, map=tmp_path / "map.png", num_images=2, device="cpu", out=tmp_path / "o", npz=npz)
    generator = sample._Generator(config)

    def save() -> None:
        with generator.saving() as write:
            npz.write_text("of another process")
            write(generator.sample(0, 2, lambda *_: None), 0)

    with pytest.raises(FileExistsError, match=f"^--npz {npz} exists"):
        save()
    assert npz.read_text() == "of another process"


def test_without_torch_fidelity_the_rest_is_measured(
    prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    settings = {"run": prior / "tokenizer", "data": Path("scenes"), "val_images": 3, "perceptual_weights": RANDOM}
    found = measure(**settings, out=tmp_path / "out", fid_features=None)
    assert {"psnr", "ssim", "perceptual", "utilization"} < found.keys()
    assert not found.keys() & {"fid_r", "fid_g"}
    assert "FID[R]: the Inception features" in (said := capsys.readouterr().out)
    assert "pip install" in said
    assert "random-vgg16" in said
    for asked in ({"fid_features": "inception"}, {"prior_run": prior, "run": None}):
        with pytest.raises(NoFeaturesError, match="torch-fidelity"):
            measure(**(settings | {"fid_features": None, "out": tmp_path / "other"} | asked))
