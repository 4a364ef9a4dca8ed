"""Competitors of the ops: plain PyTorch, and other packages where they are installed.

A competitor is a forward pass, a call whose first results take gradients, and the leaves that they go to. The packages
answer other questions than ours does, which the docstrings say; none of them is needed to run the rest.
"""

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from measuring import SkippedError
from step_peers import taming_module
from torch import Tensor, nn

from regvq_fast import NearestQuantizer
from regvq_fast.integrations import accelerate
from regvq_fast.ops import vector_quantize

Forward = Callable[[], tuple[Tensor, ...]]
GPU_ONLY = ("flash-kmeans", "inf-cl")  # Triton kernels


def package(name: str, module: str = "") -> ModuleType:
    """Return the module of a package, imported only where it is measured."""
    try:
        return importlib.import_module(module or name.replace("-", "_"))
    except ImportError as error:
        raise SkippedError(f"{name} is not installed: pip install {name} ({error})") from error


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


def quantizer(module: nn.Module, x: Tensor, codebook: Tensor) -> tuple[Forward, list[Tensor]]:
    """A quantizer of maps with an ``embedding``, on rows: our `NearestQuantizer`, or one that computes the same."""
    module.to(x.device).embedding.weight.data.copy_(codebook.detach())  # type: ignore[union-attr,operator]

    def forward() -> tuple[Tensor, ...]:
        output = module(x.t().unsqueeze(1).unsqueeze(0))  # (M, D) as a map (1, D, 1, M), as they lie in memory
        quantized, loss = (output.quantized, output.loss) if hasattr(output, "loss") else output[:2]
        return quantized.squeeze(0).squeeze(1).t(), loss

    return forward, [x, *module.parameters()]


def nearest(x: Tensor, codebook: Tensor) -> tuple[Forward, list[Tensor]]:
    """Our ``NearestQuantizer``, for those who compute the same: the two packages without noise."""
    return quantizer(NearestQuantizer(*codebook.shape), x, codebook)


def taming_nearest(x: Tensor, codebook: Tensor) -> tuple[Forward, list[Tensor]]:
    """taming-transformers' ``VectorQuantizer2``: nearest code, straight-through identity, in the type of ``x``."""
    module = taming_module("vqvae.quantize").VectorQuantizer2(*codebook.shape, beta=0.25, legacy=False)
    return quantizer(module.to(x.dtype), x, codebook)


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


class IBQ(nn.Module):
    """The look-up of IBQ: as its authors write it, which keeps several M x N matrices, or by our op."""

    def __init__(self, num_codes: int, width: int, fused: bool) -> None:
        super().__init__()
        self.embedding, self.fused = nn.Embedding(num_codes, width), fused

    def forward(self, z: Tensor) -> tuple[Tensor]:
        codebook, rows = self.embedding.weight, z.permute(0, 2, 3, 1)
        if self.fused:
            out = vector_quantize(rows, codebook, weight=codebook, codebook_grad="hard")
            return (out.quantized.permute(0, 3, 1, 2),)
        soft = (rows @ codebook.t()).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (((hard - soft.detach() + soft) @ codebook).permute(0, 3, 1, 2),)


def library_quantizer(library: str, num_codes: int, width: int, ours: bool) -> nn.Module:
    """A quantizer of (B, D, H, W) maps of another library, or the same after ``accelerate``."""
    torch.manual_seed(0)
    if library == "IBQ":
        return IBQ(num_codes, width, ours)
    if library == "vector-quantize-pytorch":
        module = package(library).VectorQuantize(width, num_codes, accept_image_fmap=True)
    else:
        kind = (
            taming_module("vqvae.quantize").VectorQuantizer2
            if library == "taming"
            else package("diffusers", "diffusers.models.autoencoders.vae").VectorQuantizer
        )
        module = kind(num_codes, width, beta=0.25)
        nn.init.normal_(module.embedding.weight)
    if ours:
        accelerate(module)
    return module
