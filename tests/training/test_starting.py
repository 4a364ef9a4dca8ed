"""Runs that start from weights: frozen parts, whole runs and flags, and a model of taming's on other data."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import FAST, TINY, assert_same_run, checkpoints, records, resume, run_script, state_of
from helpers.taming_models import taming_model, tokens_and_images
from helpers.tiny_models import tiny_vqgan, training_images
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from regvq_fast.config import VQGANConfig, override
from regvq_fast.data.transforms import to_float
from regvq_fast.models import VQGAN
from regvq_fast.quantizers import QUANTIZERS, EMAQuantizer, Quantizer, RegularizedQuantizer
from regvq_fast.training.starting import freeze
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe

SHORT = "--steps 4 --batch-size 4 --val-images 6 --log-every 2 --device cpu --warmup-steps 2 --workers 0".split() + FAST
PARTS = {
    "encoder": ("encoder.", "quant_conv."),
    "decoder": ("decoder.", "post_quant_conv."),
    "codebook": ("quantize.",),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a discriminator that trained."""
    out = tmp_path_factory.mktemp("base") / "run"
    run_script(*TINY, *FAST, "--quantizer", "vq-gan", "--disc-start", 1, "--attn-resolutions", 16, "--out", out)
    return out


def start(source: object, out: Path, *flags: object) -> dict[str, Any]:
    """Train from weights; return the run's config.json."""
    run_script("--init-from", source, *SHORT, "--out", out, *flags)
    return json.loads((out / "config.json").read_text())


