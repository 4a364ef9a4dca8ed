"""A prior that is new: its classes and one entry in PRIORS are all that training, sampling and evaluation need."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import tiny_vqgan
from PIL import Image
from torch import Tensor, nn

from regvq_fast.cli.cache_tokens import CacheConfig, cache_tokens
from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.cli.sample import SampleConfig, generate
from regvq_fast.cli.train import train
from regvq_fast.models.model import Model
from regvq_fast.priors.choosing import choose_tokens
from regvq_fast.priors.config import PriorConfig
from regvq_fast.priors.prior_recipe import PriorRecipe
from regvq_fast.priors.registry import PRIORS, Prior, SamplingConfig
from regvq_fast.priors.sampler import PriorSampler, SamplingSettings
from regvq_fast.quantizers import NearestQuantizer
from regvq_fast.settings import Section


class ToyModel(Model):
    """Codes that go with a class, whatever is around them."""

    def __init__(self, num_codes: int, num_classes: int, token_shape: tuple[int, int]) -> None:
        super().__init__()
        self._arguments = {"num_codes": num_codes, "num_classes": num_classes, "token_shape": token_shape}
        self.num_codes, self.token_shape = num_codes, tuple(token_shape)
        self.conditioned_on, self.label_names = "segmentation", ()
        self.logits = nn.Embedding(num_classes, num_codes)

    def condition_ids(self, maps: Tensor) -> Tensor:
        return maps.long()

    def forward(self, tokens: Tensor, maps: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(maps).flatten(0, 2), tokens.flatten())


@dataclass(frozen=True)
class ToyModelConfig(Section):
    """Network."""

    num_classes: int = 16
    """Ids of the semantic maps."""


@dataclass(frozen=True)
class ToyConfig(PriorConfig):
    """A run of the toy prior."""

    model: ToyModelConfig = field(default_factory=ToyModelConfig)


class ToyLoss(nn.Module):
    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, tokens: Tensor, maps: Tensor, seed: Tensor, first_image: Tensor) -> Any:
        return {"loss": self.prior(tokens, maps)}, ()


class ToySampler(PriorSampler):
    title = "toy"
    conditions = ("segmentation", "none")
    settings_type = SamplingSettings

    def sample(self, conditions: Tensor, first_image: int = 0, **unused: Any) -> Tensor:
        logits = self.prior.logits(conditions.long())
        rows = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) + first_image * logits[0, ..., 0].numel()
        seed = torch.tensor(self.settings.seed)
        return choose_tokens(logits, rows, seed, temperature=self.settings.temperature)


class ToyRecipe(PriorRecipe[ToyConfig]):
    command = "train toy"
    sampler = ToySampler

    def build_prior(self, config: ToyConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
        classes = config.model.num_classes
        return ToyModel(self.tokenizer.quantize.num_codes, classes, self.tokenizer.token_shape), {}

    def build_loss(self) -> nn.Module:
        return ToyLoss(self.model)

    def validation_loss(self, model: ToyModel, tokens: Tensor, condition: Tensor, first_image: int) -> Tensor:
        return model(tokens, condition)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Prior:
    entry = Prior(ToyModel, {"scenes": ToyConfig()}, ToyRecipe)
    monkeypatch.setitem(PRIORS, "toy", entry)
    return entry


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A cache of eight scenes' tokens."""
    tiny_vqgan(NearestQuantizer(16, 4)).save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "tokens"
    few = {"views": 1, "scenes": 8, "val_images": 4, "workers": 0, "device": "cpu"}
    cache_tokens(CacheConfig(tokenizer=tmp_path / "tokenizer", out=out, **few))
    return out


def test_a_new_prior_trains_samples_and_is_measured(
    toy: Prior, tokens: Path, few_regions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tmp_path / "run"
    flags = "--steps 2 --batch-size 8 --log-every 1 --warmup-steps 0 --lr 0.1 --device cpu --workers 0".split()
    train(toy.recipe, toy.presets, [*flags, "--cache", str(tokens), "--out", str(trained)])
    before, after = (json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()[:2])
    assert after < before

    generate(SampleConfig(run=trained, out=tmp_path / "samples", prior="toy", num_images=3, device="cpu"))
    with Image.open(tmp_path / "samples" / "00002.png") as image:
        assert image.size == (16, 16)
    with pytest.raises(ValueError, match=r"--top-p .*toy"):
        generate(SampleConfig(run=trained, out=tmp_path / "others", top_p=0.5, device="cpu"))
    with pytest.raises(ValueError, match=r"--text .*toy"):
        generate(SampleConfig(run=trained, out=tmp_path / "others", text=("a cat",), device="cpu"))

    settings: dict[str, Any] = {"fid_features": "random-vgg16", "perceptual_weights": Path("random"), "workers": 0}
    found = evaluate(EvaluateConfig(prior_run=trained, val_images=4, cache_dir=tmp_path, device="cpu", **settings))
    assert found["fid_g"].protocol["prior"].startswith("toy, ")
    assert found["fid_g"].value > 0


def test_command_lines_have_the_settings_of_every_prior() -> None:
    names = {name for prior in PRIORS.values() for name in prior.sampler.settings_type.names()}
    assert set(SamplingConfig.names()) == names
