"""Calls of ``vector_quantize`` for the tests of its kernels, the kernels' results, and what these must be."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers.kernel_cases import DEVICE, FLOATS, kernels, patch_dispatch, set_split, surrounded
from helpers.vq_cases import LEAVES, copy_leaves, head_of, make_inputs, outputs_and_gradients, plain_low_precision
from torch import Tensor

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.ops.reference import vector_quantize_reference

OUTPUTS = ("quantized", "posterior", "indices", "best_indices", "perturbation")
FP32_EPS = torch.finfo(torch.float32).eps
# The tensor cores' fp32 (three TF32 products), exp2 and log2 are a few bits worse than the CPU's.
SLACK = 1 if DEVICE == "cpu" else 8


class Case(NamedTuple):
    """A call; ``spread`` is about the standard deviation of a row's scores."""

    num_rows: int
    num_codes: int
    width: int
    logits: str = "distance"
    mask: str = "random"
    groups: int = 1
    tau: float = 0.9
    spread: float = 1.0
    codebook_grad: str = "soft"
    dtype: torch.dtype = torch.float32

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        return make_inputs(self.logits, self.mask, self.num_rows, self.num_codes, self.width, self.dtype, seed)

    def settings(self) -> dict[str, Any]:
        factor = 0.5 if self.logits == "distance" else 1.0
        return {
            "scale": factor * self.spread / self.width**0.5,
            "tau": self.tau,
            "groups": self.groups,
            "codebook_grad": self.codebook_grad,
        }

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


# Rows, codes and channels are 1, ragged, and a multiple of every tile; less than a tile and many of them.
_CASES = (
    Case(1, 1, 1, "distance", "all"),
    Case(1, 1031, 17, "linear", "no mask", 1, 10.0, dtype=torch.bfloat16),
    Case(15, 17, 127, "linear with bias", "random", 3, 10.0),
    Case(17, 15, 512, "distance", "no mask", 17, dtype=torch.float16),
    Case(127, 257, 17, "distance", "random", 1, 0.05, 0.3, "hard"),
    Case(257, 127, 64, "linear", "random", 1, 0.9, 1.0, "none", torch.bfloat16),
    Case(257, 17, 257, "distance", "all", 257, 0.3, 1e-4),
    Case(1031, 15, 1, "linear with bias", "random", 1031, 0.3),
    Case(15, 257, 257, "linear", "random", 5, 0.9, 3.0, "none", torch.float16),
    Case(128, 256, 256, "distance", "random", 4, dtype=torch.bfloat16),
    Case(64, 128, 128, "linear with bias", "all", 2, 0.9, 1.0, "hard", torch.float16),
    Case(17, 1031, 15, "distance", "no mask", 1, 0.9, 1e3),
    Case(127, 1031, 17, "linear", "no mask", 127, 0.9, 1.0, "soft", torch.float16),
)
CASES = tuple(case for case in _CASES if case.dtype in FLOATS)


def kernel_results(inputs: dict[str, Any], schedule: str, *use: tuple[str, ...], **settings: Any) -> dict[str, Tensor]:
    """The kernels' outputs and gradients for inputs of ``make_inputs``, on the CPU."""
    inputs = {name: surrounded(value) for name, value in inputs.items()}
    settings = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in settings.items()}
    with kernels(schedule):
        results = outputs_and_gradients(vector_quantize, inputs, *use, impl="triton", **settings)
    return {name: value.cpu() for name, value in results.items()}


