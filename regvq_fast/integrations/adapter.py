"""Base of the adapters, which replace a module's class."""

import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn

from regvq_fast.matmul import score_dtype
from regvq_fast.ops import assign_codes


class Adapter(nn.Module):
    """Methods that replace those of a library's class; never instantiated on its own.

    Swapping a module replaces its class by one that inherits from the adapter and the library's class and keeps the
    latter's name. Parameters, buffers, hooks, options and all other methods stay the same, ``isinstance`` and
    ``super()`` lead to the library's class, copies and pickles are swapped as well, and the library is not imported.

    An adapter annotates the attributes that it uses; a module that lacks one of them does not fit.

    On a GPU rows and codes are multiplied in the type of the rows, 16 bits under autocast, unless ``fp32_scores``.
    """

    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods whose arguments must be those of the library's class."""
    fp32_scores = False

    def _nearest_codes(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Return the indices (M,) of the codes (N, D) nearest to rows (M, D)."""
        dtype = score_dtype(rows, codebook, self.fp32_scores)
        with torch.autocast(rows.device.type, enabled=False):
            return assign_codes(rows.to(dtype), codebook.to(dtype))

    @classmethod
    def unlike(cls, module: nn.Module) -> str | None:
        """Return a clause on how this module differs from the known classes; None if it does not."""
        for method in cls.methods:
            if reason := other_arguments(cls, type(module), method):
                return reason
        adapters = [base for base in cls.__mro__ if issubclass(base, Adapter)]
        used = [name for base in adapters for name in vars(base).get("__annotations__", ())]
        missing = [name for name in used if not hasattr(cls, name) and not hasattr(module, name)]
        return f"it has no {', '.join(missing)}, which the known classes have" if missing else None

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        """Return a clause about an option of this module that isn't covered; None if there is none."""
        return None

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        """Give a module its new class; call it once."""
        module.__class__ = swapped_class(cls, type(module))

    def __reduce__(self) -> tuple:
        # By name a pickle would find the library's class.
        adapter, library_class = type(self).__bases__
        return _bare_module, (adapter, library_class), self.__dict__


_swapped_classes: dict[tuple[type[Adapter], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(adapter: type[Adapter], library_class: type[nn.Module]) -> type[nn.Module]:
    """Return ``library_class`` with the adapter's methods, the same class at every call."""
    key = (adapter, library_class)
    if key not in _swapped_classes:
        names = {"__module__": library_class.__module__, "__qualname__": library_class.__qualname__}
        _swapped_classes[key] = type(library_class.__name__, key, names)
    return _swapped_classes[key]


def _bare_module(adapter: type[Adapter], library_class: type[nn.Module]) -> nn.Module:
    new_class = swapped_class(adapter, library_class)
    return new_class.__new__(new_class)


def other_arguments(adapter: type[nn.Module], library_class: type[nn.Module], method: str = "forward") -> str | None:
    """Return a clause if a library's method takes other arguments than the adapter's, as an unknown release may.

    If the adapter passes on ``*args`` and ``**options``, only its named arguments, which come first, are compared.
    """
    if not hasattr(library_class, method):
        return f"it has no method {method}"
    methods = [getattr(owner, method) for owner in (adapter, library_class)]
    known, found = (list(inspect.signature(function).parameters.values())[1:] for function in methods)
    named = [argument.name for argument in known if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    names = [argument.name for argument in found]
    passes_on = len(named) < len(known)
    if named == (names[: len(named)] if passes_on else names):
        return None
    wanted = ", ".join([*named, "..."] if passes_on else named)
    return f"its {method} takes ({', '.join(names)}), not the ({wanted}) of the releases that are known"


def to_rows(maps: Tensor) -> Tensor:
    """Return maps (B, D, H, W) as contiguous rows (B, H, W, D)."""
    return maps.permute(0, 2, 3, 1).contiguous()


def codes_and_loss(rows: Tensor, codes: Tensor, beta: float, legacy: bool) -> tuple[Tensor, Tensor]:
    """Return codes (B, H, W, D) as maps (B, D, H, W) with the identity's gradient to the rows, and the loss.

    Operations have the order of taming and its descendants, so that values agree to the bit. With ``legacy`` beta
    weighs the codebook term, not the commitment.
    """
    commitment, codebook = two_losses(rows, codes)
    loss = commitment + beta * codebook if legacy else beta * commitment + codebook
    quantized = rows + (codes - rows).detach()
    return quantized.permute(0, 3, 1, 2).contiguous(), loss


def two_losses(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the commitment loss, which moves rows to their codes, and the codebook loss, codes to their rows."""
    return ((codes.detach() - rows) ** 2).mean(), ((codes - rows.detach()) ** 2).mean()
