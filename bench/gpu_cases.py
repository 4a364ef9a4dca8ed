"""The vector quantization cases of the benchmarks: their inputs, who competes, and the gate of the results."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import measuring
import peers
import records
import torch
from peers import TensorRun
from torch import Tensor

from regvq_fast.ops import assign_codes, vector_quantize
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.vector_quantize import VectorQuantizeOutput

PARTS = ("forward+backward", "forward", "assign")
LEAVES = ("dx", "dcodebook")
MASK_RATIO = 0.4
TAU = 0.9
DIMENSIONS = 5  # of trained-like latents, whichever D is
FRESH_SEED = 987654321

# Largest deviation of a gradient, of its largest element. 16-bit probabilities are rounded once, and so is the result.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Another index passes where its score is this close to the best one, of |x|^2 + |z|^2 ...
TIE_BAND = 1e-5
# ... which makes few rows ambiguous.
MOST_TIES = 0.01


class WrongResultError(Exception):
    """A result that the fp64 twin doesn't confirm: it gets no time."""


@dataclass(frozen=True)
class Case:
    part: str  # of PARTS, or "backward" alone
    codes: int
    dtype: str
    masked: bool = True  # 40 % of the rows are stochastic
    graph: bool = False  # as a CUDA graph
    rows: int = 10240
    width: int = 256
    latents: str = "random"  # or "trained-like"
    codebook_grad: Literal["soft", "hard"] = "soft"
    op: ClassVar[str] = "vector_quantize"

    @property
    def products(self) -> int:
        """Products of M x N x D that the part can't do without: the forward's one, and four or five backward."""
        backward = 5 if self.codebook_grad == "soft" else 4  # the fifth is p^T dQ
        return {"forward+backward": 1 + backward, "backward": backward}.get(self.part, 1)

    @property
    def flops(self) -> int:
        return self.products * 2 * self.rows * self.codes * self.width

    @property
    def name(self) -> str:
        rows = "" if self.rows == Case.rows else f"M={self.rows}, "
        width = "" if self.width == Case.width else f", D={self.width}"
        return f"{records.part_of({'part': self.part} | self.describe())}, {rows}N={self.codes}{width}, {self.dtype}"

    def describe(self) -> dict[str, Any]:
        """What the report knows the case by, besides what all cases have."""
        masked = self.masked and self.part != "assign"
        return {
            "rows": self.rows,
            "codes": self.codes,
            "width": self.width,
            "masked": masked,
            "graph": self.graph,
            "latents": self.latents,
            "codebook_grad": self.codebook_grad,
        }

    @property
    def bytes(self) -> int:
        """Of the inputs and outputs that are as large as rows or codes: read or written once, at least."""
        # x; quantized; dQ and dx.
        matrices = {"assign": 1, "forward": 2, "backward": 3, "forward+backward": 4}[self.part]
        codebooks = 2 if self.part.endswith("backward") else 1
        return getattr(torch, self.dtype).itemsize * self.width * (matrices * self.rows + codebooks * self.codes)


class Inputs(NamedTuple):
    x: Tensor  # (M, D), leaf
    codebook: Tensor  # (N, D), leaf
    mask: Tensor | None  # (M,)
    stochastic: Tensor | None  # the rows of the mask, int64
    seed: Tensor  # () int64
    tau: Tensor  # (), type of x: as a tensor on the device it costs nobody a copy
    scale: float
    grad_quantized: Tensor  # (M, D)
    grad_posterior: Tensor  # (1, N) fp32


class Truth(NamedTuple):
    """What fp64 says; gradients are empty where the part has none."""

    indices: Tensor
    best_indices: Tensor
    gradients: tuple[Tensor, ...]


