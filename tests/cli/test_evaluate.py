"""Whole evaluations of tiny models: their numbers, their protocols, and ranks that share the work."""

import json
import math
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from helpers.evaluations import CODES, IMAGES, make_prior, measure, values
from helpers.runs import run_script
from helpers.tiny_models import TinyNet, scenes_batch, tiny_tokenizer
from PIL import Image
from torch.distributed import TCPStore

from regvq_fast.cli.evaluate import EvaluateConfig
from regvq_fast.config import typed_command
from regvq_fast.data import to_float, to_uint8
from regvq_fast.data.samples import Batch
from regvq_fast.evaluation.fid import frechet_distance, statistics_of
from regvq_fast.evaluation.measurement import Measurement, write_measurements
from regvq_fast.image_grids import save_images
from regvq_fast.precision import choose_precision
from regvq_fast.priors.autoregressive import sample_autoregressive
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PRIORS, SamplingConfig

CPU = torch.device("cpu")


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


@pytest.mark.usefixtures("tiny_nets")
def test_without_features_there_is_no_distance(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "fid_r" not in measure(tmp_path, run=runs["vq"], fid_features="none")
