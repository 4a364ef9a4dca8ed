"""Whole evaluations of tiny models: their numbers, their protocols, and what is refused before work starts."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import tyro
from helpers.runs import run_script
from helpers.tiny_models import TinyNet, scenes_batch, tiny_tokenizer, tiny_vqgan
from PIL import Image
from torch import Tensor, nn
from torch.distributed import TCPStore

from regvq_fast.cli import evaluate as evaluation
from regvq_fast.cli import evaluate_setup
from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.config import VQGAN_PRESETS, VQGANConfig, override, typed_command
from regvq_fast.data import ImageFolder, to_float, to_uint8
from regvq_fast.data.samples import Batch
from regvq_fast.evaluation.fid import frechet_distance, statistics_of
from regvq_fast.evaluation.measurement import Measurement, write_measurements
from regvq_fast.evaluation.metrics import SampledImages
from regvq_fast.image_grids import save_images
from regvq_fast.models.features import VGGFeatures
from regvq_fast.ownership import FolderLock
from regvq_fast.precision import choose_precision
from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.priors.autoregressive.config import AR_PRESETS
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.priors.registry import PRIORS, SamplingConfig

CODES, IMAGES = 32, 12
CPU = torch.device("cpu")


def make_prior() -> TokenTransformer:
    torch.manual_seed(1)
    return TokenTransformer(CODES, 16, token_shape=(8, 8), condition_shape=(4, 4), width=16, depth=1, heads=2).eval()


def make_maskgit() -> MaskGIT:
    torch.manual_seed(3)
    return MaskGIT(CODES, 16, token_shape=(8, 8), width=16, depth=1, heads=2).eval()


def make_diffusion() -> VQDiffusion:
    torch.manual_seed(2)
    encoder = WordEncoder(width=16, depth=1, heads=2, max_words=8, buckets=64, truncate=True)
    return VQDiffusion(CODES, token_shape=(8, 8), text_encoder=encoder, num_steps=4, width=16, depth=1, heads=2).eval()


def save_run(folder: Path, model: Any, config: Any) -> Path:
    """Write the files of a training run: weights without a manifest, configuration and architecture."""
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    content = dataclasses.asdict(config) | {"architecture": model.architecture()}
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


@pytest.fixture(scope="module")
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


class TinyDistance(nn.Module):
    """Stands for LPIPS."""

    name, hash, min_size = "tiny distance", "0" * 12, 4

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        self.trunk = type("Trunk", (), {"label": "tiny"})()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def tiny_nets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small networks behind the metrics, and a cache of this test's own."""
    monkeypatch.setattr(evaluate_setup, "load_feature_net", lambda spec: TinyNet())
    monkeypatch.setattr(evaluation, "PerceptualDistance", TinyDistance)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def measure(out: Path, **settings: Any) -> dict[str, Measurement]:
    config = {"data": Path("scenes"), "val_images": IMAGES, "batch_size": 5, "device": "cpu", "workers": 0, **settings}
    return evaluate(EvaluateConfig(out=out, **config))


