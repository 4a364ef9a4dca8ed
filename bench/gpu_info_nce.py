"""The ``weighted_info_nce`` cases of the benchmarks: their inputs, who competes, and the gate of the results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import peers
import torch
import torch.nn.functional as F
from gpu_cases import GRADIENT_TOLERANCE, MASK_RATIO, require
from peers import TensorRun
from torch import Tensor

from regvq_fast.ops import weighted_info_nce

PARTS = ("forward+backward", "forward")
TAU = 0.07
ROWS = 65536  # B L, where L isn't larger
LATENT = 16
# Largest deviation of a loss: similarities, up to 1 / tau, are sums of fp32 whatever the type of the features.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class InfoNceCase:
    part: str  # of PARTS, or "backward" alone; the gradient is that of the key, as in training
    length: int
    width: int
    dtype: str
    rows: int = ROWS
    op: ClassVar[str] = "weighted_info_nce"
    graph: ClassVar[bool] = False

    @property
    def images(self) -> int:
        return max(1, self.rows // self.length)

    @property
    def products(self) -> int:
        """Products of B x L x L x C that the part can't do without: similarities; again, and the key's gradient."""
        return {"forward+backward": 3, "backward": 2}.get(self.part, 1)

    @property
    def flops(self) -> int:
        return self.products * 2 * self.images * self.length**2 * self.width

    @property
    def name(self) -> str:
        return f"InfoNCE {self.part}, B={self.images}, L={self.length}, C={self.width}, {self.dtype}"

    def describe(self) -> dict[str, Any]:
        """What the report knows the case by, besides what all cases have."""
        return {"images": self.images, "length": self.length, "width": self.width}

    @property
    def bytes(self) -> int:
        """Of the features, and of the key's gradient: read or written once, at least."""
        matrices = 3 if self.part.endswith("backward") else 2
        return getattr(torch, self.dtype).itemsize * matrices * self.images * self.length * self.width


class InfoNceInputs(NamedTuple):
    query: Tensor  # (B, L, C)
    key: Tensor  # (B, L, C), leaf
    weight: Tensor  # (B, L) fp32
    grad_loss: Tensor  # (B, L) fp32


class InfoNceTruth(NamedTuple):
    """What fp64 says, with the weights and without: the losses, and the key's gradient where the part has one."""

    weighted: tuple[Tensor, ...]
    vanilla: tuple[Tensor, ...]


def make_inputs(case: InfoNceCase, device: str) -> InfoNceInputs:
    """Features after a ReLU, of a few latent factors, and a reconstruction that resembles them; most weights are 0.

    Such keys have many near neighbours: softmaxes are neither flat nor one-sided, and the negatives' part of the
    gradient is as large as the positive's. Of independent normal features it would vanish in the gate's tolerance.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.images, case.length)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    mixing, original = normal(LATENT, case.width), normal(*shape, LATENT)
    features = (original @ mixing, (original + 0.5 * normal(*shape, LATENT)) @ mixing)
    query, key = (F.normalize(feature.relu(), dim=2).to(getattr(torch, case.dtype)) for feature in features)
    stochastic = torch.rand(shape, generator=generator, device=device) < MASK_RATIO
    weight = stochastic * torch.rand(shape, generator=generator, device=device)
    return InfoNceInputs(
        query=query,
        key=key.requires_grad_(),
        weight=weight / weight.sum(1, keepdim=True),
        grad_loss=0.5 + torch.rand(shape, generator=generator, device=device),
    )


# ------------------------------------------------------------------------------------------------------- competitors


def make_run(case: InfoNceCase, inputs: InfoNceInputs, call: Callable[[], Tensor]) -> TensorRun:
    """The losses and the key's gradient by what ``call`` gives, as far as the part goes."""

    def gradient(loss: Tensor, again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs.key, inputs.grad_loss.to(loss.dtype), retain_graph=again)

    def run() -> tuple[Tensor, ...]:
        loss = call()
        return loss.detach(), *(gradient(loss, False) if case.part == "forward+backward" else ())

    return partial(gradient, call(), True) if case.part == "backward" else run


def make_ours(case: InfoNceCase, inputs: InfoNceInputs, weight: Tensor | None, impl: Any = "auto") -> TensorRun:
    call = partial(weighted_info_nce, inputs.query, inputs.key, weight, tau=TAU, impl=impl)
    return make_run(case, inputs, call)


