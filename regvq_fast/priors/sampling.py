"""What the samplers share: the choice of a token from logits, tokens to keep, a step that a GPU can repeat by itself.

A token is chosen by guidance, temperature, top-k, top-p, then Gumbel-argmax with counter-based noise.

The noise of a token is a function of (seed, row, code), as that of the quantizers is (`regvq_fast.ops.noise`). With a
row that numbers the position in the image among all images ever asked for, a sample depends neither on the size of its
batch nor on the split of the images over devices. What nothing here can remove is the rounding of the network's own
products, which differs with the shape of a batch: two codes within it of each other may change places.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from regvq_fast.ops.noise import gumbel_noise

Progress = Callable[[int, int], object]  # steps done, steps in all

_UNIT = 2**32  # of probability, so that sums are integers: exact, and the same in any order


def choose_tokens(
    logits: Tensor,
    rows: Tensor,
    seed: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token a row, drawn from softmax(logits / temperature), restricted to the most likely ones.

    Args:
        logits: (..., N), floating point; computed with in fp32.
        rows: int64 global row numbers of the shape (...): equal numbers get equal noise.
        seed: 0-dim int64 tensor on the device of the logits.
        temperature: at least 0; 0 takes the most likely code, the smallest one of several.
        top_k, top_p: as in `restrict`, after the temperature.

    Returns:
        (...) int64. Nothing is synchronised, and all shapes are static.

    Raises:
        ValueError: a setting that is out of range.
    """
    check_choice(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = restrict(logits / temperature, top_k=top_k, top_p=top_p)
    noise = gumbel_noise(seed, rows.reshape(-1), logits.shape[-1])
    return (logits + noise.view(logits.shape)).argmax(-1)


def restrict(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The logits of the most likely codes, -inf in place of the others.

    Args:
        logits: (..., N) float32.
        top_k: this many codes stay, the smaller ones of equals; all of them where there are no more.
        top_p: of these the fewest, most likely first, whose probabilities among them sum to it or more; at least one.

    Returns:
        (..., N) float32.

    Raises:
        ValueError: a setting that is out of range.
    """
    check_choice(top_k=top_k, top_p=top_p)
    if top_p == 1.0:
        top_p = None
    if top_k is not None and top_k >= logits.shape[-1]:
        top_k = None
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # stable: the smaller of equals comes first
    kept = torch.ones_like(order, dtype=torch.bool)
    if top_k is not None:
        kept[..., top_k:] = False
    if top_p is not None:
        mass = (ordered.masked_fill(~kept, -torch.inf).softmax(-1) * _UNIT).long()
        kept &= mass.cumsum(-1) - mass < top_p * _UNIT
    return logits.masked_fill(~torch.zeros_like(kept).scatter_(-1, order, kept), -torch.inf)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Logits of classifier-free guidance, null + guidance * (conditional - null), of which the softmax is in proportion
    to p(conditional)^guidance p(null)^(1 - guidance).

    Args:
        logits: (2B, ..., N), the conditional ones of B images, then their null ones.
        guidance: 1 is conditional, 0 is null.

    Returns:
        (B, ..., N) float32.
    """
    conditional, null = logits.float().chunk(2)
    return null + guidance * (conditional - null)


def check_choice(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raise ValueError on a setting of `choose_tokens` that is out of range."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be a finite number of at least 0 (0: always the likeliest), got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all codes, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], or be None for all codes, got {top_p}")


def check_guidance(guidance: float) -> None:
    """Raise ValueError on a weight of guidance that is none."""
    if not math.isfinite(guidance) or guidance < 0.0:
        raise ValueError(f"guidance must be a finite number of at least 0 (1: none), got {guidance}")


class TokenPrior(Protocol):
    """What a prior says of its tokens."""

    token_shape: tuple[int, int]
    num_tokens: int
    num_codes: int


@functools.cache
def compiled(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A network's step by `torch.compile`, which is loaded only then; the same for every call, so that it is kept.

    The network alone: what follows it is small, and would be compiled anew for each of the settings that users sweep.
    """
    return torch.compile(network, fullgraph=True)


def capture(step: Callable[[], None], *state: Tensor) -> Callable[[], None]:
    """The step as a CUDA graph; each call of the result is one step.

    Args:
        step: reads and writes tensors in place, at shapes and addresses that stay, and waits for nothing.
        state: what it changes and reads again, on one device: it runs once to warm up, and these are put back then.
            A tensor of which the next step writes the same places before it reads them may be left out.
    """
    device = state[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = [tensor.clone() for tensor in state]
            step()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may pin memory meanwhile
            step()  # runs nothing

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def check_keep(
    keep: tuple[Tensor, Tensor] | None, batch: int, prior: TokenPrior, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and mask (B, h, w) or (B, L) as (B, L), or twice None.

    Raises:
        ValueError: other shapes, another device than the prior's `device`; on a CPU, tokens to keep that are no codes.
        TypeError: tokens that are not int64, a mask that is not bool.
    """
    if keep is None:
        return None, None
    (height, width), length = prior.token_shape, prior.num_tokens
    flat = []
    for name, tensor, dtype in zip(("tokens", "mask"), keep, (torch.int64, torch.bool), strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"the {name} to keep must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        if tensor.shape not in ((batch, height, width), (batch, length)):
            wanted = f"({batch}, {height}, {width}) or ({batch}, {length})"
            raise ValueError(f"the {name} to keep must be {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"the {name} to keep is on {tensor.device} but the prior on {device}")
        flat.append(tensor.reshape(batch, length))
    given, kept = flat
    if device.type == "cpu" and bool(kept.any()):  # on a GPU, looking would stop it
        smallest, largest = (int(bound) for bound in given[kept].aminmax())
        if smallest < 0 or largest >= prior.num_codes:
            wanted = f"[0, {prior.num_codes})"
            raise ValueError(f"the tokens to keep must lie in {wanted}, got ids from {smallest} to {largest}")
    return given, kept
