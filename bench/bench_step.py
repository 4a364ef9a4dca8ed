"""The whole training step, beside that of taming-transformers at the same sizes, discriminator included.

pytest bench/bench_step.py -k small                     on the CPU: a small model, 4 images of 64 pixels
pytest bench/bench_step.py -k paper                     on a GPU: the paper's model and batch, 40 images of 256 pixels
pytest bench/bench_step.py -s -k target                 only the claims, whose steps take turns; prints their numbers

``--benchmark-json FILE`` keeps what was measured. Like for like are the steps of one VQ-GAN: L1, LPIPS, adversarial
loss with its adaptive weight, codebook loss, both optimizers, on images that are there; ours is the whole step of
``train/vq.py``, clipping and supervision included. The rows reg-vq are the full Reg-VQ: masked stochastic quantization,
prior regularizer, contrastive loss (with a VGG-19 in the paper's model). taming needs ``pip install --no-deps
taming-transformers-rom1504``. Memory on a GPU is the peak of what a step allocates, with weights and optimizer states;
on the CPU it is what a step adds to them.
"""

import functools
import itertools
import warnings
from typing import Any, cast
from unittest import mock

import measuring
import peers
import pytest
import torch
from step_parts import parts_of_step
from taming_step import TamingStep
from torch import Tensor, nn

from regvq_fast.config import VQGAN_PRESETS, VQGANConfig, override
from regvq_fast.data.transforms import to_float
from regvq_fast.models.features import VGGFeatures
from regvq_fast.precision import choose_precision
from regvq_fast.training import build
from regvq_fast.training import trainer as training
from regvq_fast.training.compilation import CPU_STEPS
from regvq_fast.training.recipe import Step
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe

SIZES = {
    "small": override(
        VQGAN_PRESETS["scenes"], device="cpu", batch_size=4, ch_mult=(1, 1, 2, 4), steps=CPU_STEPS, disc_start=0
    ),
    "paper": override(VQGAN_PRESETS["ade20k"], device="cuda", preset="scenes", steps=1000, disc_start=0),
}
LIKE_FOR_LIKE: dict[str, Any] = {"quantizer": "vq-gan", "contrastive": "none", "amp": False, "compile": False}
REG_VQ = {"quantizer": "reg-vq", "contrastive": "pcl"}
MODES: dict[str, dict[str, Any]] = {
    "taming": {},
    "taming-amp": {"amp": True},
    "fp32": {},
    "amp": {"amp": True},
    "amp-compile": {"amp": True, "compile": True},
    "reg-vq": REG_VQ,
    "reg-vq-amp-compile": {"amp": True, "compile": True, **REG_VQ},
}
# By importance: a GPU's time may run out. On a CPU one is compiled, since compiling takes longer than all the rest.
MEASURED = {
    "small": ("taming", "fp32", "amp-compile", "reg-vq"),
    "paper": ("taming-amp", "amp-compile", "taming", "reg-vq-amp-compile", "reg-vq", "fp32"),
}
REPEATS = 10
# How far a compiled step may be off. Adaptive weight and gradients come out of small differences of rounded numbers.
COMPILED_AGREES = {"l1": 0.03, "loss": 0.03, "discriminator": 0.05, "grad_norm": 0.3, "grad_norm_discriminator": 0.3}


def make_images(config: VQGANConfig) -> Tensor:
    """A batch (B, 3, H, W) of uint8, as a loader gives it, but on the device."""
    shape = (config.optimizer.batch_size, 3, config.data.image_size, config.data.image_size)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return images.to(config.run.device)


def make_trainer(config: VQGANConfig, images: Tensor) -> Trainer[VQGANConfig]:
    """Return a trainer, always on these images, its feature networks with random weights; one step is done.

    Where it compiles, that step must have the numbers of one that doesn't, as far as 16 bits tell.
    """
    with (
        mock.patch.object(build, "load_vgg_features", lambda net, weights: VGGFeatures(net)),
        mock.patch.object(training, "training_batches", return_value=itertools.repeat({"image": images})),
    ):
        trainer = Trainer(VQGANRecipe, config)
        expected = plain_numbers(trainer, images) if config.run.compile else {}
        trainer.step(0)  # which opens the batches
    if expected:
        check_compiled(trainer.record()[0], expected)
    return trainer


def plain_numbers(trainer: Trainer[VQGANConfig], images: Tensor) -> dict[str, float]:
    """Return losses and gradient norms of the first step by networks that aren't compiled; nothing changes."""
    trainer.optimization.begin()
    trainer.seed += 1  # as a step does
    scale = trainer.optimization.loss_scale(1)
    first_image = torch.zeros((), dtype=torch.int64, device=trainer.device)
    now = Step(0, trainer.seed, first_image, scale, synchronize=False, plain=True)
    found = trainer.recipe.step({"image": images}, now)
    for name in trainer.networks.active(0):
        gradients = [p.grad for p in trainer.networks.trained[name].parameters() if p.grad is not None]
        found[name] = nn.utils.get_total_norm(gradients) / scale
    trainer.seed -= 1
    trainer.optimization.undo()
    return {name: float(value) for name, value in found.items()}


