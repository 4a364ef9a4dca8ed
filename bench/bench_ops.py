"""The ops beside plain PyTorch, eager and compiled, and other packages, each result of ours checked before it is timed.

pytest bench/bench_ops.py --benchmark-only                  forward, backward and both over N, D and types
pytest bench/bench_ops.py --benchmark-only -k assign_codes  a part of it, by the names that it prints
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import peers
import torch
import torch.nn.functional as F
from measuring import Examine, Run, graphed
from peers import Forward
from torch import Tensor

from regvq_fast.ops import assign_codes, vector_quantize, weighted_info_nce
from regvq_fast.ops.noise import gumbel_noise

QUANTIZE, ASSIGN, INFO_NCE, SWAP = "vector_quantize", "assign_codes", "weighted_info_nce", "accelerate"
STEP, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
GRAPH, QUIET, TRAINED, HARD = "CUDA graph", "no noise", "trained-like", "hard codebook gradient"
MASK_RATIO, TAU, INFO_NCE_TAU = 0.4, 0.9, 0.07
SEED = 123456789
DIMENSIONS = 5  # of trained-like latents, whichever D is
# Largest deviation of a gradient, of its largest element (InfoNCE: of a row's norm). 16-bit probabilities are rounded.
GRADIENT_TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
TOLERANCE = 3e-4  # of other results: sums of fp32 whatever the type of the inputs
TIE_BAND, MOST_TIES = 1e-5, 1e-3  # of |x|^2 + |z|^2; and the fraction of rows that may tie within it
# Products of all rows with all codes that a part can't do without; the fifth of the first backward is p^T dQ.
PRODUCTS = {
    QUANTIZE: {STEP: 6, FORWARD: 1, BACKWARD: 5},
    INFO_NCE: {STEP: 3, FORWARD: 1, BACKWARD: 2},
    ASSIGN: {"assign": 1},
}
# Beside the product that is the floor, ours, and plain PyTorch. "nearest" and "vanilla" are ours for others' jobs.
OTHERS = {
    QUANTIZE: ("nearest", "vqp nearest", "taming nearest", "vqp gumbel"),
    ASSIGN: ("vqp nearest", "flash-kmeans"),
    INFO_NCE: ("vanilla", "inf-cl"),
}
Inputs = dict[str, Any]  # arguments of an op
Results = tuple[Tensor, ...]
Makers = dict[str, Callable[[], Run]]
Truth = Callable[[str], Results]  # results in fp64 of "ours" or "vanilla"


def require_close(name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    """Refuse a result whose largest deviation is more than a fraction of the largest element."""
    limits: dict[str, Any] = {"rtol": 0, "atol": allowed * float(expected.abs().max()), "check_dtype": False}
    torch.testing.assert_close(found, expected, **limits, msg=lambda text: f"{name} is off: {text}")


def doubled(value: Any) -> Any:
    """Return a tensor of numbers in fp64, a leaf if it is one; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


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
    """A part of an op at a size. A variant is "", or some of GRAPH, QUIET, TRAINED and HARD; of SWAP a library."""

    op: str
    part: str
    codes: int  # N; of InfoNCE L, the positions of an image
    dtype: str
    width: int = 256  # D or C
    rows: int = 10240  # M; of InfoNCE B
    variant: str = ""
    whole: ClassVar[bool] = False

    def fields(self) -> dict[str, Any]:
        """Return what a record has of the case."""
        part = ", ".join(filter(None, (self.part, self.variant)))
        size = dict(zip("BLC" if self.op == INFO_NCE else "MND", (self.rows, self.codes, self.width), strict=True))
        found: dict[str, Any] = {"op": self.op, "part": part, "size": size, "detail": self.dtype}
        if self.op != SWAP:
            found["products"] = PRODUCTS[self.op][self.part] - (HARD in self.variant)
        return found

    def competitors(self, device: str) -> tuple[str, ...]:
        """Names; on a CPU "compiled" competes in few cases: compiling takes longer than all the rest."""
        if self.op == SWAP:
            return "ours", "library"
        scores = self.rows * self.codes * (self.codes if self.op == INFO_NCE else 1)
        slow = scores < 2**24 or self.part == BACKWARD
        left_out = set() if device == "cuda" else {*peers.GPU_ONLY, *(("compiled",) if slow else ())}
        if GRAPH in self.variant or (self.rows == Case.rows and self.width != Case.width and self.op == QUANTIZE):
            left_out |= set(OTHERS[QUANTIZE])  # packages at one width, for time
        names = ("matmul", "ours", "eager", "compiled", *OTHERS[self.op])
        return tuple(name for name in names if name not in left_out)

    def prepare(self, device: str) -> tuple[Makers, Examine]:
        """Return functions that make the runs, and the check of a run's results."""
        torch.manual_seed(0)
        return {INFO_NCE: info_nce, SWAP: swap}.get(self.op, quantize)(self, device)

    def makers(
        self, given: Inputs, grads: list[Tensor], call: Callable[..., Results], plain: Any, factors: tuple[Tensor, ...]
    ) -> tuple[Makers, Truth]:
        """Return what every op has: the product of factors that is the floor, ours, a partial of plain PyTorch, truth.

        Gradients of the first results go to those given that require them.
        """
        seed = given.get("seed", torch.zeros(()))

        def run(forward: Forward, given: Inputs = given, part: str = self.part) -> Run:
            leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
            return make_run(part, forward, leaves, grads)

        def in_graph(forward: Forward) -> Run:
            if GRAPH not in self.variant:
                return run(forward)
            seed.fill_(0)
            replay = graphed(run(forward))
            seed.fill_(SEED)  # a replay that kept the old seed has wrong indices
            return replay

        @functools.cache
        def truth(name: str) -> Results:
            double = {key: doubled(value) for key, value in given.items()}
            double |= {} if name == "ours" else {"weight": None}
            forward = partial(call, double, impl="eager")
            return run(forward, double, STEP if self.part == BACKWARD else self.part)()

        return {
            "matmul": lambda: lambda: (torch.matmul(*factors),),  # written to memory
            "ours": lambda: in_graph(partial(call, given)),
            "vanilla": lambda: run(partial(call, given | {"weight": None})),
            "eager": lambda: in_graph(plain),
            "compiled": lambda: in_graph(partial(peers.compiled(plain.func, self.part == BACKWARD), *plain.args)),
        }, truth