def scores_and_bands(
    inputs: dict[str, Any], scale: float = 1.0, row_offset: int = 0, head: int = 0, **_: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact scores (M, N) behind ``best_indices`` and ``indices``, and how far rounding may move each of them."""
    exact = {name: inputs[name].detach().double() for name in LEAVES if name in inputs}
    x, codebook = exact["x"], exact["codebook"]
    if "weight" in exact:
        factor, keys, column = scale, exact["weight"], exact.get("bias", torch.zeros(len(codebook)))
    else:
        factor, keys, column = 2 * scale, codebook, -scale * codebook.square().sum(1)
    scores = factor * x @ keys.t() + column
    band = 8 * FP32_EPS * (factor * x.abs() @ keys.t().abs() + column.abs())
    noise = torch.zeros_like(scores)
    if "mask" in inputs:
        rows = torch.arange(len(x)) + row_offset
        noise = gumbel_noise(inputs["seed"], rows, len(codebook), head).double() * inputs["mask"].unsqueeze(1)
    return {"best_indices": (scores, band), "indices": (scores + noise, band + 1e-6 * noise.abs().clamp(min=1))}


def is_separated(inputs: dict[str, Any], **settings: Any) -> bool:
    """Return True if no row has a tie within the bands, so that all implementations must choose the same codes."""
    if inputs["codebook"].ndim == 3:
        return all(is_separated(head_of(inputs, h), **settings, head=h) for h in range(len(inputs["codebook"])))
    for scores, band in scores_and_bands(inputs, **settings).values():
        best = scores.argmax(1, keepdim=True)
        others = (scores + band).scatter(1, best, -torch.inf).amax(1)
        if (others >= (scores - band).gather(1, best).squeeze(1)).any():
            return False
    return True


def assert_outputs(results: dict[str, Tensor], inputs: dict[str, Any], **settings: Any) -> None:
    """The best codes, or ones that tie with them; and what follows from the codes taken, exactly."""
    if inputs["codebook"].ndim == 3:
        for h in range(len(inputs["codebook"])):
            assert_outputs({name: results[name][:, h] for name in OUTPUTS}, head_of(inputs, h), **settings, head=h)
        return
    for name, (scores, band) in scores_and_bands(inputs, **settings).items():
        chosen = (scores + band).gather(1, results[name].unsqueeze(1)).squeeze(1)
        assert (chosen >= (scores - band).amax(1)).all(), name
    codebook, groups = inputs["codebook"].detach(), settings.get("groups", 1)
    indices, best_indices = results["indices"], results["best_indices"]
    assert torch.equal(results["quantized"], codebook[indices])
    valid = inputs.get("valid", torch.ones(len(indices), dtype=torch.bool)).view(groups, -1)
    parts = [part[counts] for part, counts in zip(indices.view(groups, -1), valid, strict=True)]
    posterior = [part.bincount(minlength=len(codebook)) / max(1, len(part)) for part in parts]
    assert torch.equal(results["posterior"], torch.stack(posterior))
    distance = (codebook[indices].double() - codebook[best_indices].double()).square().sum(1)
    torch.testing.assert_close(results["perturbation"].double(), distance, rtol=1e-6, atol=0)
    calm = ~inputs["mask"] if "mask" in inputs else slice(None)
    assert torch.equal(indices[calm], best_indices[calm])


def assert_gradients(
    results: dict[str, Tensor], inputs: dict[str, Any], *use: tuple[str, ...], **settings: Any
) -> None:
    """Error budget: against the truth in fp64 at most the error of plain PyTorch in the inputs' type, and a little.

    Sums of half types add up in the kernels' fp32: there no more than three roundings, however bad plain PyTorch is.
    """
    assert is_separated(inputs, **settings), "other inputs, please: these have a tie, and gradients depend on who wins"
    dtype = inputs["x"].dtype
    eps = torch.finfo(dtype).eps
    truth, plain = (
        outputs_and_gradients(op, copy_leaves(inputs, kind), *use, **settings)
        for op, kind in ((vector_quantize_reference, torch.float64), (plain_low_precision, dtype))
    )
    for name in (name for name in truth if name.startswith("d ")):
        assert results[name].dtype == dtype
        size = truth[name].abs().max().clamp(min=1)
        error, allowed = ((v[name].double() - truth[name]).abs().max() / size / eps for v in (results, plain))
        if dtype == torch.float32:
            # The kernels' noise is eager's within a few roundings, which tau divides.
            allowed = SLACK * (allowed + 16 / min(1.0, settings.get("tau", 1.0)))
        else:
            allowed = allowed.clamp(max=2) + 1
        assert error <= allowed, f"{name}: {error:.2f} eps, allowed {allowed:.2f}"


def assert_splits_and_chunks_agree(
    monkeypatch: pytest.MonkeyPatch, case: Case, inputs: dict[str, Any], schedule: str
) -> list[int]:
    """Assert that splits and chunks change no output, and gradients not much; return the splits of each sweep."""
    whole = kernel_results(inputs, schedule, **case.settings())
    for name, value in {"CHUNK_SCORES": 1, "MIN_CHUNK_ROWS": 128, "FULL_CHUNK_ROWS": 1}.items():
        patch_dispatch(monkeypatch, name, value)
    splits = set_split(monkeypatch, 64)
    results = kernel_results(inputs, schedule, **case.settings())
    assert min(splits) > 1
    for name in OUTPUTS:
        assert torch.equal(results[name], whole[name]), name
    assert_gradients(results, inputs, **case.settings())
    return splits
