"""What the ops are measured against: plain PyTorch, and other packages where they are installed.

Each function gives a run: a call without arguments that returns tensors without a graph behind them. The packages
answer other questions than ours does, which the docstrings say; none of them is needed to run the rest.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regvq_fast import NearestQuantizer
from regvq_fast.ops.vector_quantize import VectorQuantizeOutput

TensorRun = Callable[[], tuple[Tensor, ...]]
PACKAGES = ("vector-quantize-pytorch", "flash-kmeans", "inf-cl", "taming-transformers-rom1504")

GPU_ONLY = ("flash-kmeans", "inf-cl")  # Triton kernels


class SkippedError(Exception):
    """A competitor that can't run here; the message says why."""


def package(name: str) -> ModuleType:
    """The module of one of :data:`PACKAGES`, imported only where it is measured."""
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise SkippedError(f"{name} is not installed: pip install {name} ({error})") from error


def versions() -> dict[str, str | None]:
    """Versions of :data:`PACKAGES`; None where one isn't installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------------------------------- plain PyTorch


def plain_quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    stochastic: Tensor | None,
    tau: Tensor | float,
    scale: float,
    codebook_grad: str,
) -> VectorQuantizeOutput:
    """``vector_quantize`` in plain PyTorch, in the type of ``x`` and in the cheapest of its forms.

    Distances are one product with a bias and without ``|x|^2``, noise is sampled for the rows of the mask alone
    (``stochastic``, their int64 numbers), the look-up gathers codes, and scores change in place.
    """
    scores = torch.addmm(-scale * codebook.square().sum(1), x, codebook.t(), alpha=2 * scale)
    best_indices = indices = scores.argmax(1)
    if mask is not None and stochastic is not None:
        noise = x.new_empty(len(stochastic), len(codebook)).exponential_().log_().neg_()
        if torch.compiler.is_compiling():  # of 16 bits, index_add would not be fused
            scores = scores + torch.zeros_like(scores).index_copy(0, stochastic, noise)
        else:
            scores.index_add_(0, stochastic, noise)
        indices = scores.argmax(1)
        scores.div_(torch.where(mask, tau, 1.0).to(x.dtype).unsqueeze(1))
    p = scores.softmax(1)
    soft = p @ (codebook if codebook_grad == "soft" else codebook.detach())
    chosen = codebook[indices]
    hard = chosen.detach() if codebook_grad == "soft" else chosen
    counts = torch.zeros(len(codebook), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
    mean = p.mean(0)
    return VectorQuantizeOutput(
        quantized=hard + (soft - soft.detach()),
        posterior=(counts / len(x) + (mean - mean.detach())).unsqueeze(0),
        indices=indices,
        best_indices=best_indices,
        perturbation=(chosen - codebook[best_indices]).detach().square().sum(1),
    )


def plain_info_nce(query: Tensor, key: Tensor, weight: Tensor, tau: float) -> Tensor:
    """``weighted_info_nce`` in plain PyTorch, in the type of the features: one L x L matrix an image."""
    constant = math.log(query.shape[1])
    scores = torch.bmm(query / tau, key.mT)
    diagonal = scores.diagonal(dim1=1, dim2=2)
    positive = diagonal.clone()
    diagonal.add_(weight.log() + constant)
    return scores.logsumexp(2) - constant - positive


def plain_assign(x: Tensor, codebook: Tensor) -> Tensor:
    """``assign_codes`` in plain PyTorch, the distances as one product with a bias."""
    return torch.addmm(codebook.square().sum(1).mul(-0.5), x, codebook.t()).argmax(1)


@functools.cache
def compiled(function: Callable[..., Any], again: bool) -> Callable[..., Any]:
    """Compile ``function``, anew for each size; ``again``: for backwards that run more than once."""
    # Past this number of sizes it would run uncompiled, or refuse.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)


# --------------------------------------------------------------------------------------------------- other packages


def lucidrains(
    x: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    *,
    gumbel: bool,
    training: bool = True,
    again: bool = False,
) -> TensorRun:
    """``vector_quantize_pytorch.VectorQuantize``, which computes in fp32 whatever the type of ``x``.

    Nearest: no noise, straight-through identity, a learnable codebook with its commitment loss. Gumbel: noise on every
    row, gradient of the softmax to x; the codebook learns by moving averages, inside the forward pass. Backward where
    there is a ``grad_quantized``; with ``again`` the backward alone, of one forward pass.
    """
    num_codes, width = codebook.shape
    if gumbel:
        settings: dict[str, Any] = {
            "stochastic_sample_codes": True,
            "straight_through": True,
            "sample_codebook_temp": 0.9,
            "route_gradients_to_input": False,  # or the straight-through identity would replace the softmax's gradient
        }
    else:
        settings = {"learnable_codebook": True, "ema_update": False}
    module = package("vector-quantize-pytorch").VectorQuantize(
        dim=width, codebook_size=num_codes, rotation_trick=False, freeze_codebook=grad_quantized is None, **settings
    )
    module.to(x.device).train(training)
    module._codebook.embed.data.copy_(codebook.detach().unsqueeze(0))
    leaves = [x] if gumbel else [x, *module.parameters()]
    batch = x if training else x.detach()

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(training):
            quantized, indices, loss = module(batch.unsqueeze(0))
        return quantized.squeeze(0), indices, loss

    return _quantizer_run(forward, leaves, grad_quantized, again)


def taming_nearest(x: Tensor, codebook: Tensor, grad_quantized: Tensor | None, *, again: bool = False) -> TensorRun:
    """taming-transformers' ``VectorQuantizer2``: nearest code, straight-through identity, in the type of ``x``."""
    from taming_step import taming_module

    module = taming_module("vqvae.quantize").VectorQuantizer2(*codebook.shape, beta=0.25, legacy=False)
    module.to(x.device, x.dtype).embedding.weight.data.copy_(codebook.detach())

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, (_, _, indices) = module(_as_map(x))
        return _as_rows(quantized), indices, loss

    return _quantizer_run(forward, [x, *module.parameters()], grad_quantized, again)