# ------------------------------------------------------------------------------------------------------ vector_quantize


def latents(case: Case, device: str) -> tuple[Tensor, Tensor, float]:
    """Return rows and codes of unit variance, and the logit scale.

    Random ones have logits of standard deviation 2: no softmax is one-sided. Trained-like ones have the softmax of
    trained models, see docs/benchmarks.md.
    """
    normal = partial(torch.randn, device=device)
    if TRAINED not in case.variant:
        return normal(case.rows, case.width), normal(case.codes, case.width), 1 / math.sqrt(case.width)
    codes, spacing = normal(case.codes, DIMENSIONS), case.codes ** (-1 / DIMENSIONS)
    use = torch.arange(1.0, case.codes + 1, device=device) ** -0.4
    x = codes[use.multinomial(case.rows, replacement=True)] + 2 * spacing * normal(case.rows, DIMENSIONS)
    # Orthonormal: distances are the same at any width but for the factor.
    basis = math.sqrt(case.width / DIMENSIONS) * torch.linalg.qr(normal(case.width, DIMENSIONS))[0].t()
    return x @ basis, codes @ basis, 0.226 * DIMENSIONS / case.width / spacing**2


def quantize_inputs(case: Case, device: str) -> Inputs:
    trains, dtype = case.op == QUANTIZE, getattr(torch, case.dtype)
    mask = torch.rand(case.rows, device=device) < MASK_RATIO if trains and QUIET not in case.variant else None
    x, codebook, scale = latents(case, device)
    found = {"x": x.to(dtype).requires_grad_(trains), "codebook": codebook.to(dtype).requires_grad_(trains)}
    if not trains:
        return found
    tau = torch.tensor(TAU, dtype=dtype, device=device)  # on the device no competitor pays for a copy
    codebook_grad, seed = "hard" if HARD in case.variant else "soft", torch.tensor(SEED, device=device)
    return found | {"mask": mask, "scale": scale, "tau": tau, "seed": seed, "codebook_grad": codebook_grad}


