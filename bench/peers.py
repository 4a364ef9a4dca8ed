"""Competitors: plain PyTorch, and other packages where they are installed, of which none is needed to run the rest.

One of an op is a forward pass, a call whose first results take gradients, and the leaves that they go to. The packages
answer other questions than ours does, which the docstrings say.
"""

import contextlib
import functools
import importlib
import io
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from measuring import SkippedError
from torch import Tensor, nn

from regvq_fast import NearestQuantizer
from regvq_fast.config import VQGANConfig
from regvq_fast.integrations import accelerate
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.layers import group_norm
from regvq_fast.precision import Precision
from regvq_fast.priors.choosing import restrict
from regvq_fast.priors.diffusion import VQDiffusion
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.training.optimizers import build_optimizers

Forward = Callable[[], tuple[Tensor, ...]]
GPU_ONLY = ("flash-kmeans", "inf-cl")  # Triton kernels


def package(name: str, module: str = "") -> Any:
    """Return the module of a package, imported only where it is measured."""
    try:
        return importlib.import_module(module or name.replace("-", "_"))
    except ImportError as error:
        raise SkippedError(f"not installed: pip install {name} ({error})") from error


@functools.cache
def taming() -> dict[str, Any]:
    """Modules of taming-transformers by name, with stand-ins for what they import for downloads and trained weights.

    ``pip install --no-deps taming-transformers-rom1504`` is enough.
    """
    package("einops")
    stand_ins = {name: SimpleNamespace(models=None, tqdm=None) for name in ("torchvision", "requests", "tqdm")}
    stand_ins = {name: module for name, module in stand_ins.items() if find_spec(name) is None}
    stand_ins["pytorch_lightning"] = SimpleNamespace(LightningModule=nn.Module)
    stand_ins["taming.main"] = SimpleNamespace(instantiate_from_config=lambda build: build())
    # Newer versions don't have the one function that it needs.
    filtering = {"top_k_top_p_filtering": lambda logits, top_k, top_p=None: restrict(logits, top_k=top_k, top_p=top_p)}
    stand_ins["transformers"] = SimpleNamespace(**filtering)
    names = "transformer.mingpt vqvae.quantize losses.lpips losses.vqperceptual".split()
    paths = ["models.vqgan", *(f"modules.{name}" for name in names)]
    with mock.patch.dict(sys.modules, stand_ins):
        modules = [package("--no-deps taming-transformers-rom1504", f"taming.{path}") for path in paths]
    return {module.__name__.rpartition(".")[2]: module for module in modules}


# ---------------------------------------------------------------------------------------------------- plain PyTorch


