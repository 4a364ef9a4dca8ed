"""Base of the adapters: replacement of a module's class."""

import inspect

import torch
from torch import Tensor, nn

from regvq_fast.matmul import score_dtype
from regvq_fast.ops import assign_codes


class Adapter(nn.Module):
    """Methods that take the place of a library class's own; never instantiated by itself.

    A module is swapped by its class: the new one inherits from the adapter and from the library's class, whose name it
    keeps. So parameters, buffers, hooks, options and all other methods stay as they are, ``isinstance`` and
    ``super()`` lead to the library's class, copies and pickles are swapped as well, and nothing of the library needs
    to be imported here.

    On a GPU rows and codes are multiplied in the type of the rows, 16 bits under autocast, unless ``fp32_scores``.
    """

    fp32_scores = False

    def _nearest_codes(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Return indices (M,) of the nearest of codes (N, D), for rows (M, D)."""
        dtype = score_dtype(rows, codebook, self.fp32_scores)
        with torch.autocast(rows.device.type, enabled=False):
            return assign_codes(rows.to(dtype), codebook.to(dtype))

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
    """A clause that says so where the two ``forward`` take other arguments: an unknown release of the library.

    Of an adapter that hands on ``*args`` and ``**options`` the named ones alone count, which come first.
    """
    known, found = (list(inspect.signature(c.forward).parameters.values())[1:] for c in (adapter, library_class))
    named = [argument.name for argument in known if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    names = [argument.name for argument in found]
    hands_on = len(named) < len(known)
    if named == (names[: len(named)] if hands_on else names):
        return None
    wanted = ", ".join([*named, "..."] if hands_on else named)
    return f"its forward takes ({', '.join(names)}), not the ({wanted}) of the releases that are known"


def to_rows(maps: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H, W, D) contiguous."""
    return maps.permute(0, 2, 3, 1).contiguous()