def quantize(case: Case, device: str) -> tuple[Makers, Examine]:
    """A case of ``vector_quantize``, or of ``assign_codes``."""
    given = quantize_inputs(case, device)
    x, codebook, mask = given["x"], given["codebook"], given.get("mask")
    # The posterior's is over M rows, comparable to the other one.
    grads = [torch.randn_like(x), case.rows * torch.randn(1, case.codes, device=device)]

    def call(given: Inputs, **impl: Any) -> Results:
        if case.op == ASSIGN:
            return (assign_codes(given["x"], given["codebook"], **impl),)
        return vector_quantize(**given, **impl)

    def peer(make: Callable[..., Any], **settings: Any) -> Run:
        forward, leaves = make(x, codebook, **settings)
        return make_run(case.part, forward, leaves, [grads[0], torch.ones((), device=device)])

    plain: Any = partial(peers.plain_assign, x, codebook)
    if case.op == QUANTIZE:
        rows = None if mask is None else mask.nonzero().squeeze(1)
        settings = (mask, rows, given["tau"], given["scale"], given["codebook_grad"])
        plain = partial(peers.plain_quantize, x, codebook, *settings)
    makers, truth = case.makers(given, grads, call, plain, (x.detach(), codebook.detach().t()))
    makers |= {
        "nearest": partial(peer, peers.nearest),
        "taming nearest": partial(peer, peers.nearest, library="taming"),
        "vqp nearest": partial(peer, peers.vqp, gumbel=False, training=case.op == QUANTIZE),
        "vqp gumbel": partial(peer, peers.vqp, gumbel=True),
        "flash-kmeans": lambda: peers.flash_kmeans(x, codebook),
    }
    return makers, partial(check_quantize, case, given, truth)


def check_indices(name: str, indices: Tensor, expected: Tensor, given: Inputs, mask: Tensor | None) -> Tensor:
    """Require the expected indices, except on a few rows whose scores tie within rounding; return where they agree."""
    same = indices == expected
    agreement = float(same.double().mean())
    assert agreement >= 1 - MOST_TIES, f"{name} are those of fp64 on {agreement:.2%} of the rows only"
    rows, scale = (~same).nonzero().squeeze(1), given.get("scale", 1.0)
    x, codebook = given["x"].detach()[rows].double(), given["codebook"].detach().double()
    noise = x.new_zeros(len(rows), len(codebook))
    if mask is not None and len(rows):
        noise = gumbel_noise(given["seed"], rows, len(codebook)) * mask[rows].unsqueeze(1)

    def score(chosen: Tensor) -> Tensor:
        distance = (x - codebook[chosen]).square().sum(1)
        return noise.gather(1, chosen.unsqueeze(1)).squeeze(1) - scale * distance

    lost = (score(expected[rows]) - score(indices[rows])).abs()
    band = TIE_BAND * scale * (x.square().sum(1) + codebook[expected[rows]].square().sum(1))
    assert (lost <= band).all(), f"{name} miss a better code"
    return same


def check_quantize(case: Case, given: Inputs, truth: Truth, name: str, results: Results) -> dict[str, Any]:
    """Compare rows and codes with those in fp64; ties within rounding, of few rows, aside."""
    if case.op == ASSIGN and name != "matmul":
        nearest = truth("ours")[0]
        if name == "ours":
            check_indices("nearest codes", results[-1], nearest, given, None)
        return {"agreement": float((results[-1] == nearest).double().mean())}
    if name != "ours":
        return {}
    expected = truth(name)
    if case.part != BACKWARD:
        quantized, posterior, *indices, perturbation = results[:5]
        same = check_indices("indices", indices[0], expected[2], given, given["mask"])
        same &= check_indices("best_indices", indices[1], expected[3], given, None)
        require_close("quantized", quantized[same], expected[0][same], TOLERANCE)
        require_close("perturbation", perturbation[same], expected[4][same], TOLERANCE)
        require_close("posterior", posterior[0], indices[0].bincount(minlength=case.codes) / case.rows, TOLERANCE)
    for label, gradient, right in zip(("dx", "dcodebook"), results[-2:], expected[5:], strict=False):
        require_close(label, gradient, right, GRADIENT_TOLERANCE[case.dtype])
    return {}


