"""What the adapters share: how a class takes another's place, and statistics of a softmax over all codes, in tiles."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regvq_fast.ops._common import rows_per_tile


class Adapter(nn.Module):
    """Methods that take the place of a library class's own; never instantiated by itself.

    A module is swapped by its class: the new one inherits from the adapter and from the library's class, whose name it
    keeps. So parameters, buffers, hooks, options and all other methods stay as they are, ``isinstance`` and
    ``super()`` lead to the library's class, copies and pickles are swapped as well, and nothing of the library needs
    to be imported here.
    """

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this module must be left alone, one clause; None where it can be swapped."""
        return other_arguments(cls, type(module))

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        """Give the module (not swapped yet) its new class."""
        module.__class__ = swapped_class(cls, type(module))

    def __reduce__(self) -> tuple:
        # By name a pickle would find the library's class, which this one isn't.
        adapter, library_class = type(self).__bases__
        return _bare_module, (adapter, library_class), self.__dict__


_swapped_classes: dict[tuple[type[Adapter], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(adapter: type[Adapter], library_class: type[nn.Module]) -> type[nn.Module]:
    """The class that is ``library_class`` but for the adapter's methods; one and the same at every call."""
    key = (adapter, library_class)
    if key not in _swapped_classes:
        names = {"__module__": library_class.__module__, "__qualname__": library_class.__qualname__}
        _swapped_classes[key] = type(library_class.__name__, key, names)
    return _swapped_classes[key]


def _bare_module(adapter: type[Adapter], library_class: type[nn.Module]) -> nn.Module:
    new_class = swapped_class(adapter, library_class)
    return new_class.__new__(new_class)


def other_arguments(adapter: type[nn.Module], library_class: type[nn.Module]) -> str | None:
    """A clause that says so where the two ``forward`` take other arguments: an unknown release of the library."""
    known, found = (list(inspect.signature(c.forward).parameters)[1:] for c in (adapter, library_class))
    if known == found:
        return None
    return f"its forward takes ({', '.join(found)}), not the ({', '.join(known)}) of the releases that are known"


def to_rows(maps: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H, W, D) contiguous."""
    return maps.permute(0, 2, 3, 1).contiguous()


def softmax_statistics(
    x: Tensor, keys: Tensor, bias: Tensor | None = None, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean entropy (nats), and mean (N,), of the rows' ``softmax((x keys^T + bias) / temperature)``.

    Equivalent to this, which keeps several M x N matrices:

        p = F.softmax(F.linear(x, keys, bias) / temperature, dim=1)
        return -(p * p.log()).sum(1).mean(), p.mean(0)

    Rows go through in tiles, whose scores are computed again in backward.

    Args:
        x: (M, D), M > 0.
        keys: (N, D).
        bias: (N,) or None.
        temperature: > 0.
    """
    entropy, total = x.new_zeros(()), x.new_zeros(len(keys))
    for tile in x.split(rows_per_tile(len(keys), x.device)):
        tile_entropy, tile_total = checkpoint(
            _tile_statistics, tile, keys, bias, temperature, use_reentrant=False, preserve_rng_state=False
        )
        entropy, total = entropy + tile_entropy, total + tile_total
    return entropy / len(x), total / len(x)


def _tile_statistics(x: Tensor, keys: Tensor, bias: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(F.linear(x, keys, bias) / temperature, dim=1)
    p = log_p.exp()
    return -torch.linalg.vecdot(p, log_p).sum(), p.sum(0)
