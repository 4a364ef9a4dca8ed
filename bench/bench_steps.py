"""Whole training steps and samplings, by the public trainer and samplers, beside those of other implementations.

pytest bench/bench_steps.py --benchmark-only                  all that the machine's size allows; slow on a CPU
pytest bench/bench_steps.py --benchmark-only -k diffusion     a part of it, by the names that it prints

A step of ours is the whole step of ``train/*.py`` on data that are there, clipping and supervision included. That of
the VQ-GAN, with discriminator, starts from taming's weights, and so does the autoregressive prior's: first losses that
differ from taming's report no time. "reg-vq" is the full Reg-VQ: masked stochastic quantization, prior regularizer,
contrastive loss. "diffusers" samples with our network by its schedulers.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import peers
import torch
import torch.nn.functional as F
from bench_ops import Makers
from measuring import Examine, Run
from torch import Tensor

from regvq_fast.config import VQGAN_PRESETS, override
from regvq_fast.data.loading import read_samples
from regvq_fast.data.transforms import to_float
from regvq_fast.models import VQGAN
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.taming_weights import discriminator_in
from regvq_fast.precision import choose_precision
from regvq_fast.priors import prior_recipe
from regvq_fast.priors.autoregressive import sample_autoregressive
from regvq_fast.priors.diffusion.sampler import sample_diffusion
from regvq_fast.priors.maskgit import sample_maskgit
from regvq_fast.priors.registry import PRIORS
from regvq_fast.quantizers import NearestQuantizer
from regvq_fast.training import build
from regvq_fast.training import trainer as training
from regvq_fast.training.compilation import CPU_STEPS
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe

STEP, SAMPLING = "training step", "sampling"
NUM_CODES, GUIDANCE, TRUNCATION = 1024, 2.0, 0.86
SMALL = override(VQGAN_PRESETS["scenes"], batch_size=4, ch_mult=(1, 1, 2, 4), disc_start=0)
PAPER = override(VQGAN_PRESETS["ade20k"], preset="scenes", disc_start=0)
# Precision and flags, by the words of a mode's name; like for like with taming are those without "reg-vq".
WORDS: dict[str, dict[str, Any]] = {
    "amp": {"amp": True},
    "compile": {"compile": True},
    "reg-vq": {"quantizer": "reg-vq", "contrastive": "pcl"},
    "llama": {"arch": "llama"},
}
KINDS = {"autoregressive": PRIORS["ar"], "diffusion": PRIORS["diffusion"], "masked": PRIORS["maskgit"]}
# Of a prior: by device its width, blocks, heads, images and steps of sampling.
SIZES = {
    "autoregressive": {"cpu": (256, 4, 8, 4, 0), "cuda": (1024, 24, 16, 32, 0)},
    "diffusion": {"cpu": (128, 4, 4, 8, 5), "cuda": (1024, 19, 16, 16, 100)},
    "masked": {"cpu": (128, 4, 4, 8, 8), "cuda": (768, 24, 8, 32, 12)},
}
# By importance: a GPU's time may run out. On a CPU one is compiled, since compiling takes longer than all the rest.
MODES = {
    ("vqgan", STEP, "cpu"): "taming fp32 amp-compile reg-vq",
    ("autoregressive", STEP, "cpu"): "taming fp32 amp llama-fp32",
    ("autoregressive", SAMPLING, "cpu"): "taming fp32 llama-fp32",
    ("diffusion", STEP, "cpu"): "fp32 amp",
    ("diffusion", SAMPLING, "cpu"): "diffusers fp32",
    ("masked", STEP, "cpu"): "fp32 amp",
    ("masked", SAMPLING, "cpu"): "diffusers fp32",
    ("vqgan", STEP, "cuda"): "taming-amp amp-compile taming reg-vq-amp-compile reg-vq fp32",
    ("autoregressive", STEP, "cuda"): "taming-amp amp-compile taming amp fp32 llama-amp-compile",
    ("autoregressive", SAMPLING, "cuda"): "taming-half half-compile half taming fp32 fp32-compile llama-half-compile",
    ("diffusion", STEP, "cuda"): "amp-compile fp32-compile fp32",
    ("diffusion", SAMPLING, "cuda"): "diffusers fp32-compile fp32",
    ("masked", STEP, "cuda"): "amp-compile fp32-compile fp32",
    ("masked", SAMPLING, "cuda"): "diffusers fp32-compile fp32",
}
Made = tuple[Run, dict[str, Any]]  # and the numbers of the first step


@dataclass(frozen=True)
class Whole:
    """A step or a sampling at the size of a device."""

    op: str
    part: str
    device: str
    whole: ClassVar[bool] = True

    @property
    def config(self) -> Any:
        """Return the configuration of a mode without words."""
        run: dict[str, Any] = {"device": self.device, "amp": False, "compile": False, "steps": CPU_STEPS}
        if self.op == "vqgan":
            config = SMALL if self.device == "cpu" else PAPER
            return override(config, **run, quantizer="vq-gan", contrastive="none")
        width, depth, heads, images, _ = SIZES[self.op][self.device]
        run |= {"width": width, "depth": depth, "heads": heads, "batch_size": images}
        run |= {"condition_dropout": 0.0} if self.op == "autoregressive" else {}  # as taming
        return override(KINDS[self.op].presets["scenes"], **run, on_the_fly=True, tokenizer="random")

    def fields(self) -> dict[str, Any]:
        """Return what a record has of the case."""
        config = self.config
        if self.op == "vqgan":
            detail = f"{config.data.image_size} px, ch {config.model.ch}"
        else:
            steps = SIZES[self.op][self.device][4] if self.part == SAMPLING else 0
            detail = f"256 tokens, width {config.model.width}, {config.model.depth} blocks"
            detail += f", {steps} steps, guidance" if steps else ""
        return {"op": self.op, "part": self.part, "size": {"B": config.optimizer.batch_size}, "detail": detail}

    def competitors(self, device: str) -> tuple[str, ...]:
        """Names: another implementation, and ours with the precision, compiled or not."""
        return tuple(MODES[self.op, self.part, device].split())

    def prepare(self, device: str) -> tuple[Makers, Examine]:
        """Return functions that make the runs, and the comparison of first steps."""
        firsts: dict[str, dict[str, Any]] = {}
        start: dict[str, Tensor] = {}  # taming's weights
        torch._dynamo.config.recompile_limit = 64  # for all sizes and modes in one process

        def make(mode: str) -> Run:
            torch.manual_seed(0)
            words = {name: value for word in WORDS if word in mode for name, value in WORDS[word].items()}
            recipe = KINDS[self.op].recipe if self.op in KINDS else VQGANRecipe
            trainer, batch = make_trainer(recipe, override(self.config, **words))
            makers = {"taming": make_taming, "diffusers": make_diffusers}
            maker = next((maker for peer, maker in makers.items() if mode.startswith(peer)), make_ours)
            run, firsts[mode] = maker(self, mode, trainer, batch, start)
            return run

        def examine(mode: str, _: Any) -> dict[str, Any]:
            """Compare the first step with taming's, as far as its precision goes; any must be finite."""
            first, theirs = firsts[mode], next((firsts[name] for name in firsts if name.startswith("taming")), {})
            assert all(math.isfinite(value) for value in first.values() if not isinstance(value, str)), first
            if not mode.startswith(("reg-vq", "llama")):
                found, expected = ({name: some[name] for name in first.keys() & theirs} for some in (first, theirs))
                allowed = 0.03 if "amp" in mode + "".join(firsts) else 2e-3
                torch.testing.assert_close(found, expected, rtol=allowed, atol=1e-3)
            return {}

        return {mode: partial(make, mode) for mode in self.competitors(device)}, examine


