"""Features shared by the models: labelled folders, activation checkpointing, temporary evaluation mode."""

import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regvq_fast import NearestQuantizer
from regvq_fast.models import VQGAN
from regvq_fast.models.model import Checkpointed, Model, evaluating
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.priors.maskgit import MaskGIT

KINDS: tuple[type[Model], ...] = (VQGAN, TokenTransformer, VQDiffusion, MaskGIT)


def tiny(kind: type[Model]) -> Model:
    torch.manual_seed(0)
    sizes = {"token_shape": (2, 2), "width": 8, "depth": 2, "heads": 2}
    if kind in (TokenTransformer, MaskGIT):
        return kind(4, 3, **sizes)
    if kind is VQDiffusion:
        encoder = WordEncoder(width=8, depth=2, heads=2, max_words=3, buckets=8)
        return VQDiffusion(4, text_encoder=encoder, num_steps=5, **sizes)
    convolutions = {"ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "z_channels": 4}
    return VQGAN(NearestQuantizer(4, 4), image_size=8, **convolutions)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_says_whose_it_is(tmp_path: Path, kind: type[Model]) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "model")
    description = json.loads((tmp_path / "model" / "config.json").read_text())["architecture"]
    assert description["type"] == kind.__name__
    assert description == json.loads(json.dumps(model.architecture()))
    again = kind.from_pretrained(str(tmp_path / "model"))
    assert type(again) is kind
    assert not any(module.training for module in again.modules())
    assert json.dumps(again.architecture()) == json.dumps(model.architecture())
    for (name, value), (same, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(value, expected)


@pytest.mark.parametrize(("kind", "asked"), list(itertools.permutations(KINDS, 2)))
def test_the_folder_of_another_model_is_refused_in_a_sentence(
    tmp_path: Path, kind: type[Model], asked: type[Model]
) -> None:
    tiny(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'} .* {kind.__name__}, .* {asked.__name__}$"):
        asked.from_pretrained(tmp_path / "model")


def described(**changes: Any) -> Callable[[Path], None]:
    """Change the architecture in a folder."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["architecture"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: type[Model]) -> None:
    model = tiny(kind)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[-1] = math.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'}: .*non-finite values in {re.escape(name)}$"):
        kind.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (described(depth=2**19), "more parameters"),
        (described(width=2**18), "more parameters"),
        (described(num_steps=2**20), "more parameters"),
        (described(text_encoder="org/name"), "sequence|text encoder"),
        (described(type="os.system"), "holds a os.system"),
        (replaced("config.json", lambda path: path.symlink_to("/etc/passwd")), "does not describe a model"),
        (replaced("config.json", lambda path: path.symlink_to(path)), "missing"),
        (replaced("config.json", os.mkfifo), "no file"),
        (replaced("manifest.json", os.mkfifo), "manifest"),
        (replaced("manifest.json", lambda path: path.symlink_to("/dev/zero")), "manifest"),
        (replaced("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "no file"),
        (replaced("config.json", lambda path: path.write_bytes(b"[" * (2**24 + 1))), "16,777,217 bytes"),
        (replaced("manifest.json", lambda path: path.write_bytes(b"[" * (2**24 + 1))), "damaged"),
        (replaced("model.safetensors", lambda path: (path.parent / "model.bin").write_bytes(b"\x80\x04")), "neither"),
    ],
)
def test_a_hostile_folder_costs_neither_time_nor_memory(
    tmp_path: Path, change: Callable[[Path], None], word: str
) -> None:
    folder = tmp_path / "model"
    tiny(VQDiffusion).save_pretrained(folder)
    (folder / "manifest.json").unlink()
    change(folder)
    start = time.monotonic()
    with pytest.raises((ValueError, OSError), match=word) as refused:
        VQDiffusion.from_pretrained(folder)
    assert str(folder) in str(refused.value)
    assert time.monotonic() - start < 20


def test_folders_without_a_type_are_of_a_vqgan(tmp_path: Path) -> None:
    model = tiny(VQGAN)
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    del content["architecture"]["type"]
    config.write_text(json.dumps(content))
    (tmp_path / "model" / "manifest.json").unlink()
    assert VQGAN.from_pretrained(tmp_path / "model").architecture() == json.loads(json.dumps(model.architecture()))
    with pytest.raises(ValueError, match=r"VQGAN.* VQDiffusion"):
        VQDiffusion.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("kind", "parts"), [(VQGAN, 4), (TokenTransformer, 2), (VQDiffusion, 2 + 2), (MaskGIT, 2)])
def test_activations_are_checkpointed_in_every_level_and_block(kind: type[Model], parts: int) -> None:
    model = tiny(kind)
    for enabled in (True, False):
        model.checkpoint_activations(enabled)
        assert [m.checkpointing for m in model.modules() if isinstance(m, Checkpointed)] == [enabled] * parts


def test_a_checkpointed_text_encoder_has_the_same_gradients() -> None:
    model = tiny(VQDiffusion)
    ids = model.tokenize_text(["a cat", "two dogs"])
    tokens, t = torch.tensor([[0, 4, 1, 4], [4, 4, 2, 3]]), torch.tensor([2, 5])
    parameters = [p for name, p in model.named_parameters() if "blocks" in name]
    gradients = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        gradients.append(torch.autograd.grad(model(tokens, t, ids).square().sum(), parameters))
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients[0])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=0)


def test_every_module_gets_its_own_mode_back() -> None:
    model = tiny(TokenTransformer).train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.extend(module.training for module in model.modules())
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert seen == [False] * len(modes)
    assert [module.training for module in model.modules()] == modes
