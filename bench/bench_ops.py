"""The ops beside plain PyTorch, eager and compiled, and other packages, each result of ours checked before it is timed.

pytest bench/bench_ops.py --benchmark-only                  forward, backward and both over N, D and types
pytest bench/bench_ops.py --benchmark-only -k assign_codes  a part of it, by the names that it prints
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import peers
import torch
import torch.nn.functional as F
from measuring import Run, WrongResultError, graphed
from peers import Forward
from torch import Tensor

from regvq_fast.ops import assign_codes, vector_quantize, weighted_info_nce
from regvq_fast.ops.noise import gumbel_noise

STEP, FORWARD, BACKWARD, ASSIGN = "forward+backward", "forward", "backward", "assign"
MASK_RATIO, TAU, INFO_NCE_TAU = 0.4, 0.9, 0.07
SEED = 123456789
LATENTS: tuple[Literal["random", "trained-like"], ...] = ("random", "trained-like")
VQP = "vector-quantize-pytorch"
DIMENSIONS = 5  # of trained-like latents, whichever D is
# Largest deviation of a gradient, of its largest element (InfoNCE: of a row's norm). 16-bit probabilities are rounded.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LOSS_TOLERANCE = 1e-3  # similarities, up to 1 / tau, are sums of fp32 whatever the type of the features
TIE_BAND, MOST_TIES = 1e-5, 0.01  # of |x|^2 + |z|^2; and the fraction of rows that may tie within it
Prepared = tuple[dict[str, Callable[[], Run]], Callable[[str, Any], dict[str, Any]]]


def require(name: str, condition: bool | Tensor, problem: str) -> None:
    """Raise :class:`WrongResultError` unless the condition holds."""
    if not condition:
        raise WrongResultError(f"{name} {problem}")


def normals(device: str) -> Callable[..., Tensor]:
    """Return a function of normal numbers, and of uniform ones with ``normal.rand``."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    draw.rand, draw.generator = partial(torch.rand, generator=generator, device=device), generator  # type: ignore[attr-defined]
    return draw


def make_run(part: str, forward: Forward, leaves: list[Tensor], grads: list[Tensor]) -> Run:
    """Return the call that is timed: results of ``forward``, gradients of the first of them, or both."""

    def gradients(outputs: tuple[Tensor, ...], again: bool) -> tuple[Tensor, ...]:
        upstream = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=False)]
        return torch.autograd.grad(outputs[: len(grads)], leaves, upstream, retain_graph=again)

    def run() -> tuple[Tensor, ...]:
        outputs = forward()
        found = gradients(outputs, False) if part == STEP else ()
        return (*(output.detach() for output in outputs), *found)

    if part != BACKWARD:
        return run
    with torch._functorch.config.patch(donated_buffer=False):  # or a compiled backward could not run again
        outputs = forward()
        gradients(outputs, True)
    return lambda: gradients(outputs, True)


