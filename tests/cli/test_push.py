"""Runs on the Hugging Face Hub: what regvq push makes of them, and that commands take what it published by its name."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from helpers.stand_in_hub import StandInHub
from helpers.tiny_models import tiny_tokenizer
from PIL import Image

from regvq_fast.cli.cache_tokens import CacheConfig, cache_tokens
from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.cli.push import PushConfig, published_files, push, without_folders
from regvq_fast.cli.sample import SampleConfig, generate
from regvq_fast.config import VQGANConfig, override, read_config
from regvq_fast.data.token_cache import read_info
from regvq_fast.models import VQGAN, weights_hash
from regvq_fast.models.hub import HubName
from regvq_fast.models.pretrained import write_folder
from regvq_fast.precision import choose_precision
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.autoregressive.config import AR_PRESETS
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PRIORS, SamplingConfig

CPU = torch.device("cpu")
VQ, AR = HubName("org/vq", None), HubName("org/ar", None)


def save_run(folder: Path, model: Any, config: Any) -> Path:
    """Outputs of training at its end."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    for name in ("reconstructions", "reconstructions-0000250", "usage"):
        Image.new("RGB", (8, 8)).save(folder / "pictures" / f"{name}.png")
    (folder / "metrics.jsonl").touch()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    content = dataclasses.asdict(config) | {
        "started_in": str(folder.parent),
        "facts": {"data": f"{folder.parent}/my photos: 7 images", "device": "CPU"},
        "architecture": model.architecture(),
        "versions": {"regvq_fast": "0.1.0", "torch": "2"},
    }
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A tokenizer's run on photos, measured on scenes."""
    data = tmp_path / "private" / "my photos"
    folder = save_run(tmp_path / "private" / "vq", tiny_tokenizer(), override(VQGANConfig(), data=data))
    measure(run=folder)
    return folder