def make_trainer(recipe: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """Return a trainer, its feature networks and tokenizer with random weights, and the batch of all its steps."""
    tokenizer = VQGAN(NearestQuantizer(NUM_CODES, 8), image_size=64, ch=32, ch_mult=(1, 1, 2))
    with (
        mock.patch.object(build, "load_vgg_features", lambda net, weights: VGGFeatures(net)),
        mock.patch.object(prior_recipe.VQGAN, "from_pretrained", return_value=tokenizer),
    ):
        trainer: Any = Trainer(recipe, config)
    batch: Any = read_samples(trainer.data.train, range(trainer.batch_size))
    if recipe is VQGANRecipe:
        return trainer, {"image": batch["image"].to(trainer.device)}
    batch = trainer.recipe.tokenize(batch)
    tokens = torch.randint(NUM_CODES, batch["tokens"].shape, generator=torch.Generator().manual_seed(0))
    return trainer, batch | {"tokens": tokens.to(trainer.device)}


def halved(network: Any, mode: str) -> Any:
    """Return the network in evaluation mode, with half-precision weights if the mode asks for them."""
    return network.eval().to(choose_precision("half" in mode, next(network.parameters()).device).dtype or torch.float32)


def make_ours(case: Whole, mode: str, trainer: Any, batch: dict[str, Any], start: dict[str, Any]) -> Made:
    """A step by the trainer on a batch that is always the same, or a sampling by the public sampler."""
    model = trainer.networks.model
    if start and not mode.startswith(("reg-vq", "llama")):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of the groups, which taming has from us
            model.load_taming_state_dict(start)
        if found := discriminator_in(start):
            trainer.recipe.discriminator.load_state_dict(found[1])
    if case.part != SAMPLING:
        with mock.patch.object(training, "training_batches", return_value=itertools.repeat(batch)):
            trainer.step(0)  # which opens the batches
        return partial(trainer.step, 1), trainer.record()[0]
    _, condition = trainer.recipe.inputs(batch)
    settings: dict[str, Any] = {"seed": 0, "compile": mode.endswith("compile")}
    if case.op == "autoregressive":  # among all codes
        return partial(sample_autoregressive, halved(model, mode), condition, **settings), {}
    settings |= {"guidance": GUIDANCE, "steps": SIZES[case.op][case.device][4]}
    if case.op == "masked":
        return partial(sample_maskgit, model.eval(), condition, **settings), {}
    return partial(sample_diffusion, model.eval(), condition, truncation=TRUNCATION, **settings), {}


def make_taming(case: Whole, mode: str, trainer: Any, batch: dict[str, Any], start: dict[str, Any]) -> Made:
    """A step of taming's, or a sampling, whose cache grows by a copy of itself at each token; keeps its weights."""
    precision = trainer.precision
    if case.op == "vqgan":
        taming = peers.TamingStep(trainer.config, precision)
        start |= copy.deepcopy(taming.net.state_dict())
        images = to_float(batch["image"])
        log = {name.removeprefix("train/"): float(value) for name, value in taming(images).items()}
        first = {"l1": log["rec_loss"] - log["p_loss"], "perceptual": log["p_loss"], "quantizer": log["quant_loss"]}
        return partial(taming, images), first
    mingpt, model = peers.taming()["mingpt"], trainer.config.model
    tokens, condition = (ids.flatten(1) for ids in trainer.recipe.inputs(batch))
    length, sizes = condition.shape[1] + tokens.shape[1], {"n_head": model.heads, "n_embd": model.width}
    network = mingpt.GPT(NUM_CODES, length, n_layer=model.depth, **sizes).to(tokens.device)
    start |= copy.deepcopy(network.state_dict())
    if case.part == SAMPLING:
        return partial(mingpt.sample_with_past, condition, halved(network, mode), tokens.shape[1]), {}
    optimizer, scaler = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True), precision.scaler()

    def step() -> Tensor:
        with precision.autocast():
            logits, _ = network(torch.cat([condition, tokens], 1)[:, :-1])  # as Net2NetTransformer takes them
            loss = F.cross_entropy(logits[:, condition.shape[1] - 1 :].reshape(-1, NUM_CODES), tokens.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {"loss": float(step())}


def make_diffusers(case: Whole, mode: str, trainer: Any, batch: dict[str, Any], start: dict[str, Any]) -> Made:
    """A sampling with guidance by diffusers' schedulers."""
    prior, steps = trainer.networks.model.eval(), SIZES[case.op][case.device][4]
    _, condition = trainer.recipe.inputs(batch)
    if case.op == "masked":
        return partial(peers.diffusers_masked, prior, condition, steps, GUIDANCE), {}
    return partial(peers.diffusers_diffusion, prior, condition, steps, GUIDANCE, TRUNCATION), {}


def cases(device: str) -> list[Whole]:
    """Return those of a device, in their order."""
    return [Whole(op, part, where) for op, part, where in MODES if where == device]


def test_step(measure: Callable[..., None], case: Whole, competitor: str) -> None:
    """Time one of them."""
    measure(case, competitor)