def make_inputs(case: Case, device: str) -> Inputs:
    """Rows and codes of unit variance. Random ones have logits of standard deviation 2: no softmax is one-sided."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    trains = case.part != "assign"
    mask = torch.rand(case.rows, generator=generator, device=device) < MASK_RATIO if case.masked and trains else None
    if case.latents == "random":
        x, codebook, scale = normal(case.rows, case.width), normal(case.codes, case.width), 1 / math.sqrt(case.width)
    else:
        x, codebook, scale = trained_like(case, generator)
    return Inputs(
        x=x.to(dtype).requires_grad_(trains),
        codebook=codebook.to(dtype).requires_grad_(trains),
        mask=mask,
        stochastic=None if mask is None else mask.nonzero().squeeze(1),
        seed=torch.tensor(123456789, device=device),
        tau=torch.tensor(TAU, dtype=dtype, device=device),
        scale=scale,
        grad_quantized=normal(case.rows, case.width).to(dtype),
        grad_posterior=case.rows * normal(1, case.codes),  # over M rows, comparable to the other one
    )


def trained_like(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Rows, codes and logit scale whose softmax is that of trained models, see docs/benchmarks.md."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    codes, spacing = normal(case.codes, DIMENSIONS), case.codes ** (-1 / DIMENSIONS)
    use = torch.arange(1.0, case.codes + 1, device=generator.device) ** -0.4
    chosen = use.multinomial(case.rows, replacement=True, generator=generator)
    x = codes[chosen] + 2 * spacing * normal(case.rows, DIMENSIONS)
    # Orthonormal: distances are the same at any width but for the factor.
    basis = math.sqrt(case.width / DIMENSIONS) * torch.linalg.qr(normal(case.width, DIMENSIONS))[0].t()
    return x @ basis, codes @ basis, 0.226 * DIMENSIONS / case.width / spacing**2


# ------------------------------------------------------------------------------------------------------- competitors


def gradients_of(case: Case, inputs: Inputs, quantized: Tensor, posterior: Tensor) -> tuple[Tensor, ...]:
    if not case.part.endswith("backward"):
        return ()
    upstream = [inputs.grad_quantized.to(quantized.dtype), inputs.grad_posterior.to(posterior.dtype)]
    leaves, again = [inputs.x, inputs.codebook], case.part == "backward"
    return torch.autograd.grad([quantized, posterior], leaves, upstream, retain_graph=again)


def call_ours(case: Case, inputs: Inputs, impl: Any = "auto") -> VectorQuantizeOutput:
    """The public op. The seed is drawn outside, as in training."""
    return vector_quantize(
        inputs.x,
        inputs.codebook,
        scale=inputs.scale,
        mask=inputs.mask,
        seed=inputs.seed,
        tau=inputs.tau,
        codebook_grad=case.codebook_grad,
        impl=impl,
    )


def run_ours(case: Case, inputs: Inputs, impl: Any = "auto") -> tuple[Tensor, ...]:
    """Outputs of the public op and gradients, no graph behind them."""
    if case.part == "assign":
        return (assign_codes(inputs.x, inputs.codebook, impl=impl),)
    output = call_ours(case, inputs, impl)
    gradients = gradients_of(case, inputs, output.quantized, output.posterior)
    return *(value.detach() for value in output), *gradients


def call_plain(case: Case, inputs: Inputs, function: Callable[..., VectorQuantizeOutput]) -> VectorQuantizeOutput:
    arguments = (inputs.mask, inputs.stochastic, inputs.tau, inputs.scale, case.codebook_grad)
    return function(inputs.x, inputs.codebook, *arguments)


def run_plain(case: Case, inputs: Inputs, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    if case.part == "assign":
        return (function(inputs.x, inputs.codebook),)
    output = call_plain(case, inputs, function)
    gradients = gradients_of(case, inputs, output.quantized, output.posterior)
    return output.indices, output.quantized.detach(), output.posterior.detach(), *gradients


def run_backward(case: Case, inputs: Inputs, output: VectorQuantizeOutput) -> TensorRun:
    """The gradients alone, again and again, of a forward pass that is done."""
    return partial(gradients_of, case, inputs, output.quantized, output.posterior)


def make_ours(case: Case, inputs: Inputs) -> TensorRun:
    if case.part == "backward":
        return run_backward(case, inputs, call_ours(case, inputs))
    return partial(run_ours, case, inputs)


def make_plain(case: Case, inputs: Inputs, compiles: bool) -> TensorRun:
    function: Callable[..., Any] = peers.plain_assign if case.part == "assign" else peers.plain_quantize
    again = case.part == "backward"
    if compiles:  # forward and backward of a size come out of one compilation
        function = peers.compiled(function, again)
    if not again:
        return partial(run_plain, case, inputs, function)
    # A compiled backward gives its buffers away, and could not run again.
    with torch._functorch.config.patch(donated_buffer=False):
        output = call_plain(case, inputs, function)
        run = run_backward(case, inputs, output)
        run()
    return run


def make_matmul(inputs: Inputs) -> TensorRun:
    """The floor: the product of all rows with all codes, written to memory."""
    x, codes = inputs.x.detach(), inputs.codebook.detach().t()
    return lambda: (x @ codes,)


def names(case: Case) -> tuple[str, ...]:
    """Who takes part in a case."""
    if case.graph:
        others: tuple[str, ...] = ()
    elif case.part == "assign":
        others = ("vqp nearest", "flash-kmeans")
    else:  # "nearest" is our own quantizer without noise, for the packages'
        others = ("nearest", "vqp nearest", "taming nearest", "vqp gumbel")
    return "matmul", "ours", "eager", "compiled", *others


def competitors(case: Case, inputs: Inputs) -> dict[str, Callable[[], TensorRun]]:
    """By name, functions that make the runs, and may raise instead."""
    grad = inputs.grad_quantized if case.part.endswith("backward") else None
    arguments, again = (inputs.x, inputs.codebook, grad), case.part == "backward"
    package = partial(peers.lucidrains, *arguments, again=again)
    makers: dict[str, Callable[[], TensorRun]] = {
        "ours": partial(make_ours, case, inputs),
        "eager": partial(make_plain, case, inputs, False),
        "compiled": partial(make_plain, case, inputs, True),
        "nearest": partial(peers.nearest_quantizer, *arguments, again=again),
        "taming nearest": partial(peers.taming_nearest, *arguments, again=again),
        "vqp nearest": partial(package, gumbel=False, training=case.part != "assign"),
        "vqp gumbel": partial(package, gumbel=True),
        "flash-kmeans": partial(peers.flash_kmeans, inputs.x, inputs.codebook),
        "matmul": partial(make_matmul, inputs),
    }
    if case.graph:
        makers |= {name: partial(_make_graphed, makers[name]) for name in ("ours", "eager", "compiled")}
    return {name: makers[name] for name in names(case)}


def _make_graphed(make: Callable[[], TensorRun]) -> TensorRun:
    run = make()
    run()  # compiles
    return measuring.graphed(run)


# -------------------------------------------------------------------------------------------------------------- gate


def examine(case: Case, inputs: Inputs, truth: Truth, name: str, run: TensorRun) -> dict[str, float]:
    """Raises where ours is wrong. Others answer by their own rules: how many of their nearest codes are fp64's."""
    results = run()
    if name == "ours":
        check(case, inputs, truth, results)
        if case.graph:
            check_replay(case, inputs, run, make_ours(case, inputs))
    elif case.part == "assign" and name != "matmul":
        return {"agreement": float((results[0] == truth.indices).double().mean())}
    return {}


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """The eager twin on fp64 copies of the inputs, with the same noise bits."""
    double = inputs._replace(
        x=inputs.x.detach().double().requires_grad_(inputs.x.requires_grad),
        codebook=inputs.codebook.detach().double().requires_grad_(inputs.codebook.requires_grad),
        tau=inputs.tau.double(),
    )
    full = replace(case, part="forward+backward") if case.part == "backward" else case
    results = run_ours(full, double, "eager")
    if case.part == "assign":
        return Truth(results[0], results[0], ())
    return Truth(results[2], results[3], results[5:])