def values(found: dict[str, Measurement]) -> dict[str, float]:
    return {key: measurement.value for key, measurement in found.items()}


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.usefixtures("tiny_nets")
def test_a_tokenizer_by_hand(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(tmp_path / "out", run=runs["vq"])
    model, images, net = tiny_tokenizer(), scenes_batch(IMAGES)["image"], TinyNet()
    with torch.no_grad():
        output = model(to_float(images))
    reconstructions = to_uint8(output.reconstruction)
    counts = torch.bincount(output.quantizer.indices.flatten(), minlength=CODES)
    assert counts.sum() == IMAGES * 64
    at_each = [torch.bincount(codes, minlength=CODES) for codes in output.quantizer.indices.flatten(1).T]
    entropies = torch.distributions.Categorical(torch.stack(at_each).double()).entropy() / math.log(2)
    expected = {
        "psnr": (10 * (255**2 / (reconstructions.float() - images).square().flatten(1).mean(1)).log10()).mean(),
        "perceptual": (reconstructions.float() - images).abs().mean() / 127.5,
        "utilization": (counts > 0).float().mean(),
        "perplexity": torch.distributions.Categorical(counts.double()).entropy().exp(),
        "position_entropy": entropies.mean(),
        "fid_r": frechet_distance(statistics_of([images], net), statistics_of([reconstructions], net)),
    }
    for key, value in expected.items():
        assert found[key].value == pytest.approx(float(value), rel=1e-4), key
    assert found.keys() == expected.keys() | {"ssim"}

    assert (tmp_path / "out" / "token_entropy.png").is_file()
    spread = found["position_entropy"].protocol
    assert (spread["lowest"], spread["highest"]) == pytest.approx((float(entropies.min()), float(entropies.max())))
    assert spread["highest"] <= spread["bound"] == math.log2(IMAGES)
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for key, measurement in found.items():
        assert saved[key] == {"name": measurement.name, "value": measurement.value, **measurement.protocol}
        assert (saved[key]["data"], saved[key]["split"], saved[key]["images"]) == (
            "embedded scenes, seed 0",
            "val",
            IMAGES,
        )
        assert (saved[key]["image_size"], saved[key]["precision"], saved[key]["device"]) == (16, "fp32", "CPU")
        assert {"crop", "resize", "fingerprint", "tokenizer_sha256", "versions"} < saved[key].keys()
    assert json.loads((tmp_path / "out" / "code_counts.json").read_text()) == counts.tolist()
    assert saved["fid_r"]["name"] == "Fréchet distance[R] (tiny)"
    assert (saved["fid_r"]["samples"], saved["fid_r"]["features_sha256"]) == (IMAGES, net.hash)
    assert saved["perceptual"]["network_sha256"] == "0" * 12
    printed = capsys.readouterr().out
    assert f"{found['fid_r'].value:.5g}" in printed
    assert found["psnr"].protocol["fingerprint"] in printed


@pytest.mark.usefixtures("tiny_nets")
def test_neither_a_second_run_nor_the_batch_size_moves_a_number(runs: dict[str, Path], tmp_path: Path) -> None:
    found = [
        values(measure(tmp_path, prior_run=runs["ar"], top_p=0.9, batch_size=batch, cache_dir=tmp_path / cache))
        for batch, cache in ((5, "a"), (5, "a"), (5, "b"), (12, "c"))
    ]
    assert found[0] == found[1] == found[2]  # to the last bit, whether statistics were cached or not
    assert found[0]["fid_g"] > 0
    for key, value in found[3].items():  # up to what convolutions make of another batch size
        assert value == pytest.approx(found[0][key], rel=1e-5), key


@pytest.mark.usefixtures("tiny_nets")
@pytest.mark.parametrize("name", PRIORS)
def test_one_image_is_drawn_for_each_condition(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    found = measure(tmp_path, prior_run=runs[name], temperature=0.8, seed=4)
    sampler = ImageSampler.from_run(runs[name], SamplingConfig(temperature=0.8, seed=4), choose_precision(False, CPU))
    whole, net = scenes_batch(IMAGES), TinyNet()
    drawn = sampler.sample(whole, 0)
    expected = frechet_distance(statistics_of([whole["image"]], net), statistics_of([drawn], net))
    assert found["fid_g"].value == pytest.approx(expected, rel=1e-6)
    assert found["fid_g"].value != found["fid_r"].value
    protocol = found["fid_g"].protocol
    assert (protocol["temperature"], protocol["seed"], protocol["samples"]) == (0.8, 4, IMAGES)
    assert ("steps" in protocol, "top_p" in protocol) == (name != "ar", name == "ar")
    assert found["fid_r"].protocol["tokenizer"] == str(runs[name] / "tokenizer")

    part = Batch(image=whole["image"][7:], segmentation=whole["segmentation"][7:], caption=whole["caption"][7:])
    assert torch.equal(sampler.sample(part, 7), drawn[7:])
    assert not torch.equal(sampler.sample(part, 0), drawn[7:])


def test_the_command_of_a_measurement_is_its_own() -> None:
    config = EvaluateConfig(
        run=Path("my runs/vq"), data=Path("scenes"), amp=True, val_images=3, guidance=2.5, fid_features="none"
    )
    command = typed_command("evaluate", config)
    assert command.startswith("regvq evaluate ")
    assert "'my runs/vq'" in command
    assert tyro.cli(EvaluateConfig, args=shlex.split(command)[2:]) == config
    assert typed_command("evaluate", EvaluateConfig()) == "regvq evaluate"


def test_maps_become_conditions_by_majority() -> None:
    prior, tokenizer = make_prior(), tiny_tokenizer()
    sampler = ImageSampler(prior, tokenizer, SamplingConfig(top_k=5), choose_precision(False, CPU))
    maps = torch.zeros(2, 16, 16, dtype=torch.uint8)
    maps[1, :, 5:] = 3
    coarse = torch.tensor([[0, 3, 3, 3]]).expand(4, 4)
    tokens = sample_autoregressive(prior, torch.stack([torch.zeros_like(coarse), coarse]), seed=0, top_k=5)
    batch = Batch(image=torch.zeros(2, 3, 16, 16, dtype=torch.uint8), segmentation=maps)
    with torch.no_grad():
        assert torch.equal(sampler.sample(batch, 0), to_uint8(tokenizer.decode_indices(tokens)))
    batch["segmentation"] = maps + 20
    with pytest.raises(ValueError, match=r"\b23\b.*\b16\b"):
        sampler.sample(batch, 0)
    with pytest.raises(TypeError, match=r"\blist\b"):
        sampler.sample_under(["bricks"], 0)
    with pytest.raises(ValueError, match=r"states .*autoregressive"):
        sampler.sample_under(maps, 0, states=[])


@pytest.mark.usefixtures("tiny_nets")
def test_images_that_are_there(runs: dict[str, Path], tmp_path: Path) -> None:
    sampler = ImageSampler.from_run(runs["ar"], SamplingConfig(), choose_precision(False, CPU))
    save_images(tmp_path / "drawn", sampler.sample(scenes_batch(IMAGES), 0))
    Image.new("RGB", (70, 70)).save(tmp_path / "drawn" / "grid.png")
    alone = measure(tmp_path / "alone", images=tmp_path / "drawn", image_size=16)
    assert alone.keys() == {"fid_g"}
    beside = measure(tmp_path / "beside", images=tmp_path / "drawn", run=runs["vq"])
    drawn = measure(tmp_path / "prior", prior_run=runs["ar"])
    assert alone["fid_g"].value == beside["fid_g"].value == pytest.approx(drawn["fid_g"].value, rel=1e-9)
    assert values(beside)["fid_r"] == values(drawn)["fid_r"]
    assert alone["fid_g"].protocol["samples"] == IMAGES


def test_folders_of_drawn_images_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        SampledImages(tmp_path / "nowhere", 16)
    with pytest.raises(FileNotFoundError, match="no images in"):
        SampledImages(tmp_path, 16)
    Image.new("L", (16, 16)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].shape == (3, 16, 16)
    # As the images they are compared with: 16 bits are scaled, what is transparent is white.
    Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].unique().tolist() == [128]
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "0.png")
    assert SampledImages(tmp_path, 16)[0]["image"].unique().tolist() == [255]
    Image.new("RGB", (16, 24)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png .*16 x 24"):
        SampledImages(tmp_path, 16)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png is not an image"):
        SampledImages(tmp_path, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_drawn_images_that_were_cut_off(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"0.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    whole = file.read_bytes()
    drawn = SampledImages(tmp_path, 64)
    for content in (whole[:-20], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"0.{suffix} (can't be read|is not an image)"):
            SampledImages(tmp_path, 64)
    with pytest.raises(ValueError, match=rf"0.{suffix} (can't be read|is not an image)"):
        drawn[0]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write_measurements(tmp_path / "x.json", {"psnr": Measurement("PSNR (dB)", float("inf"), {"images": 1})})
    assert json.loads((tmp_path / "x.json").read_text()) == {"psnr": {"name": "PSNR (dB)", "value": None, "images": 1}}


def on_two_ranks(*works: Callable[[], object]) -> None:
    """Do the works one after the other on two ranks, each in a process group of its own, as torchrun would.

    Forked, the ranks have the small networks, and needn't import anything.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in works]
    ports = [store.port for store in stores]

    def be(rank: int) -> None:
        torch.set_num_threads(1)  # what a forked process may count on, as the loader's workers do
        os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the stores are here already
        for port, work in zip(ports, works, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            work()

    ranks = [multiprocessing.get_context("fork").Process(target=be, args=(rank,), daemon=True) for rank in (0, 1)]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 120
        for process in ranks:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.usefixtures("tiny_nets")
def test_two_ranks_measure_what_one_does(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    (photos / "val" / "00000.png").write_bytes(b"no image")  # which every rank opens

    def measure_scenes() -> None:
        measure(tmp_path / "two", prior_run=runs["ar"], val_images=11, cache_dir=tmp_path / "shared")

    def measure_photos() -> None:
        measure(tmp_path / "photos-two", run=runs["vq"], data=photos)

    for name, low in (("samples", 100), ("reference", 0)):
        images = np.random.default_rng(low).integers(low, 256, (9, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)
    suite = {
        "images": tmp_path / "samples.npz",
        "reference": tmp_path / "reference.npz",
        "data": None,
        "val_images": None,
    }

    def measure_suite() -> None:
        measure(tmp_path / "suite-two", **suite)

    def fail() -> None:
        with pytest.raises(SystemExit) as stop:
            run_script("--run", "nowhere", "--device", "cpu", script="evaluate.py")
        (tmp_path / f"said-{os.environ['RANK']}").write_text(str(stop.value.code))

    on_two_ranks(measure_scenes, measure_photos, measure_suite, fail)
    one = measure(tmp_path / "one", prior_run=runs["ar"], val_images=11)
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    for key, number in one.items():
        assert two[key]["value"] == pytest.approx(number.value, rel=1e-5), key
    assert two["fid_g"]["samples"] == 11
    assert two["fid_g"]["device"] == "CPU, 2 processes"
    assert len(list((tmp_path / "shared").iterdir())) == 1
    of_photos = json.loads((tmp_path / "photos-two" / "evaluation.json").read_text())
    assert (of_photos["psnr"]["images"], of_photos["psnr"]["unreadable"]) == (6, 1)
    of_suite = json.loads((tmp_path / "suite-two" / "evaluation.json").read_text())
    for key, number in measure(tmp_path / "suite-one", **suite).items():
        assert of_suite[key]["value"] == pytest.approx(number.value, rel=1e-9), key
    assert of_suite.keys() == {"fid_g", "precision", "recall"}
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said[0].startswith("error: no such folder: nowhere")
    assert said[1] == "1"  # the status alone


def test_the_script_with_real_networks(runs: dict[str, Path], tmp_path: Path) -> None:
    flags = f"--data scenes --val-images 3 --device cpu --workers 0 --cache-dir {tmp_path} --out {tmp_path}".split()
    nets = ["--fid-features", f"vgg16:{runs['vgg']}", "--perceptual-weights", runs["vgg"]]
    run_script("--prior-run", runs["ar"], "--top-k", 3, *flags, *nets, script="evaluate.py")
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["fid_g"]["name"] == "Fréchet distance[G] (VGG-16 of vgg.safetensors, relu5_3 averaged)"
    assert saved["perceptual"]["name"] == "perceptual distance (VGG-16 of vgg.safetensors)"
    assert "3 images are too few for 512 features" in saved["fid_g"]["note"]
    assert saved["fid_g"]["top_k"] == 3


# ----------------------------------------------------------------------------------------------- what is to be compared


@pytest.mark.usefixtures("tiny_nets")
def test_data_is_what_the_run_was_trained_on_and_all_of_its_split(photos: Path, tmp_path: Path) -> None:
    config = override(VQGAN_PRESETS["scenes"], data=photos, val_images=2)
    run = save_run(tmp_path / "run", tiny_tokenizer(), config)
    found = evaluate(EvaluateConfig(run=run, device="cpu", workers=0))
    assert found["psnr"].protocol["images"] == len(ImageFolder(photos, "val")) == 6
    assert found["psnr"].protocol["data"] == str(photos)
    assert (run / "evaluation.json").is_file()
    assert "unreadable" not in found["psnr"].protocol
    scenes = tmp_path / "scenes"
    photos.rename(scenes)
    with contextlib.chdir(tmp_path):  # a folder of that name is one
        here = save_run(tmp_path / "here", tiny_tokenizer(), override(config, data=Path("scenes")))
        for data in (None, Path("scenes")):
            found = evaluate(EvaluateConfig(run=here, device="cpu", workers=0, data=data))
            assert found["psnr"].protocol["data"] == str(scenes)
    scenes.rename(photos)
    few = evaluate(EvaluateConfig(run=run, device="cpu", workers=0, val_images=3))
    assert few["psnr"].protocol["images"] == 3

    for name, tokens in (("trained", {"data": photos, "on_the_fly": True}), ("cached", {"cache": Path("gone")})):
        prior = save_run(tmp_path / name, make_prior(), override(AR_PRESETS["scenes"], **tokens))
        tiny_tokenizer().save_pretrained(prior / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"6 .*photos.* segmentation"):
        evaluate(EvaluateConfig(prior_run=tmp_path / "trained", device="cpu"))
    with pytest.raises(ValueError, match=r"token cache gone .*--data"):
        evaluate(EvaluateConfig(prior_run=tmp_path / "cached", device="cpu"))


@pytest.mark.usefixtures("tiny_nets")
def test_images_that_cannot_be_read_are_counted(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    third = sorted((photos / "val").iterdir())[2]  # neither the first nor the last, which are always read
    third.with_name(f"{third.stem}-.png").write_bytes(b"no image")
    found = measure(tmp_path / "out", run=runs["vq"], data=photos)
    assert all((number.protocol["images"], number.protocol["unreadable"]) == (7, 1) for number in found.values())

    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for k in range(2):
        Image.new("RGB", (16, 16)).save(drawn / f"{k}.png")
    for _ in range(2):  # the second time, the statistics of the others come from the cache
        found = measure(tmp_path / "out", images=drawn, image_size=16, data=photos, cache_dir=tmp_path / "cache")
        assert found["fid_g"].protocol["unreadable"] == 1


@pytest.mark.usefixtures("tiny_nets")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--run, --prior-run or --images"),
        ({"run": "nowhere"}, "nowhere"),
        ({"run": "ar"}, r"TokenTransformer.* VQGAN"),
        ({"prior_run": "vq"}, r"VQGAN.* TokenTransformer or VQDiffusion"),
        ({"prior_run": "ar", "run": "other"}, "--prior-run"),
        ({"prior_run": "ar", "images": "vq"}, "exclude each other"),
        ({"run": "vq", "top_p": 0.5}, r"--top-p 0\.5 "),
        ({"run": "vq", "guidance": 3.0}, r"--guidance 3\.0 "),
        ({"images": "vq"}, "needs --image-size"),
        ({"images": "vq", "image_size": 0}, r"--image-size .*\b0$"),
        ({"run": "vq", "image_size": 32}, r"--image-size 32 .*--images"),
        ({"images": "vq", "image_size": 16}, "no images in"),
        ({"run": "other", "data": None}, "--data"),
        ({"run": "vq", "data": Path("nowhere")}, "nowhere"),
        ({"run": "vq", "val_images": 0}, r"--val-images .*\b0$"),
        ({"run": "vq", "val_images": 1}, r"\b2 validation images.*\b1$"),
        ({"run": "vq", "batch_size": 0}, r"--batch-size .*\b0$"),
        ({"run": "vq", "device": "tpu"}, "--device tpu"),
        ({"prior_run": "ar", "steps": 3}, r"--steps .*autoregressive"),
        ({"prior_run": "diffusion", "top_k": 3}, r"--top-k .*diffusion"),
        ({"prior_run": "diffusion", "steps": 5}, r"steps .*\b4\b.*\b5$"),
        ({"prior_run": "ar", "top_p": 1.5}, "top_p"),
        ({"prior_run": "ar", "fid_features": "none"}, "--fid-features none"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    settings: dict[str, Any], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = {k: runs.get(v, Path(v)) if k in ("run", "prior_run", "images") else v for k, v in settings.items()}
    with pytest.raises((ValueError, OSError), match=message):
        measure(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny_nets")
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("regvq_fast.cli.evaluate.evaluate_tokenizer", lambda *_, **__: pytest.fail("it works"))
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match=f"--out {out} .*file"):
            measure(out, run=runs["vq"])
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"\bout\b"):
        measure(tmp_path / "out", run=runs["vq"])


@pytest.mark.usefixtures("tiny_nets")
def test_a_folder_that_another_process_evaluates_into_is_refused_before_the_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regvq_fast.cli.evaluate.evaluate_tokenizer", lambda *_, **__: pytest.fail("it works"))
    out = tmp_path / "out"
    refused = pytest.raises(FileExistsError, match=f"out is in use by process {os.getpid()} ")
    with FolderLock(out, "evaluation"), refused:
        measure(out, run=runs["vq"])
    assert list(out.iterdir()) == []


def test_the_script_ends_with_the_sentence(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--fid-features resnet"):
        run_script("--run", runs["vq"], "--fid-features", "resnet", script="evaluate.py")
    tiny_vqgan(image_size=8).save_pretrained(tmp_path / "small")
    flags = ["--fid-features", "none", "--perceptual-weights", runs["vgg"]]
    with pytest.raises(SystemExit, match=r"SSIM .*\b8\b"):
        run_script("--run", tmp_path / "small", *flags, script="evaluate.py")


@pytest.mark.usefixtures("tiny_nets")
def test_without_features_there_is_no_distance(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "fid_r" not in measure(tmp_path, run=runs["vq"], fid_features="none")
