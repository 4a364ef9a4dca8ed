"""Whole training steps and samplings, by the public trainer and samplers, beside those of other implementations.

pytest bench/bench_steps.py --benchmark-only                  all that the machine's size allows; slow on a CPU
pytest bench/bench_steps.py --benchmark-only -k diffusion     a part of it, by the names that it prints

A step of ours is the whole step of ``train/*.py`` on data that are there, clipping and supervision included. That of
the VQ-GAN, with discriminator, starts from taming's weights, and so does the autoregressive prior's: first losses that
differ from taming's report no time. "reg-vq" is the full Reg-VQ: masked stochastic quantization, prior regularizer,
contrastive loss. The plain priors are our network, its attention written out, with loss and sampler in plain PyTorch.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import step_peers
import torch
import torch.nn.functional as F
from bench_ops import Prepared, require
from measuring import Run
from torch import Tensor, nn

from regvq_fast.config import VQGAN_PRESETS, override
from regvq_fast.data.loading import read_samples
from regvq_fast.data.transforms import to_float
from regvq_fast.models import VQGAN
from regvq_fast.models.features import VGGFeatures
from regvq_fast.precision import choose_precision
from regvq_fast.priors import prior_recipe
from regvq_fast.priors.autoregressive import sample_autoregressive
from regvq_fast.priors.diffusion import model as diffusion_model
from regvq_fast.priors.diffusion.sampler import sample_diffusion
from regvq_fast.priors.maskgit import model as maskgit_model
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
    "checkpointing": {"activation_checkpointing": True},
    "accumulation": {"accumulate": 2},
}
# By importance: a GPU's time may run out. On a CPU one is compiled, since compiling takes longer than all the rest.
VQGAN_MODES = {
    "cpu": "taming fp32 amp-compile reg-vq".split(),
    "cuda": "taming-amp amp-compile taming reg-vq-amp-compile reg-vq fp32".split(),
}
MEMORY_MODES = "reg-vq reg-vq-amp reg-vq-checkpointing reg-vq-accumulation reg-vq-checkpointing-accumulation".split()
# Of a prior: by device its width, blocks, heads, images and steps of sampling.
SIZES = {
    "autoregressive": {"cpu": (256, 4, 8, 8, 0), "cuda": (1024, 24, 16, 32, 0)},
    "diffusion": {"cpu": (128, 4, 4, 8, 5), "cuda": (1024, 19, 16, 16, 100)},
    "masked": {"cpu": (128, 4, 4, 8, 8), "cuda": (768, 24, 8, 32, 12)},
}
KINDS = {"autoregressive": PRIORS["ar"], "diffusion": PRIORS["diffusion"], "masked": PRIORS["maskgit"]}
LIKE_THEIRS = {"autoregressive": {"condition_dropout": 0.0}, "diffusion": {"auxiliary_weight": 5e-4}}
ATTENTION: dict[str, ModuleType] = {"diffusion": diffusion_model, "masked": maskgit_model}
PRIOR_MODES = {
    ("autoregressive", STEP, "cpu"): "taming fp32 amp llama-fp32",
    ("autoregressive", STEP, "cuda"): "taming-amp amp-compile taming amp fp32 llama-amp-compile",
    ("autoregressive", SAMPLING, "cpu"): "taming fp32 fp32-compile llama-fp32",
    ("autoregressive", SAMPLING, "cuda"): "taming-half half-compile half taming fp32 fp32-compile llama-half-compile",
} | {
    (op, part, device): modes
    for op in ATTENTION
    for part, device, modes in (
        (STEP, "cpu", "plain fp32"),
        (STEP, "cuda", "plain-amp amp-compile plain fp32 fp32-compile"),
        (SAMPLING, "cpu", "plain fp32"),
        (SAMPLING, "cuda", "plain fp32-compile fp32"),
    )
}


def make_trainer(kind: Any, config: Any) -> tuple[Trainer[Any], dict[str, Any]]:
    """Return a trainer, its feature networks and tokenizer with random weights, and the batch of all its steps."""
    tokenizer = VQGAN(NearestQuantizer(NUM_CODES, 8), image_size=64, ch=32, ch_mult=(1, 1, 2))
    with (
        mock.patch.object(build, "load_vgg_features", lambda net, weights: VGGFeatures(net)),
        mock.patch.object(prior_recipe.VQGAN, "from_pretrained", return_value=tokenizer),
    ):
        trainer = Trainer(kind, config)
    batch: Any = read_samples(trainer.data.train, range(trainer.batch_size))
    generator = torch.Generator().manual_seed(0)
    if kind is VQGANRecipe:
        images = torch.randint(256, batch["image"].shape, generator=generator, dtype=torch.uint8)
        return trainer, {"image": images.to(trainer.device)}
    batch = trainer.recipe.tokenize(batch)  # type: ignore[attr-defined]
    tokens = torch.randint(NUM_CODES, batch["tokens"].shape, generator=generator)
    return trainer, batch | {"tokens": tokens.to(trainer.device)}


def first_step(trainer: Trainer[Any], batch: dict[str, Any]) -> dict[str, Any]:
    """Take a step on the batch, as all later ones will be, and return its numbers."""
    with mock.patch.object(training, "training_batches", return_value=itertools.repeat(batch)):
        trainer.step(0)  # which opens the batches
    return trainer.record()[0]


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
        run = {"device": self.device, "amp": False, "compile": False, "steps": CPU_STEPS}
        if self.op == "vqgan":
            config = SMALL if self.device == "cpu" else PAPER
            if self.part != STEP:
                config = override(SMALL, batch_size=16, image_size=128)
            return override(config, **run, quantizer="vq-gan", contrastive="none")
        width, depth, heads, images, _ = SIZES[self.op][self.device]
        run |= {"width": width, "depth": depth, "heads": heads, "batch_size": images}
        run |= {"on_the_fly": True, "tokenizer": "random"} | LIKE_THEIRS.get(self.op, {})
        return override(KINDS[self.op].presets["scenes"], **run)

    @property
    def detail(self) -> str:
        config = self.config
        if self.op == "vqgan":
            return f"{config.data.image_size} px, ch {config.model.ch}"
        steps = SIZES[self.op][self.device][4] if self.part == SAMPLING else 0
        more = f", {steps} steps, guidance" if steps else ""
        return f"256 tokens, width {config.model.width}, {config.model.depth} blocks{more}"

    @property
    def name(self) -> str:
        return f"{self.op}, {self.part}, {self.config.optimizer.batch_size} images of {self.detail}"

    def facts(self) -> dict[str, Any]:
        """Return what a record has of the case."""
        size = {"B": self.config.optimizer.batch_size}
        return {"op": self.op, "part": self.part, "size": size, "detail": self.detail}

    def competitors(self, device: str) -> tuple[str, ...]:
        """Names: "taming" or "plain" and ours, with the precision, compiled or not."""
        if self.op == "vqgan":
            return tuple(VQGAN_MODES[device] if self.part == STEP else MEMORY_MODES)
        return tuple(PRIOR_MODES[self.op, self.part, device].split())

    def prepare(self, device: str) -> Prepared:
        """Return functions that make the runs, and the comparison of first steps."""
        firsts: dict[str, dict[str, Any]] = {}
        start: dict[str, Any] = {}  # taming's weights
        makers = {"vqgan": make_vqgan, "autoregressive": make_autoregressive}
        make = makers.get(self.op, make_plain)
        torch._dynamo.config.recompile_limit = 64  # for all sizes and modes in one process

        def make_mode(mode: str) -> Run:
            torch.manual_seed(0)
            words = {word: setting for word, setting in WORDS.items() if word in mode}
            config = override(self.config, **{name: value for some in words.values() for name, value in some.items()})
            run, firsts[mode] = make(self, mode, config, start)
            return run

        def examine(mode: str, _: Any) -> dict[str, Any]:
            """Compare the first step with taming's, as far as its precision goes; any must be finite."""
            theirs = next((firsts[name] for name in firsts if name.startswith("taming")), {})
            for name, value in firsts[mode].items():
                require(name, isinstance(value, str) or math.isfinite(value), f"is {value} in the first step")
                if name in theirs and not mode.startswith(("reg-vq", "llama")):
                    allowed = 0.03 if "amp" in mode + "".join(firsts) else 2e-3
                    near = math.isclose(value, theirs[name], rel_tol=allowed, abs_tol=1e-3)
                    require(name, near, f"is {value:.6g} in the first step, taming's {theirs[name]:.6g}")
            return {}

        return {mode: partial(make_mode, mode) for mode in self.competitors(device)}, examine


