"""Whole steps and samplings of others: taming-transformers' own modules, VQ-Diffusion and MaskGIT in plain PyTorch.

``pip install --no-deps taming-transformers-rom1504`` is enough. What else its modules import is for downloads and
pre-trained weights, and two functions, for which stand-ins serve.
"""

import contextlib
import importlib
import io
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measuring import SkippedError
from torch import Tensor, nn

from regvq_fast.config import VQGANConfig
from regvq_fast.losses.perceptual import LPIPS
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.layers import group_norm
from regvq_fast.precision import Precision
from regvq_fast.priors.choosing import restrict
from regvq_fast.priors.diffusion.loss import MaskAndReplace
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.training.optimization import build_optimizer


def _rearrange(tensor: Tensor, pattern: str) -> Tensor:
    """einops' function, where nothing is merged or split."""
    before, after = (side.split() for side in pattern.split("->"))
    return tensor.permute([before.index(name) for name in after])


_STAND_INS: dict[str, Any] = {
    "torchvision": SimpleNamespace(models=None),
    "requests": SimpleNamespace(),
    "tqdm": SimpleNamespace(tqdm=None),
    "einops": SimpleNamespace(rearrange=_rearrange),
    # Newer versions don't have the one function that it needs.
    "transformers": SimpleNamespace(
        top_k_top_p_filtering=lambda logits, top_k, top_p=None: restrict(logits, top_k=top_k, top_p=top_p)
    ),
}


def taming_module(module: str) -> Any:
    """Return a module of the package, imported only where it is measured; stand-ins are there for so long."""
    absent = [name for name in _STAND_INS if name not in sys.modules and find_spec(name) is None]
    before = {name: sys.modules.get(name) for name in {*absent, "transformers"}}
    sys.modules.update({name: _STAND_INS[name] for name in before})
    try:
        return importlib.import_module(f"taming.modules.{module}")
    except ImportError as error:
        name = "taming-transformers-rom1504"
        raise SkippedError(f"{name} is not installed: pip install --no-deps {name} ({error})") from error
    finally:
        for name, real in before.items():
            del sys.modules[name]
            if real is not None:
                sys.modules[name] = real


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
        with contextlib.redirect_stdout(io.StringIO()):  # they announce themselves
            self.autoencoder, self.loss = _autoencoder(config).to(precision.device), _loss(config).to(precision.device)
        self.discriminator: nn.Module = self.loss.discriminator
        nn.init.normal_(self.autoencoder.quantize.embedding.weight)  # fresh codes are so small that none would matter
        self._turns = [(m, build_optimizer(m, config.optimizer)) for m in (self.autoencoder, self.discriminator)]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Take one step on a batch (B, 3, H, W) in [-1, 1] and return the logged numbers, by taming's names."""
        metrics: dict[str, Tensor] = {}
        net = self.autoencoder
        for index, (module, optimizer) in enumerate(self._turns):
            for other, _ in self._turns:
                other.requires_grad_(other is module)
            with self.precision.autocast():
                quantized, codebook_loss, _ = net.quantize(net.quant_conv(net.encoder(images)))
                reconstruction = net.decoder(net.post_quant_conv(quantized))
                last_layer = net.decoder.conv_out.weight
                loss, log = self.loss(codebook_loss, images, reconstruction, index, 0, last_layer=last_layer)
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            metrics |= log
        return metrics


def _autoencoder(config: VQGANConfig) -> Any:
    """taming's ``VQModel``, which is a LightningModule, as a plain module."""
    size = {"resolution": config.data.image_size, "in_channels": 3, "out_ch": 3, "double_z": False}
    shared, width = asdict(config.model) | size, config.quantizer.code_dim  # they ignore what they don't know
    networks, net, z = taming_module("diffusionmodules.model"), nn.Module(), config.model.z_channels
    net.encoder, net.decoder = networks.Encoder(**shared), networks.Decoder(**shared)
    net.quantize = taming_module("vqvae.quantize").VectorQuantizer2(config.quantizer.num_codes, width, beta=0.25)
    net.quant_conv, net.post_quant_conv = nn.Conv2d(z, width, 1), nn.Conv2d(width, z, 1)
    for norm in net.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = group_norm(norm.num_channels).num_groups
    return net