@pytest.fixture
def prior_run(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    prior = TokenTransformer(32, 16, token_shape=(8, 8), condition_shape=(4, 4), width=16, depth=1, heads=2).eval()
    config = override(AR_PRESETS["scenes"], on_the_fly=True, tokenizer=tmp_path / "private" / "vq")
    folder = save_run(tmp_path / "private" / "ar", prior, config)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def measure(**settings: Any) -> dict[str, Any]:
    settings = {"data": Path("scenes"), "val_images": 4, "fid_features": "none", "device": "cpu"} | settings
    return evaluate(EvaluateConfig(perceptual_weights=Path("random"), workers=0, **settings))


def metadata(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


@pytest.mark.usefixtures("no_downloads", "hub")
def test_a_run_is_published_without_its_checkpoints_logs_and_folders(run: Path, tmp_path: Path) -> None:
    files = published_files(run, VQ, "mit")
    assert sorted(files) == [
        "README.md",
        "config.json",
        "evaluation.json",
        "manifest.json",
        "model.safetensors",
        "pictures/reconstructions.png",
        "pictures/usage.png",
    ]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    evaluation = json.loads((run / "evaluation.json").read_text())
    published = json.loads(files["evaluation.json"])
    assert published["psnr"]["tokenizer"] == "vq"
    assert published["psnr"]["command"] == evaluation["psnr"]["command"].replace(str(run), "vq")
    card = files["README.md"].decode()
    for found in published.values():
        assert f"| {found['name']} | {found['value']:.5g} |" in card
    assert "| command | regvq evaluate" in card
    assert "my photos: 7 images" in card
    (index,) = metadata(files["README.md"])["model-index"]
    values = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    assert values == [found["value"] for found in published.values()]
    assert metadata(files["README.md"])["license"] == "mit"


def test_a_dry_run_on_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "out", Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "model.safetensors":
            write(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            push(PushConfig(run=run, to="org/vq", out=out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private"]
    push(PushConfig(run=run, to="org/vq", out=out))
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert written == published_files(run, VQ)


@pytest.mark.usefixtures("no_downloads")
def test_what_was_published_is_taken_by_its_name(hub: StandInHub, run: Path, tmp_path: Path) -> None:
    push(PushConfig(run=run, to="org/vq", revision="v1"))
    files = hub.repositories["org/vq"].commits[hub.repositories["org/vq"].refs["v1"]]
    assert files.keys() == published_files(run, VQ).keys() | {".gitattributes"}
    name = Path("org/vq@v1")
    assert weights_hash(VQGAN.from_pretrained(name)) == weights_hash(tiny_tokenizer())

    with pytest.raises(ValueError, match=r"org/vq@v1 .*--out"):
        measure(run=name)
    by_name = measure(run=name, out=tmp_path / "measured")
    here = json.loads((run / "evaluation.json").read_text())
    assert {key: found.value for key, found in by_name.items()} == {key: found["value"] for key, found in here.items()}
    assert by_name["psnr"].protocol["tokenizer"] == "org/vq@v1"
    with pytest.raises((ValueError, OSError), match="my photos"):  # the data that its config.json names
        measure(run=name, out=tmp_path / "measured", data=None)

    caches = []
    for number, tokenizer in enumerate((name, run)):
        out = tmp_path / f"cache{number}"
        cache_tokens(
            CacheConfig(tokenizer=tokenizer, out=out, scenes=4, views=1, val_images=2, workers=0, device="cpu")
        )
        caches.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert caches[0] == caches[1]
    assert read_info(tmp_path / "cache0").tokenizer == "org/vq@v1"
    recipe = PRIORS["ar"].recipe(CPU, choose_precision(False, CPU), 1)
    recipe.open_data(override(AR_PRESETS["scenes"], cache=tmp_path / "cache0"))  # a prior trains with the cache's own
    assert recipe.tokenizer_hash == weights_hash(tiny_tokenizer())


@pytest.mark.usefixtures("no_downloads")
def test_a_prior_comes_with_its_tokenizer(
    hub: StandInHub, prior_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(PushConfig(run=prior_run, to="org/ar", private=True))
    assert hub.repositories["org/ar"].private
    samplers = [
        ImageSampler.from_run(source, SamplingConfig(), choose_precision(False, CPU))
        for source in ("org/ar", prior_run)
    ]
    maps = torch.randint(0, 16, (2, 4, 4), dtype=torch.uint8)
    tokens = [sampler.token_sampler.sample(maps, 0) for sampler in samplers]
    assert torch.equal(*tokens)
    assert torch.equal(*(sampler.decode(tokens[0]) for sampler in samplers))
    fetched = [name for name in hub.fetched() if name not in ("config.json", "manifest.json", "model.safetensors")]
    assert sorted(fetched) == [f"tokenizer/{name}" for name in ("config.json", "manifest.json", "model.safetensors")]

    monkeypatch.chdir(tmp_path)
    for source, out in ((Path("org/ar"), "a"), (prior_run, "b")):
        generate(SampleConfig(run=source, out=Path(out), num_images=2, device="cpu"))  # maps of the scenes
    assert Path("a/grid.png").read_bytes() == Path("b/grid.png").read_bytes()
    assert not Path("org").exists()
    card = hub.repositories["org/ar"].commits[hub.repositories["org/ar"].refs["main"]]["README.md"].decode()
    assert "regvq sample --run org/ar --out samples --map map.png" in card


@pytest.mark.usefixtures("no_downloads")
def test_a_folder_of_what_would_be_uploaded(
    hub: StandInHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "published"
    push(PushConfig(run=run, to="org/vq", out=out))
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == published_files(run, VQ)
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
    assert "not uploaded" in capsys.readouterr().out
    assert weights_hash(VQGAN.from_pretrained(out)) == weights_hash(tiny_tokenizer())
    assert read_config(out, VQGANConfig).data.data == Path("my photos")
    with pytest.raises(FileExistsError, match=f"--out {out}"):
        push(PushConfig(run=run, to="org/vq", out=out))


@pytest.mark.usefixtures("no_downloads", "hub")
def test_runs_that_are_not_published(run: Path, prior_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ORGANIZATION/NAME"):
        push(PushConfig(run=run, to="vq"))
    with pytest.raises(FileNotFoundError, match="no such folder: --run org/vq"):
        push(PushConfig(run=Path("org/vq"), to="org/vq"))
    safetensors.torch.save_file(tiny_tokenizer(seed=5).state_dict(), run / "model.safetensors")
    with pytest.raises(ValueError, match=r"evaluation\.json has other weights .*tokenizer_sha256"):
        published_files(run, VQ)
    (run / "evaluation.json").write_text('{"psnr": 3}')
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        published_files(run, VQ)
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        published_files(run, VQ)
    files = {name: (prior_run / "tokenizer" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    write_folder(run / "checkpoints" / "step-0000500", files)
    with pytest.raises(ValueError, match=r"--run .*step-0000500"):
        published_files(run, VQ)
    assert "Not measured" in published_files(run / "checkpoints" / "step-0000500", VQ)["README.md"].decode()
    shutil.rmtree(prior_run / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer/"):
        published_files(prior_run, AR)


@pytest.mark.parametrize("name", ["a key by a link", "a picture by a link", "a key", "a pipe"])
def test_only_images_of_the_run_are_published_as_such(run: Path, tmp_path: Path, name: str) -> None:
    key, picture = tmp_path / "id_ed25519", run / "pictures" / "extra.png"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    if name == "a pipe":
        os.mkfifo(picture)
    elif name == "a key":
        picture.write_bytes(key.read_bytes())
    else:
        picture.symlink_to(key if name == "a key by a link" else tmp_path / "private.png")
    with pytest.raises(ValueError, match=r"extra\.png is not an image of this run: remove it"):
        published_files(run, VQ)


def test_measurements_of_another_prior_are_not_published(prior_run: Path) -> None:
    found = {"name": "FID", "value": 1.0, "data": "scenes", "split": "val", "prior": "autoregressive, 0123456789ab"}
    (prior_run / "evaluation.json").write_text(json.dumps({"fid_g": found}))
    with pytest.raises(ValueError, match="prior autoregressive, 0123456789ab"):
        published_files(prior_run, AR)


def test_only_names_remain_of_paths() -> None:
    values = {
        "data": "/home/me/my photos",
        "text": "folder /home/me/my photos: 3 images, weights (vgg16:/opt/w/vgg16.pth)",
        "kept": ["runs/vq", "images/s", "https://example.org/a/b", "1 / 2", "~/x", None, 3, True],
    }
    assert without_folders(values) == {
        "data": "my photos",
        "text": "folder my photos: 3 images, weights (vgg16:vgg16.pth)",
        "kept": values["kept"],
    }