Made = tuple[Run, dict[str, Any]]


def make_vqgan(case: Whole, mode: str, config: Any, start: dict[str, Any]) -> Made:
    """A step of the VQ-GAN with discriminator, on a batch that is always the same."""
    trainer, batch = make_trainer(VQGANRecipe, config)
    if mode.startswith("taming"):
        taming = step_peers.TamingStep(config, trainer.precision)
        nets = {"model": taming.autoencoder, "discriminator": taming.discriminator}
        start |= {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
        images = to_float(batch["image"])
        log = {name.removeprefix("train/"): float(value) for name, value in taming(images).items()}
        first = {"l1": log["rec_loss"] - log["p_loss"], "perceptual": log["p_loss"], "quantizer": log["quant_loss"]}
        return partial(taming, images), first
    if start and not mode.startswith("reg-vq"):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of the groups, which taming has from us
            trainer.networks.model.load_taming_state_dict(start["model"])
        trainer.recipe.discriminator.load_state_dict(start["discriminator"])  # type: ignore[attr-defined]
    return partial(trainer.step, 1), first_step(trainer, batch)


def training_step(network: nn.Module, amp: bool, loss: Callable[[], Tensor]) -> Run:
    """A loss, its gradients and the fused update of AdamW."""
    precision = choose_precision(amp, next(network.parameters()).device)
    optimizer, scaler = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True), precision.scaler()

    def step() -> Tensor:
        with precision.autocast():
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def halved(network: Any, mode: str) -> Any:
    """The network in evaluation mode, with half-precision weights if the mode asks for them."""
    dtype = choose_precision("half" in mode, next(network.parameters()).device).dtype
    return network.eval() if dtype is None else network.eval().to(dtype)