def _loss(config: VQGANConfig) -> Any:
    """``VQLPIPSWithDiscriminator`` without its downloads."""
    features = VGGFeatures("vgg16")
    for layer in features.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True  # as in torchvision's network
    torchvision_models = SimpleNamespace(vgg16=lambda pretrained: features)
    lpips, model = taming_module("losses.lpips"), config.model
    with mock.patch.object(lpips, "models", torchvision_models), mock.patch.object(lpips.LPIPS, "load_from_pretrained"):
        loss = taming_module("losses.vqperceptual").VQLPIPSWithDiscriminator(
            0, disc_num_layers=model.disc_layers, disc_ndf=model.disc_filters, disc_weight=config.loss.disc_weight
        )
    loss.perceptual_loss.load_state_dict(LPIPS(features).state_dict(), strict=False)
    return loss


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """`regvq_fast.models.attention.attention` with its matrix in memory."""
    assert not causal
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value).transpose(1, 2)


_ZERO, _FLOOR = 1e-30, -70.0  # stands for 0; of log probabilities


class PlainDiffusion:
    """VQ-Diffusion's loss and sampler in plain PyTorch, as its public code computes them.

    Distributions are (B, N + 1, L) tensors of log probabilities, of the tokens as well (one-hot), the softmax runs in
    float64, posteriors come from sums of such tensors, and each step's draws are the argmax over all of them plus
    Gumbel noise. The chain's probabilities are ours, in float32 tables over the steps -1 (a copy of step 0, the image)
    to T - 1. Written from the equations and the order of operations of github.com/microsoft/VQ-Diffusion
    (diffusion_transformer.py); its bookkeeping of accuracies, which waits for the device at each image, is left out.
    """

    def __init__(self, chain: MaskAndReplace, device: str | torch.device = "cpu") -> None:
        self.num_codes, self.num_steps = chain.num_codes, chain.num_steps
        steps = torch.arange(chain.num_steps + 1)
        self.cumulative = [value.log().float().to(device) for value in chain.cumulative(steps)]
        between = chain.between(steps[:-1], steps[1:])
        self.single = [F.pad(value.log().float(), (1, 0)).to(device) for value in between]

    def log_one_hot(self, tokens: Tensor) -> Tensor:
        """(B, L) to (B, N + 1, L)."""
        return F.one_hot(tokens, self.num_codes + 1).transpose(1, 2).float().clamp(min=_ZERO).log()

    def predict(self, logits: Tensor) -> Tensor:
        """Logits (B, L, N) to log p(x_0 | x_t), (B, N + 1, L)."""
        log_p = F.log_softmax(logits.transpose(1, 2).double(), dim=1).float()
        return torch.cat([log_p, torch.full_like(log_p[:, :1], _FLOOR)], dim=1).clamp(_FLOOR, 0.0)

    def forward(self, log_x: Tensor, t: Tensor, table: list[Tensor]) -> Tensor:
        """log q(x_t | x_0) by the table ``cumulative``, log q(x_t | x_t-1) by ``single``."""
        alpha, beta, gamma = (values[t][:, None, None] for values in table)
        codes = torch.logaddexp(log_x[:, :-1] + alpha, beta)
        stays = torch.log1p(-gamma.exp() + 1e-20)
        return torch.cat([codes, torch.logaddexp(log_x[:, -1:] + stays, gamma)], dim=1)

    def posterior(self, log_start: Tensor, log_x: Tensor, t: Tensor) -> Tensor:
        """log p(x_t-1 | x_t), (B, N + 1, L), from log p(x_0 | x_t) and x_t."""
        masked = (log_x.argmax(1) == self.num_codes)[:, None]
        zeros = torch.full_like(log_start[:, :1], _ZERO).log()
        log_t = self.forward(log_x, t, self.cumulative)[:, :-1]
        log_t = torch.where(masked, self.cumulative[2][t][:, None, None].expand_as(log_t), log_t)
        step = torch.cat([self.forward(log_x, t, self.single)[:, :-1], zeros], dim=1)
        to_mask = torch.cat([self.single[2][t][:, None, None].expand_as(log_t), torch.zeros_like(zeros)], dim=1)
        step = torch.where(masked, to_mask, step)
        q = torch.cat([log_start[:, :-1] - log_t, zeros], dim=1)
        total = q.logsumexp(1, keepdim=True)
        return (self.forward(q - total, t - 1, self.cumulative) + step + total).clamp(_FLOOR, 0.0)

    def draw(self, log_p: Tensor) -> Tensor:
        """(B, N + 1, L) to tokens (B, L)."""
        return (log_p - (-(torch.rand_like(log_p) + _ZERO).log() + _ZERO).log()).argmax(1)

    def bound(self, logits: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bound's terms and the auxiliary ones, (B,) each, in nats a token."""
        log_tokens, log_noisy, log_start = self.log_one_hot(tokens), self.log_one_hot(noisy), self.predict(logits)
        predicted, true = (self.posterior(start, log_noisy, t) for start in (log_start, log_tokens))
        divergence = (true.exp() * (true - predicted)).sum(1)
        likelihood = -(log_tokens.exp() * predicted).sum(1)
        tokens_p = log_tokens[:, :-1]
        auxiliary = (tokens_p.exp() * (tokens_p - log_start[:, :-1])).sum(1)
        first = (t == 1)[:, None]
        return tuple(torch.where(first, likelihood, term).mean(1) for term in (divergence, auxiliary))  # type: ignore[return-value]

    def loss(self, network: Callable[..., Tensor], tokens: Tensor, text: Tensor) -> Tensor:
        """Loss of a batch at steps that all are as likely, the auxiliary weight 5e-4."""
        t = torch.randint(1, self.num_steps + 1, (len(tokens),), device=tokens.device)
        noisy = self.draw(self.forward(self.log_one_hot(tokens), t, self.cumulative))
        bound, auxiliary = self.bound(network(noisy, t, text), tokens, noisy, t)
        return (self.num_steps * (bound + 5e-4 * (2 - (t - 1) / self.num_steps) * auxiliary)).mean()

    def truncate(self, log_p: Tensor, fraction: float) -> Tensor:
        """Keep the likeliest codes (B, N, L) that have the fraction of the probability."""
        ordered, order = log_p.sort(dim=1, descending=True)
        within = ordered.exp().cumsum(1) < fraction
        within = torch.cat([torch.ones_like(within[:, :1]), within[:, :-1]], dim=1)
        within = within.gather(1, order.argsort(1)).float()
        return within * log_p + (1 - within) * _FLOOR

    @torch.no_grad()
    def sample(self, network: Any, text: Tensor, null: Tensor, length: int, guidance: float, fraction: float) -> Tensor:
        """Sample tokens (B, L), every step of the chain, with guidance."""
        tokens = torch.full((len(text), length), self.num_codes, device=text.device)
        for step in range(self.num_steps, 0, -1):
            t = torch.full((len(text),), step, device=text.device)
            log_start, log_null = (self.predict(network(tokens, t, given))[:, :-1] for given in (text, null))
            log_start = log_null + guidance * (log_start - log_null)
            log_start = (log_start - log_start.logsumexp(1, keepdim=True)).clamp(_FLOOR, 0.0)
            log_start = F.pad(self.truncate(log_start, fraction), (0, 0, 0, 1), value=_FLOOR)
            tokens = self.draw(self.posterior(log_start, self.log_one_hot(tokens), t))
        return tokens


def maskgit_loss(prior: MaskGIT, tokens: Tensor, condition: Tensor, masked: Tensor | None = None) -> Tensor:
    """Mask by sorting uniform numbers, and take the cross-entropy of the logits that were masked."""
    if masked is None:
        ratio = torch.cos(math.pi / 2 * torch.rand(len(tokens), 1, device=tokens.device))
        order = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        masked = order < (tokens.shape[1] * ratio).ceil()
    logits = prior(tokens.masked_fill(masked, prior.num_codes), condition).float()
    losses = F.cross_entropy(logits.mT, tokens, reduction="none", label_smoothing=0.1)
    return ((losses * masked).sum(1) / masked.sum(1)).mean()


@torch.no_grad()
def maskgit_sample(prior: MaskGIT, condition: Tensor, steps: int, guidance: float, *, greedy: bool = False) -> Tensor:
    """Sample tokens (B, L): softmax, draw, confidence, keep the top, as public implementations do it."""
    count, codes = prior.num_tokens, prior.num_codes
    tokens = torch.full((len(condition), count), codes, device=condition.device)
    both = torch.cat([condition, torch.full_like(condition, prior.num_classes)])
    for step in range(steps):
        conditional, free = prior(torch.cat([tokens, tokens]), both).float().chunk(2)
        probability = (free + guidance * (conditional - free)).softmax(-1)
        flat = probability.flatten(0, 1)
        drawn = (flat.argmax(-1) if greedy else torch.multinomial(flat, 1)[:, 0]).view_as(tokens)
        masked = tokens == codes
        confidence = probability.gather(-1, drawn[..., None])[..., 0].log()
        if not greedy:
            noise = -torch.rand_like(confidence).log().neg().log()
            confidence = confidence + 4.5 * (1 - (step + 1) / steps) * noise
        confidence = confidence.masked_fill(~masked, math.inf)
        left = math.floor(count * math.cos(math.pi / 2 * (step + 1) / steps)) if step + 1 < steps else 0
        kept = confidence.topk(count - left, dim=1).indices
        tokens = torch.full_like(tokens, codes).scatter(1, kept, torch.where(masked, drawn, tokens).gather(1, kept))
    return tokens