# --- frozen parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "parts"),
    [
        *((name, part) for name, kind in QUANTIZERS.items() if kind.adopt is not Quantizer.adopt for part in PARTS),
        ("reg-vq", "encoder codebook"),
        ("vq-gan", "encoder decoder"),
        ("vq-gan", "decoder codebook"),
    ],
)
def test_frozen_parts_stay_to_the_last_bit(base: Path, quantizer: str, parts: str) -> None:
    config = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=9, ema=0.5,
        attn_resolutions=(16,), batch_size=4, perceptual_weight=0, contrastive="none", device="cpu", disc_start=1,
        disc_filters=4, quantizer=quantizer, init_from=str(base), freeze=tuple(parts.split()), dropout=0.3, lr=0.01,
        **({"logits": "distance"} if quantizer == "reg-vq" else {}),
    )  # fmt: skip
    trainer = Trainer(VQGANRecipe, config)
    model = trainer.networks.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        trainer.step(step)
    assert trainer.record()[0]["lambda"] > 0  # the adaptive weight needs no gradient of the last layer
    prefixes = tuple(prefix for part in parts.split() for prefix in PARTS[part])
    optimized = {
        id(p) for group in trainer.optimization.optimizers["grad_norm"][0].param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        frozen = name.startswith(prefixes)
        learned = name != "quantize.embedding.weight" or quantizer not in ("vq-vae", "simvq")
        assert frozen == (id(parameter) not in optimized) or not learned, name
        if frozen:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None
            assert torch.equal(trainer.eval_model.state_dict()[name], before[name]), name
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    free = [part for part in PARTS if part not in parts.split()]
    assert all(any(name.startswith(PARTS[part]) for name in changed) for part in free), (free, changed)


def test_nothing_left_to_train() -> None:
    with pytest.raises(ValueError, match="--freeze encoder decoder codebook"):
        freeze(tiny_vqgan(), ("encoder", "decoder", "codebook"))
    with pytest.raises(ValueError, match="--freeze encoder decoder"):
        freeze(tiny_vqgan(EMAQuantizer(4, 4)), ("encoder", "decoder"))


def test_frozen_parts_compile_as_one_graph() -> None:
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_vqgan(RegularizedQuantizer(32, 4), z_channels=8)
        model.initialize_quantizer(training_images())
        freeze(model, ("encoder", "codebook"))
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        forward(training_images()[:2], torch.tensor(3)).reconstruction.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, graph = gradients
    assert {name.split(".")[0] for name, gradient in plain.items() if gradient is not None} == {
        "decoder",
        "post_quant_conv",
    }
    for name, gradient in plain.items():
        assert (gradient is None) == (graph[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(graph[name], gradient, rtol=1e-4, atol=1e-6)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_continues_from_another_ones_weights_with_its_discriminator(base: Path, tmp_path: Path) -> None:
    config = start(
        base, tmp_path / "run", "--quantizer", "reg-vq", "--disc-start", 0, "--freeze", "encoder", "codebook"
    )
    assert {name: config["model"][name] for name in ("ch", "ch_mult", "z_channels", "disc_filters")} == {
        "ch": 8, "ch_mult": [1, 2], "z_channels": 8, "disc_filters": 4,
    }  # fmt: skip
    assert (config["data"]["image_size"], config["quantizer"]["num_codes"]) == (32, 16)
    assert config["quantizer"]["logits"] == "distance"
    assert config["model"]["init_from"] == str(base)
    assert "discriminator taken" in config["facts"]["weights"]
    assert config["facts"]["codebook"].startswith("16 codes of NearestQuantizer taken over")
    assert "encoder, codebook" in config["facts"]["frozen"]
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", base))
    for name, value in theirs.items():
        same = name.startswith(("encoder.", "quant_conv.", "quantize.embedding"))
        assert torch.equal(ours[name], value) == same, name
    assert "lambda" in records(tmp_path / "run")[0]
    first = state_of(base / "checkpoints" / checkpoints(base)[-1])["others"][0]["main.0.weight"]
    now = state_of(tmp_path / "run" / "checkpoints" / checkpoints(tmp_path / "run")[-1])["others"][0]["main.0.weight"]
    assert 0 < (now - first).norm() < 0.1 * first.norm()


def test_resuming_needs_the_runs_own_folder_alone(base: Path, tmp_path: Path) -> None:
    flags = ["--quantizer", "reg-vq", "--freeze", "encoder", "--disc-start", 1, "--checkpoint-every", 2, "--ema", 0.5]
    shutil.copytree(base, tmp_path / "weights")
    for name, steps in (("whole", 4), ("parts", 2)):
        start(tmp_path / "weights", tmp_path / name, *flags, "--steps", steps)
    shutil.rmtree(tmp_path / "weights")
    resume(tmp_path / "parts", "--steps", 4)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_images_of_another_size_keep_attention_at_its_levels(base: Path, tmp_path: Path) -> None:
    config = start(base / "checkpoints" / checkpoints(base)[-1], tmp_path / "run", "--image-size", 48)
    assert config["model"]["attn_resolutions"] == [24]
    assert config["quantizer"]["quantizer"] == "vq-gan"
    model = VQGAN.from_pretrained(tmp_path / "run")
    assert model.token_shape == (24, 24)


def test_a_new_codebook_may_have_another_size(base: Path, tmp_path: Path) -> None:
    config = start(
        base / "model.safetensors", tmp_path / "run", "--reset-codebook", "--num-codes", 40, "--disc-layers", 1
    )
    assert config["architecture"]["quantizer"]["num_codes"] == 40
    assert config["facts"]["codebook"].startswith("40 codes fitted")
    assert "discriminator" not in config["facts"]["weights"]  # which has two layers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ch", "16"], r"--ch 16 contradicts .*\b8: leave it out"),
        (["--ch-mult", "1", "2", "2"], r"--ch-mult 1 2 2 contradicts .*1 2: "),
        (["--norm-groups", "2"], r"--norm-groups 2 contradicts .*None"),
        (["--num-codes", "32"], r"--num-codes 32 contradicts .*\b16: .*--reset-codebook"),
        (["--attn-resolutions", "32"], r"--attn-resolutions 32 contradicts .*\b16 "),
        (["--init-from", "no/such"], "no/such"),
        (["--freeze", "encoder", "decoder", "codebook"], "--freeze encoder decoder codebook"),
        (["--image-size", "33"], r"--image-size 33"),
        (["--quantizer", "lfq"], r"--quantizer lfq has fixed codes"),
    ],
)
def test_flags_that_contradict_the_weights_are_one_sentence(
    base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        start(base, tmp_path / "run", *flags)
    assert not list(tmp_path.iterdir())


def test_weights_without_a_table_of_codes_start_their_own_kind_and_by_distance_others(tmp_path: Path) -> None:
    out = tmp_path / "lfq"
    run_script(*TINY, *FAST, "--quantizer", "lfq", "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert (config["quantizer"]["num_codes"], config["quantizer"]["code_dim"]) == (16, 4)
    assert config["architecture"]["quantizer"]["code_dim"] == 4
    same = start(out, tmp_path / "same", "--temperature", 0.5)
    assert same["facts"]["codebook"].startswith("16 codes taken; ")
    other = start(out, tmp_path / "other", "--quantizer", "reg-vq")
    before, after = (word for word in other["facts"]["codebook"].split() if "." in word)
    assert before == after
    for flags, message in (
        (["--num-codes", 32], "--quantizer lfq has 32 codes of 5 channels .* 16 of 4"),
        (["--reset-codebook"], "--quantizer lfq has fixed codes.*--reset-codebook"),
        (["--quantizer", "bsq"], "--quantizer bsq has fixed codes"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            start(out, tmp_path / "refused", *flags)


def test_flags_for_weights_need_weights(tmp_path: Path) -> None:
    for flags in (["--reset-codebook"], ["--freeze", "encoder"]):
        with pytest.raises(SystemExit, match=rf"^error: {flags[0]}.*--init-from"):
            run_script(*TINY, *FAST, "--out", tmp_path / "run", *flags)


# --- taming's files --------------------------------------------------------------------------------------------------


def stripes(folder: Path, split: str, count: int, seed: int) -> None:
    """Images that the scenes have nothing of: stripes of two colours."""
    (folder / split).mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for k in range(count):
        colours = generator.integers(0, 255, (2, 3))
        period, phase = generator.integers(3, 9), generator.integers(0, 9)
        wave = (np.arange(16) + phase) // period % 2
        pixels = np.broadcast_to(colours[wave][:, None], (16, 16, 3))
        pixels = pixels if generator.integers(2) else pixels.transpose(1, 0, 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"{k}.png")


def psnr(reconstruction: Tensor, wanted: Tensor) -> float:  # dB
    return float(-10 * ((reconstruction.clamp(-1, 1) - wanted) / 2).square().mean().log10())


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq-gan", "reg-vq"])
def test_fine_tuning_a_model_of_tamings_on_other_data(tmp_path: Path, quantizer: str) -> None:
    theirs = taming_model(ch=64, ch_mult=(1, 1), resolution=16, attn_resolutions=()).train()
    scenes = to_float(torch.from_numpy(np.stack([_scene(k) for k in range(64)])))
    optimizer = torch.optim.Adam(theirs.parameters(), 2e-3)
    for step in range(100):  # on scenes
        reconstruction, loss = theirs(batch := scenes[step * 4 % 64 :][:4])
        optimizer.zero_grad()
        ((reconstruction - batch).abs().mean() + loss).backward()
        optimizer.step()
    theirs.eval()
    torch.save({"epoch": 0, "state_dict": theirs.state_dict()}, tmp_path / "last.ckpt")
    for split, count in (("train", 120), ("val", 16)):
        stripes(tmp_path / "stripes", split, count, seed=count)
    val = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in (tmp_path / "stripes" / "val").iterdir()])
    val = to_float(val.permute(0, 3, 1, 2))
    _, expected = tokens_and_images(theirs, val)
    before = psnr(expected, val)
    config = start(
        tmp_path / "last.ckpt", tmp_path / "run", "--data", tmp_path / "stripes", "--quantizer", quantizer,
        "--image-size", 16, "--steps", 50, "--lr", 1e-3, "--val-images", 16, "--crop", "center", "--batch-size", 8,
    )  # fmt: skip
    assert config["model"]["norm_groups"] == 32
    assert "VQModel of taming-transformers" in config["facts"]["weights"]
    assert "discriminator taken" in config["facts"]["weights"]
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["psnr"]
    print(f"{quantizer}: {before:.2f} dB before, {after:.2f} dB after 50 steps; {config['facts']['codebook']}")
    assert after > before + 0.2


def _scene(number: int) -> np.ndarray:
    from regvq_fast.scenes import ScenesDataset

    return np.asarray(ScenesDataset("train", 16, length=64)[number]["image"])