@dataclass(frozen=True)
class Case:
    """A case of any op. ``part``: STEP, FORWARD, BACKWARD or, of `Quantize`, ASSIGN."""

    part: str
    codes: int  # N; of InfoNCE L, the positions of an image
    dtype: str
    width: int = 256  # D or C
    rows: int = 10240  # M; of InfoNCE B L, where L isn't larger
    whole: ClassVar[bool] = False
    op: ClassVar[str]

    @property
    def type(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def label(self) -> str:
        return self.part

    @property
    def name(self) -> str:
        return ", ".join([self.op, self.label, *(f"{k}={v}" for k, v in self.size.items()), self.dtype])

    @property
    def size(self) -> dict[str, int]:
        return {"M": self.rows, "N": self.codes, "D": self.width}

    products: ClassVar[Any]  # of all rows with all codes, that the part can't do without
    peers: ClassVar[Any]  # names of ours for others' jobs, and of other packages

    @property
    def flops(self) -> int:
        return int(self.products * 2 * self.rows * self.codes * self.width)

    def competitors(self, device: str) -> tuple[str, ...]:
        """Names; on a CPU "compiled" competes in few cases: compiling takes longer than all the rest."""
        slow = () if self.rows >= 4096 and self.part != BACKWARD else ("compiled",)
        left_out = () if device == "cuda" else (*peers.GPU_ONLY, *slow)
        return tuple(name for name in ("matmul", "ours", "eager", "compiled", *self.peers) if name not in left_out)

    def facts(self) -> dict[str, Any]:
        """Return what a record has of the case."""
        found = {"op": self.op, "part": self.label, "size": self.size, "detail": self.dtype}
        return found | {"products": self.products, "flops": self.flops}

    def prepare(self, device: str) -> Prepared:
        """Return functions that make the runs, and the check of a run's results."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantize(Case):
    """A case of ``vector_quantize``, or of ``assign_codes``."""

    masked: bool = True  # 40 % of the rows are stochastic
    graph: bool = False  # as a CUDA graph
    latents: Literal["random", "trained-like"] = "random"
    codebook_grad: Literal["soft", "hard"] = "soft"

    @property
    def op(self) -> str:  # type: ignore[override]
        return "assign_codes" if self.part == ASSIGN else "vector_quantize"

    @property
    def label(self) -> str:
        unusual = (self.graph, "CUDA graph"), (not self.masked, "no noise"), (self.latents != "random", self.latents)
        unusual += ((self.codebook_grad == "hard", "hard codebook gradient"),)  # type: ignore[assignment]
        return ", ".join([self.part, *(name for holds, name in unusual if holds)])

    @property
    def products(self) -> int:
        backward = 5 if self.codebook_grad == "soft" else 4  # the fifth is p^T dQ
        return {STEP: 1 + backward, BACKWARD: backward}.get(self.part, 1)

    @property
    def peers(self) -> tuple[str, ...]:
        if self.part == ASSIGN:
            return ("vqp nearest", "flash-kmeans")
        known = self.graph or (self.rows == Case.rows and self.width != Case.width)  # packages at one width, for time
        return () if known else ("nearest", "vqp nearest", "taming nearest", "vqp gumbel")

    def latent(self, normal: Any) -> tuple[Tensor, Tensor, float]:
        """Return rows and codes of unit variance, and the logit scale.

        Random ones have logits of standard deviation 2: no softmax is one-sided. Trained-like ones have the softmax of
        trained models, see docs/benchmarks.md.
        """
        if self.latents == "random":
            return normal(self.rows, self.width), normal(self.codes, self.width), 1 / math.sqrt(self.width)
        codes, spacing = normal(self.codes, DIMENSIONS), self.codes ** (-1 / DIMENSIONS)
        use = torch.arange(1.0, self.codes + 1, device=codes.device) ** -0.4
        chosen = use.multinomial(self.rows, replacement=True, generator=normal.generator)
        x = codes[chosen] + 2 * spacing * normal(self.rows, DIMENSIONS)
        # Orthonormal: distances are the same at any width but for the factor.
        basis = math.sqrt(self.width / DIMENSIONS) * torch.linalg.qr(normal(self.width, DIMENSIONS))[0].t()
        return x @ basis, codes @ basis, 0.226 * DIMENSIONS / self.width / spacing**2

    def inputs(self, device: str) -> dict[str, Any]:
        """Return the arguments of ``vector_quantize``."""
        normal: Any = normals(device)
        mask = normal.rand(self.rows) < MASK_RATIO if self.masked and self.part != ASSIGN else None
        x, codebook, scale = self.latent(normal)
        x, codebook = (value.to(self.type).requires_grad_(self.part != ASSIGN) for value in (x, codebook))
        tau = torch.tensor(TAU, dtype=self.type, device=device)  # on the device: no implementation pays for a copy
        found = {"x": x, "codebook": codebook, "scale": scale, "mask": mask, "tau": tau}
        return found | {"seed": torch.tensor(SEED, device=device), "codebook_grad": self.codebook_grad}

    def prepare(self, device: str) -> Prepared:
        given, normal = self.inputs(device), normals(device)
        x, codebook, mask = given["x"], given["codebook"], given["mask"]
        # The posterior's is over M rows, comparable to the other one.
        grads = [normal(self.rows, self.width).to(self.type), self.rows * normal(1, self.codes)]
        rows = None if mask is None else mask.nonzero().squeeze(1)
        plain = [x, codebook, mask, rows, given["tau"], given["scale"], self.codebook_grad]
        function: Callable[..., Any] = peers.plain_assign if self.part == ASSIGN else peers.plain_quantize

        def ours(given: dict[str, Any] = given, part: str = self.part, **impl: Any) -> Run:
            x, codebook = given["x"], given["codebook"]
            if part == ASSIGN:
                return lambda: (assign_codes(x, codebook, **impl),)
            return make_run(part, lambda: vector_quantize(**given, **impl), [x, codebook], grads)

        def make_plain(function: Callable[..., Any]) -> Run:
            arguments = plain[:2] if self.part == ASSIGN else plain
            return make_run(self.part, lambda: function(*arguments), [x, codebook], grads)

        def make_peer(make: Callable[..., Any], **settings: Any) -> Run:
            forward, leaves = make(x, codebook, **settings)
            return make_run(self.part, forward, leaves, [grads[0], torch.ones((), device=device)])

        makers: dict[str, Callable[[], Run]] = {
            "matmul": lambda: lambda: (x.detach() @ codebook.detach().t(),),  # the floor, written to memory
            "ours": ours,
            "eager": partial(make_plain, function),
            "compiled": lambda: make_plain(peers.compiled(function, self.part == BACKWARD)),
            "nearest": partial(make_peer, peers.nearest),
            "taming nearest": partial(make_peer, peers.taming_nearest),
            "vqp nearest": partial(make_peer, peers.vqp, gumbel=False, training=self.part != ASSIGN),
            "vqp gumbel": partial(make_peer, peers.vqp, gumbel=True),
            "flash-kmeans": lambda: peers.flash_kmeans(x, codebook),
        }

        def make_graph(make: Callable[[], Run]) -> Run:
            given["seed"].fill_(0)
            run = graphed(make())
            given["seed"].fill_(SEED)  # a replay that kept the old seed has wrong indices
            return run

        if self.graph:
            makers |= {name: partial(make_graph, makers[name]) for name in ("ours", "eager", "compiled")}
        types = (torch.float16, torch.bfloat16, torch.float32)
        double = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.dtype in types
            else value
            for name, value in given.items()
        }
        truth = ours(double, STEP if self.part == BACKWARD else self.part, impl="eager")()

        def examine(name: str, results: tuple[Tensor, ...]) -> dict[str, Any]:
            if name == "ours":
                self.check(given, truth, results)
            elif self.part == ASSIGN and name != "matmul":
                return {"agreement": float((results[-1] == truth[0]).double().mean())}  # with the nearest code in fp64
            return {}

        return makers, examine

    def check(self, given: dict[str, Any], truth: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        """Raise :class:`WrongResultError` unless every row and code of a run of ours is right."""
        if self.part == ASSIGN:
            check_indices("indices", results[0], truth[0], given, None)
            return
        if self.part != BACKWARD:
            quantized, posterior, indices, best_indices, perturbation = results[:5]
            check_indices("indices", indices, truth[2], given, given["mask"])
            check_indices("best_indices", best_indices, truth[3], given, None)
            codebook = given["codebook"].detach()
            require("quantized", torch.equal(quantized, codebook[indices]), "isn't the selected codes")
            fraction = indices.bincount(minlength=self.codes) / self.rows
            near = torch.allclose(posterior[0], fraction, rtol=0, atol=1e-6)
            require("posterior", near, "isn't the indices' frequencies")
            distance = (codebook[indices].double() - codebook[best_indices].double()).square().sum(1)
            near = torch.allclose(perturbation.double(), distance, rtol=1e-4, atol=1e-6)
            require("perturbation", near, "isn't the squared distance of the two codes")
        gradients = results if self.part == BACKWARD else results[5:]
        for name, gradient, expected in zip(("dx", "dcodebook"), gradients, truth[5:], strict=False):
            error = float((gradient.double() - expected).abs().max() / expected.abs().max())
            allowed = GRADIENT_TOLERANCE[self.type]
            require(name, error <= allowed, f"is off by {error:.2g} of its largest element, {allowed} is allowed")


def check_indices(name: str, indices: Tensor, expected: Tensor, given: dict[str, Any], mask: Tensor | None) -> None:
    """Refuse indices other than the expected ones, except on a few rows whose scores tie within rounding."""
    codebook = given["codebook"].detach().double()
    require(name, ((indices >= 0) & (indices < len(codebook))).all(), "aren't codes")
    rows = (indices != expected).nonzero().squeeze(1)
    fraction = len(rows) / len(indices)
    require(name, fraction <= MOST_TIES, f"differ from those of fp64 on {100 * fraction:.2g} % of the rows")
    if not len(rows):
        return
    x = given["x"].detach()[rows].double()
    noise = x.new_zeros(len(rows), len(codebook))
    if mask is not None:
        noise = gumbel_noise(given["seed"], rows, len(codebook)) * mask[rows].unsqueeze(1)

    def score(chosen: Tensor) -> Tensor:
        distance = (x - codebook[chosen]).square().sum(1)
        return noise.gather(1, chosen.unsqueeze(1)).squeeze(1) - given["scale"] * distance

    lost = (score(expected[rows]) - score(indices[rows])).abs()
    band = TIE_BAND * given["scale"] * (x.square().sum(1) + codebook[expected[rows]].square().sum(1))
    require(name, (lost <= band).all(), f"miss a better code by {float(lost.max()):.2g}")


@dataclass(frozen=True)
class InfoNce(Case):
    """A case of ``weighted_info_nce``; the gradient is that of the key, as in training."""

    rows: int = 65536
    op: ClassVar[str] = "weighted_info_nce"

    @property
    def size(self) -> dict[str, int]:
        return {"B": max(1, self.rows // self.codes), "L": self.codes, "C": self.width}

    @property
    def products(self) -> int:
        return {STEP: 3, BACKWARD: 2}.get(self.part, 1)  # similarities; again, and the key's gradient

    @property
    def flops(self) -> int:
        return self.products * 2 * self.size["B"] * self.codes**2 * self.width

    @property
    def peers(self) -> tuple[str, ...]:
        return ("vanilla", "inf-cl")  # the first is ours without weights, for the other

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query, key, weights and the losses' gradient.

        Features after a ReLU, of 16 latent factors, and a reconstruction that resembles them; most weights are 0. Such
        keys have many near neighbours: softmaxes are neither flat nor one-sided, and the negatives' part of the
        gradient is as large as the positive's. Of independent normal features it would vanish in the tolerance.
        """
        normal: Any = normals(device)
        shape = (self.size["B"], self.codes)
        mixing, original = normal(16, self.width), normal(*shape, 16)
        features = original @ mixing, (original + 0.5 * normal(*shape, 16)) @ mixing
        query, key = (F.normalize(feature.relu(), dim=2).to(self.type) for feature in features)
        weight = (normal.rand(shape) < MASK_RATIO) * normal.rand(shape)
        return query, key.requires_grad_(), weight / weight.sum(1, keepdim=True), 0.5 + normal.rand(shape)

    def prepare(self, device: str) -> Prepared:
        query, key, weight, grad = self.inputs(device)
        plain_weight = weight.to(query.dtype)

        def ours(weight: Tensor | None, q: Tensor = query, k: Tensor = key, part: str = self.part, **impl: Any) -> Run:
            return make_run(part, lambda: (weighted_info_nce(q, k, weight, tau=INFO_NCE_TAU, **impl),), [k], [grad])

        def make_plain(function: Callable[..., Any]) -> Run:
            return make_run(self.part, lambda: function(query, key, plain_weight, INFO_NCE_TAU), [key], [grad])

        makers: dict[str, Callable[[], Run]] = {
            "matmul": lambda: lambda: (torch.bmm(query, key.detach().mT),),  # the floor, written to memory
            "ours": partial(ours, weight),
            "vanilla": partial(ours, None),
            "eager": partial(make_plain, peers.plain_info_nce),
            "compiled": lambda: make_plain(peers.compiled(peers.plain_info_nce, self.part == BACKWARD)),
            "inf-cl": lambda: make_run(self.part, peers.inf_cl(query, key, INFO_NCE_TAU), [key], [grad]),
        }
        double, full = (
            (query.double(), key.detach().double().requires_grad_()),
            STEP if self.part == BACKWARD else self.part,
        )
        truths = [ours(w, *double, full, impl="eager")() for w in (weight, None)]

        def examine(name: str, results: tuple[Tensor, ...]) -> dict[str, Any]:
            truth = truths[name in ("vanilla", "inf-cl")]
            if name == "matmul" or (self.part == BACKWARD and name not in ("ours", "vanilla")):
                return {}
            if self.part == BACKWARD:
                results = (truth[0], *results)
            error = float((results[0].double() - truth[0]).abs().max())
            if name in ("ours", "vanilla"):
                require("loss", error <= LOSS_TOLERANCE, f"is off by {error:.2g}, {LOSS_TOLERANCE} is allowed")
                for gradient, expected in zip(results[1:], truth[1:], strict=True):
                    off = float(((gradient.double() - expected).norm(dim=2) / expected.norm(dim=2)).max())
                    allowed = GRADIENT_TOLERANCE[self.type]
                    require("dkey", off <= allowed, f"is off by {off:.2g} of a row's norm, {allowed} is allowed")
            return {"loss_error": error}

        return makers, examine


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Swapped(Case):
    """A training step of another library's quantizer, before and after ``regvq_fast.integrations.accelerate``."""

    library: str = "taming"
    op: ClassVar[str] = "accelerate"

    @property
    def label(self) -> str:
        return f"{self.library}, {self.part}"

    def competitors(self, device: str) -> tuple[str, ...]:
        return "ours", "library"

    def facts(self) -> dict[str, Any]:
        return {"op": self.op, "part": self.library, "size": self.size, "detail": self.dtype}

    def prepare(self, device: str) -> Prepared:
        normal = normals(device)
        side, scale = 16, self.width**-0.5 if self.library == "IBQ" else 1.0  # its logits are products: of variance 1
        batch = (normal(self.rows // side**2, self.width, side, side) * scale).requires_grad_()
        grad, results = normal(*batch.shape), []

        def make(ours: bool) -> Run:
            module = peers.library_quantizer(self.library, self.codes, self.width, ours).to(device)
            return make_run(STEP, lambda: (module(batch)[0],), [batch], [grad])

        def examine(name: str, found: tuple[Tensor, ...]) -> dict[str, Any]:
            """Compare both, ties within rounding aside."""
            results.append(found)
            for ours, theirs in zip(results[0], found, strict=True):
                wrong = float(((ours - theirs).abs() > 1e-3 * theirs.abs().max()).float().mean())
                require(self.library, wrong < 1e-3, f"differs in a fraction of {wrong:.4f} of the values")
            return {}

        return {"ours": partial(make, True), "library": partial(make, False)}, examine


def cases(device: str) -> list[Case]:
    """Most important cases first, since time may run out; on a CPU fewer rows and combinations."""
    if device == "cpu":
        large = [Quantize(part, 8192, "float32", 64, 4096) for part in (STEP, FORWARD, BACKWARD)]
        usual = [Quantize(STEP, n, "float32", 64, 4096, latents=kind) for n in (1024, 4096) for kind in LATENTS]
        codes = [Quantize(STEP, n, "float32", 64, rows) for n, rows in ((512, 512), (8192, 512), (65536, 256))]
        widths = [Quantize(STEP, 2048, "float32", width, 512) for width in (8, 16, 32, 64, 256, 512)]
        halves = [Quantize(STEP, 2048, dtype, 64, 512) for dtype in ("float16", "bfloat16")]
        hard = [Quantize(STEP, 2048, "float32", 64, 512, codebook_grad="hard")]
        sizes = [(8192, "float32", 64, 4096), *((n, "float32", 64, 1024) for n in (512, 4096, 65536))]
        sizes += [(4096, "float32", d, 1024) for d in (8, 16, 32, 256, 512)] + [(4096, "bfloat16", 64, 1024)]
        maps = [InfoNce(part, 4096, "float32", 128, 4096) for part in (STEP, FORWARD, BACKWARD)]
        maps += [InfoNce(STEP, n, "float32", c, 2048) for n, c in ((256, 128), (1024, 128), (1024, 512))]
        maps += [InfoNce(STEP, 1024, dtype, 128, 2048) for dtype in ("float16", "bfloat16")]
        swaps = [Swapped(STEP, 8192, "float32", 64, 4096, name) for name in ("taming", "diffusers", VQP)]
        swaps.append(Swapped(STEP, 16384, "float32", 256, 1024, "IBQ"))
        return [*large, *usual, *codes, *widths, *halves, *hard, *(Quantize(ASSIGN, *s) for s in sizes), *maps, *swaps]
    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"  # bf16 is emulated below sm_80
    types, both = (half, "float32"), (STEP, FORWARD)
    found: list[Case] = [Quantize(STEP, 1024, half, graph=True)]
    found += [Quantize(p, n, t, d) for d in (256, 64, 32, 8) for n in (8192, 1024) for t in types for p in both]
    found += [Quantize(STEP, n, half, latents="trained-like") for n in (8192, 1024)]
    found += [Quantize(STEP, 8192, half, codebook_grad="hard")]
    found += [Quantize(p, n, t, 16) for n in (8192, 1024) for t in types for p in both]
    found += [Quantize(ASSIGN, n, t, d) for n in (8192, 1024) for d in (256, 64) for t in types]
    lengths = [(65536, 64), *((n, width) for n in (4096, 16384, 65536, 1024, 256) for width in (512, 128))]
    found += [InfoNce(part, n, half, width) for part in both for n, width in lengths]
    every = (*both, ASSIGN)
    found += [Quantize(p, 65536, t) for t in types for p in every] + [Quantize(STEP, 262144, half, masked=False)]
    found += [Quantize(p, n, half) for n in (16384, 4096, 512) for p in every]
    found += [Quantize(p, 8192, half, 512) for p in every]
    found += [Quantize(p, 8192, "float16") for p in every if half != "float16"]
    return [*found, *(Quantize(BACKWARD, n, half) for n in (8192, 1024)), InfoNce(BACKWARD, 4096, half, 512)]


def test_op(measure: Callable[..., None], case: Case, competitor: str) -> None:
    """Time one of them."""
    measure(case, competitor)
