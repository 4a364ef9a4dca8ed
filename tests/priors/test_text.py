"""Text encoders: the learned one's words, the pre-trained one's features, and what both refuse."""

import copy
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_vqgan

from regvq_fast.cli.train import train
from regvq_fast.priors.diffusion import VQDiffusion
from regvq_fast.priors.diffusion.config import DIFFUSION_PRESETS
from regvq_fast.priors.diffusion.recipe import DiffusionRecipe
from regvq_fast.priors.diffusion.text import PretrainedTextEncoder, TextEncoder, WordEncoder, restore_text_encoder
from regvq_fast.quantizers import NearestQuantizer
from regvq_fast.scenes.layouts import LAYOUTS, PHOTOGRAPHS


def tiny_words(**arguments: int | bool) -> WordEncoder:
    torch.manual_seed(0)
    return WordEncoder(**{"width": 8, "depth": 1, "heads": 2, "max_words": 6, "buckets": 32, **arguments})  # type: ignore[arg-type]


# --- the learned encoder ---------------------------------------------------------------------------------------------


def test_words_have_the_same_ids_wherever_they_are() -> None:
    encoder = tiny_words(buckets=2048)
    ids = encoder.tokenize(["A cat, left", "left a CAT"])
    assert ids.shape == (2, 6, 3)
    assert (ids[0, :4] > 0).all()
    assert ids[0, 4:].eq(0).all()
    assert ids[1, 3:].eq(0).all()
    for mine, other in [(0, 1), (1, 2), (3, 0)]:  # a, cat, left; the comma is a word of its own
        assert torch.equal(ids[0, mine], ids[1, other])
    assert len({tuple(row.tolist()) for row in ids[0, :4]}) == 4


def test_scenes_captions_fit_and_their_words_differ() -> None:
    encoder = WordEncoder()
    longest = sorted((photograph.phrase for photograph in PHOTOGRAPHS), key=len)[-4:]
    captions = [layout.caption.format(*longest) for layout in LAYOUTS.values()]
    captions += [photograph.phrase for photograph in PHOTOGRAPHS]
    ids = encoder.tokenize(captions)
    words = {word for caption in captions for word in re.findall(r"\w+|,", caption.lower())}
    different = {tuple(row.tolist()) for row in ids.flatten(0, 1) if row[0] > 0}
    assert len(different) == len(words) > 30


def test_features_depend_on_order_but_not_on_other_captions() -> None:
    encoder = tiny_words().eval()
    one, other = "cat on grass", "grass on cat"
    features, mask = encoder(encoder.tokenize([one, other]))
    assert features.shape == (2, 6, 8)
    assert mask.tolist() == [[True] * 3 + [False] * 3] * 2
    assert not torch.allclose(features[0, 1], features[1, 1])  # "on" in another context
    torch.testing.assert_close(encoder(encoder.tokenize([one])).features[0], features[0])


def test_learned_encoders_are_restored_from_their_description() -> None:
    encoder = tiny_words(truncate=True)
    description = json.loads(json.dumps(encoder.architecture()))
    restored = restore_text_encoder(description)
    assert isinstance(restored, WordEncoder)
    assert restored.architecture() == encoder.architecture()
    restored.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match=r"None .*WordEncoder, PretrainedTextEncoder"):
        restore_text_encoder({})
    with pytest.raises(ValueError, match="WordEncoder"):
        restore_text_encoder({"type": "WordEncoder", "colour": "red"})


def test_long_captions_are_cut_only_on_request() -> None:
    with pytest.raises(ValueError, match=r"'a b c d e f g' .*\b7 words.*\b6\b"):
        tiny_words().tokenize(["a b c d e f g"])
    cut = tiny_words(truncate=True)
    assert torch.equal(cut.tokenize(["a b c d e f g"]), cut.tokenize(["a b c d e f"]))


def check_refusals(encoder: TextEncoder) -> None:
    for captions, error, message in [
        ([], ValueError, "must not be empty"),
        (["a cat", " \n"], ValueError, r"caption 1\b"),
        ("a cat", TypeError, r"list.* str$"),
        (["a cat", None], TypeError, "NoneType, str"),
    ]:
        with pytest.raises(error, match=message):
            encoder.tokenize(captions)  # type: ignore[arg-type]


def test_what_is_no_caption_is_refused() -> None:
    check_refusals(tiny_words())
    with pytest.raises(ValueError, match=r"width 9 .*2 heads"):
        tiny_words(width=9)
    for size in ("depth", "max_words"):
        with pytest.raises(ValueError, match=rf"{size} .*\b0$"):
            tiny_words(**{size: 0})