def make_run(size: str, mode: str) -> measuring.Run:
    config = override(SIZES[size], **(LIKE_FOR_LIKE | MODES[mode]))
    torch._dynamo.config.recompile_limit = 64  # for all sizes and modes in one process
    images = make_images(config)
    if mode.startswith("taming"):
        taming = TamingStep(config, choose_precision(config.run.amp, images.device))
        return functools.partial(taming, to_float(images))
    return functools.partial(make_trainer(config, images).step, 1)


def check_compiled(found: dict[str, Any], expected: dict[str, float]) -> None:
    """Whether a compiled step has the numbers of one that isn't: a wrong one reports no time."""
    for name in expected.keys() & COMPILED_AGREES.keys():
        assert found[name] == pytest.approx(expected[name], rel=COMPILED_AGREES[name]), name


@functools.cache
def check(size: str) -> None:
    """With taming's weights ours computes the same numbers: a wrong step reports no time."""
    config = override(SIZES[size], **LIKE_FOR_LIKE, batch_size=2)
    batch = make_images(config)
    images, ours = to_float(batch), make_trainer(config, batch)
    # Nothing moves at a learning rate of 0, so that taming's second pass sees the reconstruction of the first.
    taming = TamingStep(override(config, lr=0.0), choose_precision(False, batch.device))
    nn.init.normal_(taming.autoencoder.quantize.embedding.weight)  # fresh codes are so small that none would matter
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of the groups, which taming has from us
        ours.networks.model.load_taming_state_dict(taming.autoencoder.state_dict())
    recipe = cast(VQGANRecipe, ours.recipe)
    recipe.discriminator.load_state_dict(taming.discriminator.state_dict())

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with torch.no_grad():
            expected_images, _ = taming.autoencoder(images)
            reconstruction = ours.networks.model(images).reconstruction
        theirs = {name.removeprefix("train/"): value for name, value in taming(images).items()}
        metrics, _ = recipe.train_step(
            images, torch.zeros((), dtype=torch.int64, device=batch.device), adversarial=True
        )
    assert expected_images.std() > 0.01
    torch.testing.assert_close(reconstruction, expected_images, rtol=0, atol=1e-3 * float(expected_images.abs().max()))
    expected = {
        "l1": theirs["rec_loss"] - theirs["p_loss"],
        "perceptual": theirs["p_loss"],
        "quantizer": theirs["quant_loss"],
        "generator": theirs["g_loss"],
        "discriminator": theirs["disc_loss"],
    }
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected, rtol=1e-3, atol=1e-4)
    # A gradient: rounding moves activations across the kinks of the discriminator's LeakyReLUs.
    torch.testing.assert_close(metrics["lambda"], theirs["d_weight"] / config.loss.disc_weight, rtol=0.03, atol=0)


def need(size: str, *modes: str) -> None:
    """Skips the test where the device is missing, or taming for its own modes; fails where a step is wrong."""
    if SIZES[size].run.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the paper's size needs a CUDA GPU")
    try:
        check(size)
    except peers.SkippedError as error:
        if any(mode.startswith("taming") for mode in modes):
            pytest.skip(str(error))


def describe(size: str, mode: str) -> dict[str, Any]:
    config = SIZES[size]
    detail = f"{config.data.image_size} px, ch {config.model.ch}"
    images = config.optimizer.batch_size
    return {"op": "vqgan", "part": "training step", "images": images, "detail": detail, "competitor": mode}


@pytest.mark.parametrize(("size", "mode"), [(size, mode) for size, modes in MEASURED.items() for mode in modes])
def test_step(measure_step, size: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    need(size, mode)
    info, device = describe(size, mode), SIZES[size].run.device
    if mode == "reg-vq":
        config = override(SIZES[size], **(LIKE_FOR_LIKE | MODES[mode]))
        trainer = make_trainer(config, make_images(config))
        info["parts_ms"] = parts_of_step(trainer, functools.partial(trainer.step, 1), device)
    group = f"training step, {info['images']} images of {info['detail']}, {device}"
    measure_step(group, functools.partial(make_run, size, mode), info, device)


def compare(size: str, *modes: str) -> dict[str, float]:
    """Median seconds of steps that take turns, each until the device has done it."""
    need(size, *modes)
    device = SIZES[size].run.device
    runs: dict[str, measuring.Run] = {mode: measuring.finishing(make_run(size, mode), device) for mode in modes}
    seconds = measuring.medians(runs, REPEATS, warm_ups=2)
    print(f"\n{size}: seconds {seconds}")
    return seconds


def test_target_small_on_a_cpu() -> None:
    """As a run does it unless told otherwise, 1.5 times as fast. It measures time: run it on an idle machine."""
    default = {flag: True for flag in ("amp", "compile") if getattr(SIZES["small"].run, flag)}
    ours = next(mode for mode in ("fp32", "amp", "amp-compile") if MODES[mode] == default)
    seconds = compare("small", "taming", ours)
    assert seconds["taming"] >= 1.5 * seconds[ours]


def test_target_paper_on_a_gpu() -> None:
    """With ``--amp --compile``. The targets were set for an H200."""
    seconds = compare("paper", "taming", "taming-amp", "amp-compile")
    assert seconds["taming-amp"] >= 3 * seconds["amp-compile"]
    assert seconds["taming"] >= 5 * seconds["amp-compile"]
