"""Models by their names on the Hugging Face Hub: downloads, caches, revisions, refusals, publishing, cards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.stand_in_hub import READER, StandInHub, use_hub
from helpers.tiny_models import tiny_tokenizer, tiny_vqgan
from huggingface_hub import constants

from regvq_fast.models import VQGAN, weights_hash
from regvq_fast.models.hub import HubName, hub_name, local_folder, publish
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder

MODEL = ["README.md", "config.json", "manifest.json", "model.safetensors"]


def files_of(hub: StandInHub, name: str, ref: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs[ref]]


def metadata(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


# ----------------------------------------------------------------------------------------------------- there and back


def test_a_model_comes_back_as_it_was_published(hub: StandInHub, tmp_path: Path) -> None:
    model = tiny_tokenizer()
    address = model.push_to_hub("org/vq", license="mit")
    assert address == f"{hub.endpoint}/org/vq/commit/{hub.repositories['org/vq'].refs['main']}"
    assert sorted(files_of(hub, "org/vq")) == [".gitattributes", *MODEL]
    again = VQGAN.from_pretrained("org/vq")
    assert not again.training
    assert weights_hash(again) == weights_hash(model)
    assert json.dumps(again.architecture()) == json.dumps(model.architecture())
    assert sorted(hub.fetched()) == MODEL[1:]  # nothing but what a model consists of
    model.save_pretrained(tmp_path / "model")
    for name in MODEL[1:]:  # what is published is what save_pretrained writes
        assert files_of(hub, "org/vq")[name] == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize(
    "model",
    [
        TokenTransformer(4, 3, token_shape=(2, 2), width=8, depth=1, heads=2),
        VQDiffusion(
            4,
            text_encoder=WordEncoder(width=8, depth=1, heads=2, max_words=3, buckets=8),
            token_shape=(2, 2),
            num_steps=5,
            width=8,
            depth=1,
            heads=2,
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_so_do_priors(hub: StandInHub, model: Any) -> None:
    model.push_to_hub("org/prior")
    assert weights_hash(type(model).from_pretrained("org/prior")) == weights_hash(model)
    card = files_of(hub, "org/prior")["README.md"]
    assert metadata(card)["pipeline_tag"] == ("text-to-image" if isinstance(model, VQDiffusion) else "image-to-image")
    with pytest.raises(ValueError, match=rf"org/prior holds a {type(model).__name__}, not a VQGAN"):
        VQGAN.from_pretrained("org/prior")


def test_the_snippet_of_a_card_runs(hub: StandInHub) -> None:
    tiny_tokenizer().push_to_hub("org/vq")
    card = files_of(hub, "org/vq")["README.md"].decode()
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["tokens"].shape == (1, 8, 8)
    assert names["reconstructions"].shape == (1, 3, 16, 16)
    assert "there is no `evaluation.json`. `regvq evaluate` makes one" in card


def test_a_folder_comes_before_a_name(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(seed=1).push_to_hub("org/vq")
    monkeypatch.chdir(tmp_path)
    here = tiny_tokenizer(seed=2)
    here.save_pretrained("org/vq")
    hub.requests.clear()
    assert weights_hash(VQGAN.from_pretrained("org/vq")) == weights_hash(here)
    assert hub.requests == []
    with pytest.raises(ValueError, match="revision 'main'"):
        VQGAN.from_pretrained("org/vq", revision="main")
    assert hub_name("org/vq") is None
    with pytest.raises(NotADirectoryError):
        VQGAN.from_pretrained("org/vq/config.json")


def test_revisions(hub: StandInHub) -> None:
    old, new = tiny_tokenizer(seed=1), tiny_tokenizer(seed=2)
    old.push_to_hub("org/vq")
    first = hub.repositories["org/vq"].refs["main"]
    new.push_to_hub("org/vq", revision="next")
    assert weights_hash(VQGAN.from_pretrained("org/vq")) == weights_hash(old)
    for revision in ("next", first):
        expected = weights_hash(new if revision == "next" else old)
        assert weights_hash(VQGAN.from_pretrained("org/vq", revision=revision)) == expected
        assert weights_hash(VQGAN.from_pretrained(f"org/vq@{revision}")) == expected
        assert weights_hash(VQGAN.from_pretrained(Path(f"org/vq@{revision}"))) == expected
    with pytest.raises(FileNotFoundError, match=r"org/vq .*revision 'older'"):
        VQGAN.from_pretrained("org/vq", revision="older")
    with pytest.raises(ValueError, match=r"org/vq@next .*'main'"):
        VQGAN.from_pretrained("org/vq@next", revision="main")


def test_a_branch_that_moved_is_fetched_anew(hub: StandInHub) -> None:
    for seed in (1, 2):
        model = tiny_tokenizer(seed=seed)
        model.push_to_hub("org/vq")
        assert weights_hash(VQGAN.from_pretrained("org/vq")) == weights_hash(model)


def test_names() -> None:
    assert hub_name("org/vq") == HubName("org/vq", None)
    assert hub_name(Path("o-r.g/v_q@refs/pr/1")) == HubName("o-r.g/v_q", "refs/pr/1")
    for other in ("vq", "a/b/c", "/org/vq", "../vq", "org/..", "a--b/c", "a/b.", ".a/b", "org/vq@", "org/v q", "org/"):
        assert hub_name(other) is None, other
        with pytest.raises(FileNotFoundError, match=r"no such folder: .*ORGANIZATION/NAME"):
            local_folder(other)


# ----------------------------------------------------------------------------------------------------------- offline


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "no network"])
def test_without_a_network_the_cache_serves(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model = tiny_tokenizer()
    model.push_to_hub("org/vq", revision="v1")
    VQGAN.from_pretrained("org/vq@v1")
    if way == "no network":
        use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
        why = "cannot be reached"
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        why = "HF_HUB_OFFLINE"
    hub.requests.clear()
    assert weights_hash(VQGAN.from_pretrained("org/vq@v1")) == weights_hash(model)
    for name in ("org/other", "org/vq@v2"):
        with pytest.raises(FileNotFoundError, match=rf"{name} .*{why}"):
            VQGAN.from_pretrained(name)
    with pytest.raises(OSError, match="can't publish org/vq"):
        model.push_to_hub("org/vq")
    assert hub.requests == []


def test_a_snapshot_that_was_cut_off_is_no_model(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().push_to_hub("org/vq")
    folder = local_folder("org/vq")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"org/vq .*HF_HUB_OFFLINE"):
        VQGAN.from_pretrained("org/vq")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_the_hub_refuses_to_readers(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_tokenizer()
    model.push_to_hub("org/private", private=True)
    hub.add("org/gated", {}, gated=True)
    hub.add("org/foreign", {"pytorch_model.bin": b"", "config.json": b"{}"})
    hub.add("org/transformers", {"model.safetensors": b"", "config.json": b"{}"})
    assert weights_hash(VQGAN.from_pretrained("org/private")) == weights_hash(model)
    with pytest.raises(PermissionError, match=r"org/gated .*gated"):
        VQGAN.from_pretrained("org/gated")
    with pytest.raises(FileNotFoundError, match=r"org/foreign .*no model\.safetensors"):
        VQGAN.from_pretrained("org/foreign")
    with pytest.raises(ValueError, match=r"config\.json does not describe a model"):
        VQGAN.from_pretrained("org/transformers")
    with pytest.raises(FileNotFoundError, match=r"org/nothing .*neither a folder .*nor"):
        VQGAN.from_pretrained("org/nothing")
    use_hub(monkeypatch, hub.endpoint, tmp_path / "another cache", token=None)
    with pytest.raises(FileNotFoundError, match=r"org/private .*hf auth login"):
        VQGAN.from_pretrained("org/private")
    hub.broken = 503
    with pytest.raises(OSError, match=r"org/private .*503"):
        VQGAN.from_pretrained("org/private")
    hub.broken = 403
    with pytest.raises(PermissionError, match=r"read org/private .*403"):
        VQGAN.from_pretrained("org/private")


def test_what_the_hub_refuses_to_writers(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_tokenizer()
    for token, status in ((None, 401), (READER, 403)):
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hf", token=token)
        with pytest.raises(PermissionError, match=rf"publish org/vq .*{status}"):
            model.push_to_hub("org/vq")
    use_hub(monkeypatch, hub.endpoint, tmp_path / "hf")
    with pytest.raises(ValueError, match="license"):
        model.push_to_hub("org/vq", license="no such license")
    assert sorted(files_of(hub, "org/vq")) == [".gitattributes"]
    with pytest.raises(ValueError, match=r"org/vq .*public"):
        model.push_to_hub("org/vq", private=True)
    assert sorted(files_of(hub, "org/vq")) == [".gitattributes"]
    hub.requests.clear()
    for name in ("vq", "org/vq@v1", "runs/vq/checkpoints"):
        with pytest.raises(ValueError, match=rf"'{name}' .*ORGANIZATION/NAME"):
            model.push_to_hub(name)
    assert hub.requests == []


def test_files_on_the_hub_are_compared_with_their_manifest(hub: StandInHub) -> None:
    tiny_tokenizer().push_to_hub("org/vq")
    files = files_of(hub, "org/vq")
    damaged = bytearray(files["model.safetensors"])
    damaged[-1] ^= 1
    hub.repositories["org/vq"].commit(files | {"model.safetensors": bytes(damaged)}, "damaged")
    with pytest.raises(ValueError, match="SHA-256"):
        VQGAN.from_pretrained("org/vq@damaged")
    hub.repositories["org/vq"].commit({name: files[name] for name in MODEL if name != "manifest.json"}, "plain")
    assert weights_hash(VQGAN.from_pretrained("org/vq@plain")) == weights_hash(tiny_tokenizer())


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"org/vq; .*\[hub\]"):
        VQGAN.from_pretrained("org/vq")
    with pytest.raises(ValueError, match=r"\[hub\]"):
        tiny_tokenizer().push_to_hub("org/vq")


# ---------------------------------------------------------------------------------------------------------- publishing


def test_files_of_an_earlier_model_go_and_others_stay(hub: StandInHub) -> None:
    files = {"README.md": b"", "evaluation.json": b"{}", "pictures/a.png": b"", "tokenizer/config.json": b"{}"}
    repository = hub.add("org/vq", files | {"notes.txt": b"", "pictures/a.txt": b""})
    tiny_tokenizer().push_to_hub("org/vq")
    assert sorted(files_of(hub, "org/vq")) == sorted([*MODEL, "notes.txt", "pictures/a.txt"])
    assert len(repository.commits) == 2  # one commit, so that nobody reads half of it


def test_a_push_that_changes_nothing(hub: StandInHub) -> None:
    files = {"a/b.txt": b"1"}
    for _ in range(2):
        publish(files, "org/any", message="one")
    assert files_of(hub, "org/any")["a/b.txt"] == b"1"


# --------------------------------------------------------------------------------------------------------------- cards


def test_a_card_has_each_number_beside_its_protocol() -> None:
    model = tiny_vqgan()
    shared = {"data": "photos", "split": "val", "images": 12, "versions": {"torch": "2"}}
    evaluation = {
        "psnr": {"name": "PSNR (dB)", "value": 21.25, **shared, "of": "8-bit images"},
        "fid_r": {"name": "Fréchet distance[R] (tiny)", "value": None, **shared, "features": "a|b", "note": "too few"},
    }
    config = {
        "run": {"seed": 3, "out": "runs/vq", "log_every": 10},
        "optimizer": {"steps": 600, "lr": 0.001, "epochs": None},
        "facts": {"data": "photos: 7 images", "precision": "fp32"},
        "architecture": model.architecture(),
        "versions": {"regvq_fast": "1.2", "torch": "2"},
    }
    images = ["pictures/usage.png", "pictures/reconstructions.png"]
    card = model.card(
        HubName("org/vq", "v1"), config=config, evaluation=evaluation, images=images, train="regvq train vq"
    )
    text = card.text()
    assert "# vq\n" in text
    assert 'VQGAN.from_pretrained("org/vq@v1")' in text
    assert "| PSNR (dB) | 21.25 | of 8-bit images |" in text
    assert "| Fréchet distance[R] (tiny) | not finite | features a b |" in text
    assert "| images | 12 |" in text
    assert "| versions | torch 2 |" in text
    assert "**Note:** too few." in text
    assert "| settings: run | seed 3 |" in text
    assert "| settings: optimizer | steps 600, lr 0.001 |" in text
    assert "photos: 7 images" in text.partition("## Limits")[2]
    assert text.index("(pictures/reconstructions.png)") < text.index("## Use") < text.index("(pictures/usage.png)")
    assert "`regvq train vq --config config.json`" in text
    assert "None is stated" in text

    found = metadata(text.encode())
    assert "license" not in found
    assert (found["library_name"], found["pipeline_tag"]) == ("regvq_fast", "image-to-image")
    assert found["tags"] == ["vector-quantization", "image-tokenizer", "vq-gan"]
    (index,) = found["model-index"]
    (result,) = index["results"]  # a number that is not finite is none
    assert result["dataset"] == {"name": "photos", "type": "photos", "split": "val"}
    assert result["metrics"] == [{"type": "psnr-db", "value": 21.25, "name": "PSNR (dB)"}]


def test_importing_the_models_needs_no_hub() -> None:
    code = "import sys; import regvq_fast.models.vqgan; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