def make_autoregressive(case: Whole, mode: str, config: Any, start: dict[str, Any]) -> Made:
    """A step, or a sampling, which chooses among all codes; taming's cache grows by a copy of itself at each token."""
    trainer, batch = make_trainer(KINDS[case.op].recipe, config)
    ours, (tokens, condition) = trainer.networks.model, trainer.recipe.inputs(batch)  # type: ignore[attr-defined]
    tokens = tokens.flatten(1)
    if not mode.startswith("taming"):
        if start and not mode.startswith("llama"):
            ours.load_taming_state_dict(start["model"])
        if case.part == STEP:
            return partial(trainer.step, 1), first_step(trainer, batch)
        compiles = mode.endswith("compile")
        return partial(sample_autoregressive, halved(ours, mode), condition, seed=0, compile=compiles), {}
    mingpt, model = step_peers.taming_module("transformer.mingpt"), config.model
    length = condition.shape[1] + tokens.shape[1]
    sizes = {"n_layer": model.depth, "n_head": model.heads, "n_embd": model.width}
    theirs = mingpt.GPT(NUM_CODES, length, **sizes).to(tokens.device)
    start |= {"model": copy.deepcopy(theirs.state_dict())}
    if case.part == SAMPLING:
        return partial(mingpt.sample_with_past, condition, halved(theirs, mode), tokens.shape[1]), {}

    def loss() -> Tensor:
        logits, _ = theirs(torch.cat([condition, tokens], 1)[:, :-1])  # as Net2NetTransformer takes them
        return F.cross_entropy(logits[:, condition.shape[1] - 1 :].reshape(-1, NUM_CODES), tokens.flatten())

    step = training_step(theirs, "amp" in mode, loss)
    return step, {"loss": float(step())}


def make_plain(case: Whole, mode: str, config: Any, start: dict[str, Any]) -> Made:
    """A step or a sampling, with guidance, of the diffusion or the masked prior."""
    trainer, batch = make_trainer(KINDS[case.op].recipe, config)
    prior, (tokens, condition) = trainer.networks.model, trainer.recipe.inputs(batch)  # type: ignore[attr-defined]
    tokens, steps = tokens.flatten(1), SIZES[case.op][case.device][4]
    if not mode.startswith("plain"):
        if case.part == STEP:
            return partial(trainer.step, 1), first_step(trainer, batch)
        samplers: dict[str, Any] = {
            "diffusion": partial(sample_diffusion, truncation=TRUNCATION),
            "masked": sample_maskgit,
        }
        settings = {"seed": 0, "guidance": GUIDANCE, "compile": mode.endswith("compile"), "steps": steps}
        return partial(samplers[case.op], prior.eval(), condition, **settings), {}

    run: Run
    if case.op == "masked":
        loss = partial(step_peers.maskgit_loss, prior, tokens, condition)
        run = partial(step_peers.maskgit_sample, prior.eval(), condition, steps, GUIDANCE)
    else:
        chain = diffusion_model.MaskAndReplace(NUM_CODES, steps if case.part == SAMPLING else 100)
        plain = step_peers.PlainDiffusion(chain, tokens.device)
        loss = partial(plain.loss, prior, tokens, condition)
        null = prior.condition(len(tokens))
        text = prior.condition(len(tokens), condition).detach()
        run = partial(plain.sample, prior.eval(), text, null.detach(), tokens.shape[1], GUIDANCE, TRUNCATION)
    if case.part == STEP:
        run = training_step(prior.train(), "amp" in mode, loss)

    def written_out() -> Any:
        with mock.patch.object(ATTENTION[case.op], "attention", step_peers.plain_attention):
            return run()

    return written_out, {}


def cases(device: str) -> list[Whole]:
    """By importance; the memory that flags save is measured on a CPU."""
    steps = [Whole("vqgan", STEP, device)]
    if device == "cpu":
        steps.append(Whole("vqgan", "memory of a step", device))
    return steps + [Whole(op, part, device) for op in SIZES for part in (STEP, SAMPLING)]


def test_step(measure: Callable[..., None], case: Whole, competitor: str) -> None:
    """Time one of them."""
    measure(case, competitor)