def plain_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, rows: Tensor | None, tau: Tensor, scale: float, codebook_grad: str
) -> tuple[Tensor, ...]:
    """``vector_quantize`` in plain PyTorch, in the type of ``x`` and in the cheapest of its forms.

    Distances are one product with a bias and without ``|x|^2``, noise is sampled for the rows of the mask alone
    (``rows``, their int64 numbers), the look-up gathers codes, and scores change in place. Returns quantized,
    posterior, indices, best_indices and perturbation.
    """
    scores = torch.addmm(-scale * codebook.square().sum(1), x, codebook.t(), alpha=2 * scale)
    best_indices = indices = scores.argmax(1)
    if mask is not None and rows is not None:
        noise = x.new_empty(len(rows), len(codebook)).exponential_().log_().neg_()
        if torch.compiler.is_compiling():  # of 16 bits, index_add would not be fused
            scores = scores + torch.zeros_like(scores).index_copy(0, rows, noise)
        else:
            scores.index_add_(0, rows, noise)
        indices = scores.argmax(1)
        scores.div_(torch.where(mask, tau, 1.0).to(x.dtype).unsqueeze(1))
    p = scores.softmax(1)
    soft = p @ (codebook if codebook_grad == "soft" else codebook.detach())
    chosen = codebook[indices]
    hard = chosen.detach() if codebook_grad == "soft" else chosen
    counts = torch.zeros(len(codebook), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
    mean = p.mean(0)
    posterior = (counts / len(x) + (mean - mean.detach())).unsqueeze(0)
    perturbation = (chosen - codebook[best_indices]).detach().square().sum(1)
    return hard + (soft - soft.detach()), posterior, indices, best_indices, perturbation


def plain_assign(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    """``assign_codes`` in plain PyTorch, the distances as one product with a bias."""
    return (torch.addmm(codebook.square().sum(1).mul(-0.5), x, codebook.t()).argmax(1),)


def plain_info_nce(query: Tensor, key: Tensor, weight: Tensor, tau: float) -> tuple[Tensor]:
    """``weighted_info_nce`` in plain PyTorch, in the type of the features: one L x L matrix an image."""
    constant = math.log(query.shape[1])
    scores = torch.bmm(query / tau, key.mT)
    diagonal = scores.diagonal(dim1=1, dim2=2)
    positive = diagonal.clone()
    diagonal.add_(weight.log() + constant)
    return (scores.logsumexp(2) - constant - positive,)


@functools.cache
def compiled(function: Callable[..., Any], again: bool) -> Callable[..., Any]:
    """Compile ``function``, anew for each size; ``again``: for backwards that run more than once."""
    torch._dynamo.config.recompile_limit = 64  # past this number of sizes it would run uncompiled
    return torch.compile(function, dynamic=False, fullgraph=True)


# --------------------------------------------------------------------------------------------------- other packages


def vqp(x: Tensor, codebook: Tensor, *, gumbel: bool, training: bool = True) -> tuple[Forward, list[Tensor]]:
    """``vector_quantize_pytorch.VectorQuantize``, which computes in fp32 whatever the type of ``x``.

    Nearest: no noise, straight-through identity, a learnable codebook with its commitment loss. Gumbel: noise on every
    row, gradient of the softmax to x; the codebook learns by moving averages, inside the forward pass.
    """
    settings: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
    if gumbel:  # without the last, the straight-through identity would replace the softmax's gradient
        settings = {"stochastic_sample_codes": True, "straight_through": True, "sample_codebook_temp": 0.9}
        settings["route_gradients_to_input"] = False
    sizes = {"dim": codebook.shape[1], "codebook_size": len(codebook), "rotation_trick": False}
    module = package("vector-quantize-pytorch").VectorQuantize(**sizes, freeze_codebook=not training, **settings)
    module.to(x.device).train(training)._codebook.embed.data.copy_(codebook.detach().unsqueeze(0))

    def forward() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            quantized, indices, loss = module(x.unsqueeze(0))
        return quantized.squeeze(0), loss, indices.flatten()

    return forward, [x] if gumbel else [x, *module.parameters()]


def nearest(x: Tensor, codebook: Tensor, library: str = "") -> tuple[Forward, list[Tensor]]:
    """Our ``NearestQuantizer``, or taming-transformers' ``VectorQuantizer2``, which computes in the type of ``x``."""
    module: Any = NearestQuantizer(*codebook.shape)
    if library:
        module = taming()["quantize"].VectorQuantizer2(*codebook.shape, beta=0.25, legacy=False).to(x.dtype)
    module.to(x.device).embedding.weight.data.copy_(codebook.detach())

    def forward() -> tuple[Tensor, ...]:
        output = module(x.t().unsqueeze(1).unsqueeze(0))  # (M, D) as a map (1, D, 1, M), as they lie in memory
        quantized, loss = output[:2] if library else (output.quantized, output.loss)
        return quantized.squeeze(0).squeeze(1).t(), loss

    return forward, [x, *module.parameters()]


def flash_kmeans(x: Tensor, codebook: Tensor) -> Forward:
    """flash-kmeans' assignment step, with ``|x|^2`` ready, as its k-means loop has it; fp32 inputs multiply in TF32."""
    assign = package("flash-kmeans", "flash_kmeans.assign_euclid_triton").euclid_assign_triton
    batch, centroids = x.unsqueeze(0), codebook.unsqueeze(0)
    norms = batch.float().square().sum(-1)
    return lambda: (assign(batch, centroids, norms).flatten(),)


def inf_cl(query: Tensor, key: Tensor, tau: float) -> Forward:
    """inf-cl's flash loss, InfoNCE without weights: losses (B, L).

    It knows one image, so that B of them take turns; it converts 16-bit features to fp32 and multiplies in TF32; and
    its backward computes both gradients, whichever is asked for.
    """
    loss = package("inf-cl").cal_flash_loss
    width = query.shape[2]
    head = min(width, 256)  # channels of a product; 256 is its default, and C must be a multiple
    if width % head:
        raise SkippedError(f"inf-cl takes C <= 256 or a multiple of 256, not {width}")

    def forward() -> tuple[Tensor]:
        # One by one they would be indexed, and the backward of every index would fill all of the key's gradient.
        images = zip(query.unbind(), key.unbind(), strict=True)
        return (torch.stack([loss(one, other, scale=1 / tau, head_dim=head) for one, other in images]),)

    return forward


# ------------------------------------------------------------------------------------- quantizers of other libraries


def library_quantizer(library: str, num_codes: int, width: int, ours: bool) -> nn.Module:
    """A quantizer of (B, D, H, W) maps of another library, or the same after ``accelerate``."""
    torch.manual_seed(0)
    if library == "vector-quantize-pytorch":
        module = package(library).VectorQuantize(width, num_codes, accept_image_fmap=True)
    elif library == "IBQ":  # as its authors write it; it isn't on PyPI
        module = importlib.import_module("helpers.plain_ibq").IndexPropagationQuantize(num_codes, width)
    elif library == "taming":
        module = taming()["quantize"].VectorQuantizer2(num_codes, width, beta=0.25)
    else:
        module = package(library, "diffusers.models.autoencoders.vae").VectorQuantizer(num_codes, width, beta=0.25)
    if library in ("taming", "diffusers"):
        nn.init.normal_(module.embedding.weight)
    if ours:
        accelerate(module)
    return module


# ----------------------------------------------------------------------------------------------- steps and samplers


class TamingStep:
    """``VQModel.training_step`` and what Lightning makes of it with two optimizers, the discriminator active.

    For the first optimizer the batch is encoded, quantized, decoded and judged: L1, LPIPS, adversarial loss with its
    adaptive weight by two walks back to the last layer, codebook loss. For the second it is encoded, quantized and
    decoded again, LPIPS included, and the discriminator is trained on the result. While one takes its turn, the
    parameters of the other take no gradients (``toggle_optimizer``).

    Where the published training leaves a choice, or would cost more, it gets what ours has: AdamW with the fused
    update, random VGG weights of the same seed with the same heads, LPIPS without the dropout that training mode
    switches on in it, and below 128 channels our number of groups in GroupNorm (its own would be of one channel).
    """

    def __init__(self, config: VQGANConfig, precision: Precision) -> None:
        self.precision, self.scaler = precision, precision.scaler()
        size = {"resolution": config.data.image_size, "in_channels": 3, "out_ch": 3, "double_z": False}
        shared = asdict(config.model) | size  # it ignores what it doesn't know
        with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
            codes = config.quantizer.num_codes, config.quantizer.code_dim
            net = self.net = taming()["vqgan"].VQModel(shared, partial(_loss, config), *codes).to(precision.device)
        nn.init.normal_(net.quantize.embedding.weight)  # fresh codes are so small that none would matter
        for norm in net.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.num_groups = group_norm(norm.num_channels).num_groups
        self.metrics: dict[str, Tensor] = {}
        net.global_step, net.log = 0, lambda *_, **__: None
        net.log_dict = lambda metrics, **_: self.metrics.update(metrics)
        autoencoder = nn.ModuleList(module for module in net.children() if module is not net.loss)
        self._turns = [(m, build_optimizers(m, config.optimizer)[0]) for m in (autoencoder, net.loss.discriminator)]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Take one step on a batch (B, 3, H, W) in [-1, 1] and return the logged numbers, by taming's names."""
        batch = {"image": images.permute(0, 2, 3, 1)}  # as its data sets have them
        for index, (module, optimizer) in enumerate(self._turns):
            for other, _ in self._turns:
                other.requires_grad_(other is module)
            with self.precision.autocast():
                loss = self.net.training_step(batch, 0, index)
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return self.metrics


def _loss(config: VQGANConfig) -> Any:
    """``VQLPIPSWithDiscriminator`` without its downloads."""
    features = VGGFeatures("vgg16")
    for layer in features.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True  # as in torchvision's network
    lpips, torchvision_models = taming()["lpips"], SimpleNamespace(vgg16=lambda pretrained: features)
    settings = {"disc_num_layers": config.model.disc_layers, "disc_ndf": config.model.disc_filters}
    with mock.patch.object(lpips, "models", torchvision_models), mock.patch.object(lpips.LPIPS, "load_from_pretrained"):
        kind = taming()["vqperceptual"].VQLPIPSWithDiscriminator
        loss = kind(0, disc_weight=config.loss.disc_weight, **settings)
    loss.perceptual_loss.load_state_dict(LPIPS(features).state_dict(), strict=False)
    return loss


@torch.no_grad()
def diffusers_diffusion(prior: VQDiffusion, text: Tensor, steps: int, guidance: float, truncation: float) -> Tensor:
    """Sample tokens (B, L) of our network by diffusers' ``VQDiffusionScheduler``, as its pipeline uses it."""
    library, batch = package("diffusers"), len(text)
    scheduler = library.VQDiffusionScheduler(num_vec_classes=prior.num_codes + 1, num_train_timesteps=steps)
    scheduler.set_timesteps(steps, device=text.device)
    tokens = torch.full((batch, prior.num_tokens), prior.num_codes, device=text.device)
    both = torch.cat([prior.condition(batch, text), prior.condition(batch)])
    for step in scheduler.timesteps:
        logits = prior(torch.cat([tokens, tokens]), (step + 1).expand(2 * batch), both)
        given, free = logits.mT.double().log_softmax(1).float().chunk(2)
        log_p = free + guidance * (given - free)
        log_p = library.VQDiffusionPipeline.truncate(None, log_p - log_p.logsumexp(1, keepdim=True), truncation)
        tokens = scheduler.step(log_p.clamp(-70), step, tokens).prev_sample
    return tokens


@torch.no_grad()
def diffusers_masked(prior: MaskGIT, condition: Tensor, steps: int, guidance: float) -> Tensor:
    """Sample tokens (B, L) of our network by diffusers' ``AmusedScheduler``, as its pipeline uses it."""
    scheduler = package("diffusers").AmusedScheduler(mask_token_id=prior.num_codes)
    scheduler.set_timesteps(steps, temperature=(4.5, 0), device=condition.device)
    tokens = torch.full((len(condition), prior.num_tokens), prior.num_codes, device=condition.device)
    both = torch.cat([condition, torch.full_like(condition, prior.num_classes)])
    for step in scheduler.timesteps:
        given, free = prior(torch.cat([tokens, tokens]), both).float().chunk(2)
        tokens = scheduler.step(free + guidance * (given - free), step, tokens).prev_sample
    return tokens
