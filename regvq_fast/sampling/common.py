"""What the samplers share: their progress, tokens to keep, and a step that a GPU can repeat by itself."""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Progress = Callable[[int, int], object]  # steps done, steps in all


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