# --- pre-trained encoders --------------------------------------------------------------------------------------------


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"\.\[text\].*--text-encoder words"):
        PretrainedTextEncoder()


WORDS = ["<pad>", "<unk>", "<end>", "a", "cat", "on", "grass"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, and tokenizers of these words, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<pad>", model_max_length=7
    )
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = transformers.CLIPTextConfig(vocab_size=7, max_position_embeddings=7, eos_token_id=2, **size)
    t5 = transformers.T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    wide = transformers.CLIPTextConfig(**(clip.to_dict() | {"hidden_size": 64}))
    models = {"clip": transformers.CLIPTextModel(clip), "t5": transformers.T5Model(t5)}
    models["wide"] = transformers.CLIPTextModel(wide)
    root = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_pretrained_features_are_unit_length_and_frozen(folders: dict[str, Path], name: str) -> None:
    encoder = PretrainedTextEncoder(str(folders[name]))
    assert encoder.shape == (7, 8)
    ids = encoder.tokenize(["a cat", "a cat on grass"])
    features, mask = encoder(ids)
    assert mask.sum(1).tolist() == [3, 5]
    torch.testing.assert_close(features.norm(dim=2), torch.ones(2, 7))
    assert not features.requires_grad
    assert not list(encoder.parameters())
    assert not encoder.state_dict()
    torch.testing.assert_close(encoder(encoder.tokenize(["a cat"])).features[0], features[0])
    check_refusals(encoder)
    with pytest.raises(ValueError, match=r"\b8 tokens.*\b7\b"):
        encoder.tokenize(["a cat on grass on a cat"])
    assert PretrainedTextEncoder(str(folders[name]), truncate=True).tokenize(["a " * 50]).shape == (1, 7, 2)


def test_pretrained_encoders_move_and_are_shared_by_copies(folders: dict[str, Path]) -> None:
    encoder = PretrainedTextEncoder(str(folders["clip"]), max_tokens=5)
    assert copy.deepcopy(encoder)._frozen.model is encoder._frozen.model
    restored = restore_text_encoder(json.loads(json.dumps(encoder.architecture())))
    ids = encoder.tokenize(["a cat"])
    torch.testing.assert_close(restored(ids).features, encoder(ids).features)
    encoder.double()
    assert next(encoder._frozen.model.parameters()).dtype == torch.float64
    assert encoder(ids).features.dtype == torch.float32


def test_a_prior_trains_under_a_pretrained_encoder_as_the_paper_does(
    folders: dict[str, Path], few_regions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled as one graph, with averaged weights, and resumed: train/diffusion.py --preset coco --compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("regvq_fast.training.compilation.CPU_STEPS", 0)
    tiny_vqgan(NearestQuantizer(16, 4)).save_pretrained(tmp_path / "tokenizer")

    def run(*flags: object) -> None:
        train(DiffusionRecipe, DIFFUSION_PRESETS, list(map(str, flags)))

    flags: list[object] = "--on-the-fly --compile --ema 0.5 --val-images 4 --workers 0 --device cpu".split()
    flags += "--batch-size 4 --width 16 --depth 1 --heads 2 --warmup-steps 1 --final-lr-fraction 1".split()
    flags += ["--tokenizer", tmp_path / "tokenizer", "--text-encoder", folders["clip"]]
    run(*flags, "--steps", 2, "--out", tmp_path / "whole")
    run(*flags, "--steps", 1, "--out", tmp_path / "broken")
    run("--resume", "--steps", 2, "--out", tmp_path / "broken")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert b"text_encoder" not in weights[0]  # CLIP's own weights aren't saved with the prior


def test_the_size_of_a_pretrained_encoder_does_not_unbound_the_rest(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = PretrainedTextEncoder(str(folders["wide"]))
    prior = VQDiffusion(4, text_encoder=encoder, num_steps=5, token_shape=(2, 2), width=8, depth=1, heads=2)
    prior.save_pretrained(tmp_path / "prior")
    (tmp_path / "prior" / "manifest.json").unlink()
    frozen = sum(parameter.numel() for parameter in encoder._frozen.model.parameters())
    assert frozen > 2 * sum(value.numel() for value in prior.state_dict().values())
    assert VQDiffusion.from_pretrained(tmp_path / "prior").text_shape == (7, 64)
    config = json.loads((tmp_path / "prior" / "config.json").read_text())
    config["architecture"]["depth"] = 2000
    (tmp_path / "prior" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"prior: .*more parameters than its weights"):
        VQDiffusion.from_pretrained(tmp_path / "prior")


def test_missing_models_are_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PretrainedTextEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"max_tokens .*\b0$"):
        PretrainedTextEncoder(max_tokens=0)
