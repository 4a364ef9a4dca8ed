"""Fixtures that tests of token caches and of evaluations share."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.evaluations import TinyDistance, make_diffusion, make_maskgit, make_prior, save_run
from helpers.tiny_models import TinyNet, tiny_tokenizer

from regvq_fast.cli import evaluate as evaluation
from regvq_fast.cli import evaluate_setup
from regvq_fast.config import VQGANConfig
from regvq_fast.image_grids import save_images
from regvq_fast.models.features import VGGFeatures


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer, one prior of each kind over its tokens, another tokenizer, and weights of VGG-16."""
    top = tmp_path_factory.mktemp("runs")
    save_run(top / "vq", tiny_tokenizer(), VQGANConfig())
    tiny_tokenizer(seed=3).save_pretrained(top / "other")
    for name, prior in (("ar", make_prior()), ("diffusion", make_diffusion()), ("maskgit", make_maskgit())):
        prior.save_pretrained(top / name)
        tiny_tokenizer().save_pretrained(top / name / "tokenizer")
    trunk = VGGFeatures("vgg16", seed=7)
    safetensors.torch.save_file({k: v.half() for k, v in trunk.state_dict().items()}, top / "vgg.safetensors")
    return {path.stem: path for path in top.iterdir()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 1), ("val", 6)):
        images = torch.randint(0, 256, (count, 3, 20, 24), dtype=torch.uint8, generator=generator)
        save_images(tmp_path / "photos" / split, images)
    return tmp_path / "photos"


@pytest.fixture
def tiny_nets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small networks behind the metrics, and a cache of this test's own."""
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: TinyNet())
    monkeypatch.setattr(evaluation, "PerceptualDistance", TinyDistance)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