def check(case: Case, inputs: Inputs, truth: Truth, results: tuple[Tensor, ...]) -> None:
    """Raise :class:`WrongResultError` unless what :func:`run_ours` gave is right in every row and code."""
    if case.part == "assign":
        check_indices("indices", results[0], truth.indices, inputs, None)
        return
    if case.part == "backward":
        check_gradients(inputs, truth, results)
        return
    quantized, posterior, indices, best_indices, perturbation, *gradients = results
    check_indices("best_indices", best_indices, truth.best_indices, inputs, None)
    check_indices("indices", indices, truth.indices, inputs, inputs.mask)
    codebook = inputs.codebook.detach()
    require("quantized", torch.equal(quantized, codebook[indices]), "isn't the chosen codes")
    share = indices.bincount(minlength=case.codes) / case.rows
    require("posterior", torch.allclose(posterior[0], share, rtol=0, atol=1e-6), "isn't the indices' frequencies")
    distance = (codebook[indices].double() - codebook[best_indices].double()).square().sum(1)
    near = torch.allclose(perturbation.double(), distance, rtol=1e-4, atol=1e-6)
    require("perturbation", near, "isn't the squared distance of the two codes")
    check_gradients(inputs, truth, gradients)


def check_gradients(inputs: Inputs, truth: Truth, gradients: Sequence[Tensor]) -> None:
    for name, gradient, expected in zip(LEAVES[: len(gradients)], gradients, truth.gradients, strict=True):
        error = float((gradient.double() - expected).abs().max() / expected.abs().max())
        tolerance = GRADIENT_TOLERANCE[inputs.x.dtype]
        require(name, error <= tolerance, f"is off by {error:.2g} of its largest element, {tolerance} is allowed")