def make_plain(case: InfoNceCase, inputs: InfoNceInputs, compiles: bool) -> TensorRun:
    """The plain expression, with weights in the type of the features."""
    function: Callable[..., Tensor] = peers.plain_info_nce
    again = case.part == "backward"
    if compiles:  # forward and backward of a size come out of one compilation
        function = peers.compiled(function, again)
    call = partial(function, inputs.query, inputs.key, inputs.weight.to(inputs.query.dtype), tau=TAU)
    if not again:
        return make_run(case, inputs, call)
    # A compiled backward gives its buffers away, and could not run again.
    with torch._functorch.config.patch(donated_buffer=False):
        run = make_run(case, inputs, call)
        run()
    return run


def make_inf_cl(case: InfoNceCase, inputs: InfoNceInputs) -> TensorRun:
    return make_run(case, inputs, peers.inf_cl(inputs.query, inputs.key, TAU))


def make_matmul(inputs: InfoNceInputs) -> TensorRun:
    """The floor: the similarities of every image, written to memory."""
    query, key = inputs.query, inputs.key.detach().mT
    return lambda: (torch.bmm(query, key),)


def names(case: InfoNceCase) -> tuple[str, ...]:
    """Who takes part in a case; "vanilla" is ours without weights, for inf-cl."""
    return "matmul", "ours", "vanilla", "eager", "compiled", "inf-cl"


def competitors(case: InfoNceCase, inputs: InfoNceInputs) -> dict[str, Callable[[], TensorRun]]:
    """By name, functions that make the runs, and may raise instead."""
    makers: dict[str, Callable[[], TensorRun]] = {
        "ours": partial(make_ours, case, inputs, inputs.weight),
        "vanilla": partial(make_ours, case, inputs, None),
        "eager": partial(make_plain, case, inputs, False),
        "compiled": partial(make_plain, case, inputs, True),
        "inf-cl": partial(make_inf_cl, case, inputs),
        "matmul": partial(make_matmul, inputs),
    }
    return {name: makers[name] for name in names(case)}


# -------------------------------------------------------------------------------------------------------------- gate


def truth_of(case: InfoNceCase, inputs: InfoNceInputs) -> InfoNceTruth:
    """The eager twin on fp64 copies of the inputs. It goes through tiles of rows: L = 65536 fits."""
    double = inputs._replace(query=inputs.query.double(), key=inputs.key.detach().double().requires_grad_())
    full = replace(case, part="forward+backward") if case.part == "backward" else case
    weighted, vanilla = (make_ours(full, double, weight, "eager")() for weight in (inputs.weight, None))
    return InfoNceTruth(weighted, vanilla)


def check(dtype: torch.dtype, truth: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    """Raise :class:`gpu_cases.WrongResultError` unless every loss, and the gradient of every key, is right."""
    error = loss_error(truth, results)
    require("loss", error <= LOSS_TOLERANCE, f"is off by {error:.2g}, {LOSS_TOLERANCE} is allowed")
    check_gradients(dtype, truth[1:], results[1:])


def check_gradients(dtype: torch.dtype, truth: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    for gradient, expected in zip(gradients, truth, strict=True):
        error = float(((gradient.double() - expected).norm(dim=2) / expected.norm(dim=2)).max())
        tolerance = GRADIENT_TOLERANCE[dtype]
        require("dkey", error <= tolerance, f"is off by {error:.2g} of a row's norm, {tolerance} is allowed")


def loss_error(truth: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> float:
    return float((results[0].double() - truth[0]).abs().max())


def examine(
    case: InfoNceCase, inputs: InfoNceInputs, truth: InfoNceTruth, name: str, run: TensorRun
) -> dict[str, float]:
    """How far a run's losses are off; raises where ours is wrong. Others round as they like."""
    results, dtype = run(), inputs.query.dtype
    if name == "matmul":
        return {}
    expected, is_ours = truth.vanilla if name in ("vanilla", "inf-cl") else truth.weighted, name in ("ours", "vanilla")
    if case.part == "backward":
        if is_ours:
            check_gradients(dtype, expected[1:], results)
        return {}
    if is_ours:
        check(dtype, expected, results)
    return {"loss_error": loss_error(expected, results)}