def nearest_quantizer(x: Tensor, codebook: Tensor, grad_quantized: Tensor | None, *, again: bool = False) -> TensorRun:
    """Our ``NearestQuantizer``, for those who compute the same: the two packages without noise."""
    module = NearestQuantizer(*codebook.shape).to(x.device)
    module.embedding.weight.data.copy_(codebook.detach())

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        output = module(_as_map(x))
        return _as_rows(output.quantized), output.indices, output.loss

    return _quantizer_run(forward, [x, *module.parameters()], grad_quantized, again)


def _as_map(x: Tensor) -> Tensor:
    """Rows (M, D) as a map (1, D, 1, M), as they lie in memory."""
    return x.t().unsqueeze(1).unsqueeze(0)


def _as_rows(quantized: Tensor) -> Tensor:
    return quantized.squeeze(0).squeeze(1).t()


def _quantizer_run(
    forward: Callable[[], tuple[Tensor, Tensor, Tensor]], leaves: list[Tensor], grad: Tensor | None, again: bool
) -> TensorRun:
    """Quantized rows, indices and loss of ``forward``, with gradients where there is a ``grad``; or these alone."""

    def backward(quantized: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        if grad is None:
            return ()
        upstream = [grad.to(quantized.dtype), torch.ones_like(loss)]
        return torch.autograd.grad([quantized, loss], leaves, upstream, retain_graph=again)

    def run() -> tuple[Tensor, ...]:
        quantized, indices, loss = forward()
        return indices.flatten(), quantized.detach(), loss.detach(), *backward(quantized, loss)

    if again:
        quantized, _, loss = forward()
        return lambda: backward(quantized, loss)
    return run


def flash_kmeans(x: Tensor, codebook: Tensor) -> TensorRun:
    """flash-kmeans' assignment step, with ``|x|^2`` ready, as its k-means loop has it; fp32 inputs multiply in TF32."""
    package("flash-kmeans")
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    batch, centroids = x.detach().unsqueeze(0), codebook.detach().unsqueeze(0)
    norms = batch.float().square().sum(-1)
    return lambda: (euclid_assign_triton(batch, centroids, norms).flatten(),)


def inf_cl(query: Tensor, key: Tensor, tau: float) -> Callable[[], Tensor]:
    """inf-cl's flash loss, InfoNCE without weights: losses (B, L) with their graph.

    It knows one image, so that B of them take turns; it converts 16-bit features to fp32 and multiplies in TF32; and
    its backward computes both gradients, whichever is asked for.
    """
    loss = package("inf-cl").cal_flash_loss
    width = query.shape[2]
    head = min(width, 256)  # channels of a product; 256 is its default, and C must be a multiple
    if width % head:
        raise SkippedError(f"inf-cl takes C <= 256 or a multiple of 256, not {width}")

    def run() -> Tensor:
        # One by one they would be indexed, and the backward of every index would fill all of the key's gradient.
        images = zip(query.unbind(), key.unbind(), strict=True)
        return torch.stack([loss(one, other, scale=1 / tau, head_dim=head) for one, other in images])

    return run