# --------------------------------------------------------------------------------------------------- other ops


def info_nce(case: Case, device: str) -> tuple[Makers, Examine]:
    """A case of ``weighted_info_nce``; the gradient is that of the key, as in training.

    Features after a ReLU, of 16 latent factors, and a reconstruction that resembles them; most weights are 0. Such keys
    have many near neighbours: softmaxes are neither flat nor one-sided, and the negatives' part of the gradient is as
    large as the positive's. Of independent normal features it would vanish in the tolerance.
    """
    normal, uniform = partial(torch.randn, device=device), partial(torch.rand, device=device)
    shape = case.rows, case.codes
    mixing, original = normal(16, case.width), normal(*shape, 16)
    features = original @ mixing, (original + 0.5 * normal(*shape, 16)) @ mixing
    query, key = (F.normalize(feature.relu(), dim=2).to(getattr(torch, case.dtype)) for feature in features)
    weight = (uniform(shape) < MASK_RATIO) * uniform(shape)
    given: Inputs = {"query": query, "key": key.requires_grad_(), "weight": weight / weight.sum(1, keepdim=True)}
    grads = [0.5 + uniform(shape)]

    def call(given: Inputs, **impl: Any) -> Results:
        return (weighted_info_nce(**given, tau=INFO_NCE_TAU, **impl),)

    def examine(name: str, results: Results) -> dict[str, Any]:
        if name in ("ours", "vanilla") and case.part != BACKWARD:
            require_close("loss", results[0], truth(name)[0], TOLERANCE)
        if name in ("ours", "vanilla") and case.part != FORWARD:
            expected, allowed = truth(name)[1], GRADIENT_TOLERANCE[case.dtype]
            off = float(((results[-1].double() - expected).norm(dim=2) / expected.norm(dim=2)).max())
            assert off <= allowed, f"dkey is off by {off:.2g} of a row's norm, {allowed} is allowed"
        return {}

    plain = partial(peers.plain_info_nce, query, key, given["weight"].to(query.dtype), INFO_NCE_TAU)
    makers, truth = case.makers(given, grads, call, plain, (query, key.detach().mT))
    peer = {"inf-cl": lambda: make_run(case.part, peers.inf_cl(query, key, INFO_NCE_TAU), [key], grads)}
    return makers | peer, examine