def check_indices(name: str, indices: Tensor, expected: Tensor, inputs: Inputs, mask: Tensor | None) -> None:
    """Indices are the expected ones, except on a few rows whose scores tie within rounding."""
    codes = len(inputs.codebook)
    require(name, bool(((indices >= 0) & (indices < codes)).all()), "aren't codes")
    rows = (indices != expected).nonzero().squeeze(1)
    share = len(rows) / len(indices)
    require(name, share <= MOST_TIES, f"differ from those of fp64 on {100 * share:.2g} % of the rows")
    if not len(rows):
        return
    x, codebook = inputs.x.detach()[rows].double(), inputs.codebook.detach().double()
    noise = torch.zeros(len(rows), codes, dtype=torch.float64, device=x.device)
    if mask is not None:
        noise = gumbel_noise(inputs.seed, rows, codes) * mask[rows].unsqueeze(1)

    def score(chosen: Tensor) -> Tensor:
        distance = (x - codebook[chosen]).square().sum(1)
        return noise.gather(1, chosen.unsqueeze(1)).squeeze(1) - inputs.scale * distance

    lost = (score(expected[rows]) - score(indices[rows])).abs()
    band = TIE_BAND * inputs.scale * (x.square().sum(1) + codebook[expected[rows]].square().sum(1))
    worst = float((lost - band).max())
    require(name, worst <= 0, f"miss a better code by {float(lost.max()):.2g}")


def require(name: str, condition: bool, problem: str) -> None:
    if not condition:
        raise WrongResultError(f"{name} {problem}")


def check_replay(case: Case, inputs: Inputs, replay: TensorRun, call: TensorRun) -> None:
    """With a new seed in the graph's tensor a replay is right, and has the indices of a call with that seed."""
    old, old_indices = inputs.seed.clone(), replay()[2].clone()
    inputs.seed.fill_(FRESH_SEED)
    replayed = replay()
    check(case, inputs, truth_of(case, inputs), replayed)
    what, indices = "indices of a replay with a new seed", replayed[2]
    require(what, torch.equal(indices, call()[2]), "differ from a call's")
    inputs.seed.copy_(old)
    changed = indices != old_indices
    stochastic = torch.zeros_like(changed) if inputs.mask is None else inputs.mask
    require(what, bool(changed.any()), "are those of the old seed")
    require(what, not changed[~stochastic].any(), "differ on deterministic rows")