def swap(case: Case, device: str) -> tuple[Makers, Examine]:
    """A training step of another library's quantizer, before and after ``regvq_fast.integrations.accelerate``."""
    side, scale = 16, case.width**-0.5 if case.variant == "IBQ" else 1.0  # its logits are products: of variance 1
    batch = (torch.randn(case.rows // side**2, case.width, side, side, device=device) * scale).requires_grad_()
    grad, results = torch.randn_like(batch), []

    def make(ours: bool) -> Run:
        module = peers.library_quantizer(case.variant, case.codes, case.width, ours).to(device)
        return make_run(STEP, lambda: (module(batch)[0],), [batch], [grad])

    def examine(name: str, found: Results) -> dict[str, Any]:
        """Compare both, ties within rounding aside."""
        results.append(found)
        for ours, theirs in zip(results[0], found, strict=True):
            wrong = float(((ours - theirs).abs() > 1e-3 * theirs.abs().max()).float().mean())
            assert wrong < 1e-3, f"{case.variant} differs in a fraction of {wrong:.4f} of the values"
        return {}

    return {"ours": partial(make, True), "library": partial(make, False)}, examine


# -------------------------------------------------------------------------------------------------------------- cases

FP32, FP16, BF16, HALVES = ("float32",), ("float16",), ("bfloat16",), ("float16", "bfloat16")
BOTH, ALL, ONLY = (STEP, FORWARD), (STEP, FORWARD, BACKWARD), (STEP,)
# Op, parts, N or L, types, D or C, M or B, variants. The most important first: time may run out.
Row = tuple[Any, ...]
CPU: list[Row] = [
    (QUANTIZE, ALL, (8192,), FP32, (64,), 4096),
    (QUANTIZE, ONLY, (1024, 4096), FP32, (64,), 4096, ("", TRAINED)),
    (QUANTIZE, ONLY, (512, 8192), FP32, (64,), 512),
    (QUANTIZE, ONLY, (65536,), FP32, (64,), 256),
    (QUANTIZE, ONLY, (2048,), FP32, (8, 16, 32, 64, 256, 512), 512),
    (QUANTIZE, ONLY, (2048,), HALVES, (64,), 512),
    (QUANTIZE, ONLY, (2048,), FP32, (64,), 512, (HARD,)),
    (ASSIGN, ("assign",), (8192,), FP32, (64,), 4096),
    (ASSIGN, ("assign",), (512, 65536), FP32, (64,), 1024),
    (ASSIGN, ("assign",), (4096,), FP32, (8, 16, 32, 64, 256, 512), 1024),
    (ASSIGN, ("assign",), (4096,), BF16, (64,), 1024),
    (INFO_NCE, ALL, (4096,), FP32, (128,), 1),
    (INFO_NCE, ONLY, (256,), FP32, (128,), 8),
    (INFO_NCE, ONLY, (1024,), FP32, (128, 512), 2),
    (INFO_NCE, ONLY, (1024,), HALVES, (128,), 2),
    (SWAP, ("",), (8192,), FP32, (64,), 4096, ("taming", "diffusers", "vector-quantize-pytorch")),
    (SWAP, ("",), (16384,), FP32, (256,), 1024, ("IBQ",)),
]


def gpu_rows(half: tuple[str, ...]) -> list[Row]:
    """Return the cases of a GPU, whose usual type is bf16, or fp16 where that would be emulated."""
    types, few, m = (*half, "float32"), (8192, 1024), Case.rows
    return [
        (QUANTIZE, ONLY, (1024,), half, (256,), m, (GRAPH,)),
        *((QUANTIZE, BOTH, few, types, (width,), m) for width in (256, 64, 32, 8)),
        (QUANTIZE, ONLY, few, half, (256,), m, (TRAINED,)),
        (QUANTIZE, ONLY, (8192,), half, (256,), m, (HARD,)),
        (QUANTIZE, BOTH, few, types, (16,), m),
        (ASSIGN, ("assign",), few, types, (256, 64), m),
        (INFO_NCE, BOTH, (65536,), half, (64,), 1),
        *((INFO_NCE, BOTH, (n,), half, (512, 128), 65536 // n) for n in (4096, 16384, 65536, 1024, 256)),
        (QUANTIZE, BOTH, (65536,), types, (256,), m),
        (QUANTIZE, ONLY, (262144,), half, (256,), m, (QUIET,)),
        (QUANTIZE, BOTH, (16384, 4096, 512), half, (256,), m),
        (ASSIGN, ("assign",), (65536, 16384, 4096, 512), half, (256,), m),
        (QUANTIZE, BOTH, (8192,), half, (512,), m),
        *((QUANTIZE, BOTH, (8192,), FP16, (256,), m) for _ in range(half != FP16)),
        (QUANTIZE, (BACKWARD,), few, half, (256,), m),
        (INFO_NCE, (BACKWARD,), (4096,), half, (512,), 16),
    ]


def cases(device: str) -> list[Case]:
    """Return those of a device, in their order."""
    rows = CPU if device == "cpu" else gpu_rows(BF16 if torch.cuda.get_device_capability() >= (8, 0) else FP16)
    found = []
    for op, parts, codes, types, widths, many, *variants in rows:
        sizes = itertools.product(codes, types, widths, parts, *(variants or [("",)]))
        found += [Case(op, part, n, dtype, width, many, variant) for n, dtype, width, part, variant in sizes]
    return found


def test_op(measure: Callable[..., None], case: Case, competitor: str) -> None:
    """Time one of them."""
    measure(case, competitor)
