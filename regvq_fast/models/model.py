"""Base of the models: saving and loading of folders, activation checkpointing, evaluation mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regvq_fast.models.pretrained import pretrained_files, read_pretrained, write_folder
from regvq_fast.models.weights import check_state_dict

AnyModel = TypeVar("AnyModel", bound="Model")


class Model(nn.Module):
    """A network that says what it was built with, so that weights and this are all that it takes to have it again.

    A subclass keeps the arguments of its constructor, as plain values, in `_arguments`. One that is built around
    another module adds the description of it to `architecture`, and makes it anew in `_build`.
    """

    _arguments: dict[str, Any]

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values; "type" is its class."""
        return {"type": type(self).__name__, **self._arguments}

    @classmethod
    def _build(cls, **description: Any) -> Self:
        """The model of an `architecture` (without "type"), with fresh weights; TypeError where it doesn't fit."""
        return cls(**description)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the weights, and the architecture they need, to a folder that `from_pretrained` reads.

        It appears complete or not at all; one of the same name that this wrote earlier is replaced. Of a pre-trained
        text encoder, the name is saved; all else that the model is built around is saved with its weights.

        Raises:
            ValueError: `folder` is something else, or the model has a quantizer that is not one of this library's.
            OSError: the folder can't be written.
        """
        write_folder(Path(folder), pretrained_files(self.architecture(), self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The model in a folder: one of `save_pretrained`, a checkpoint of a run, or a run.

        Of a run it is the final model, or that of the newest checkpoint where the run has not come to its end. Files
        that have checksums are compared with them, and nothing is unpickled.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder, or no weights in it, or not those of a pre-trained text encoder.
            NotADirectoryError: it is a file.
            ValueError: a file is truncated, damaged or foreign, or holds another model; the message names it. Or the
                text encoder needs transformers, which is not installed.
        """
        return read_model(folder, cls)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trade time for memory: each `Checkpointed` part runs a second time in backward. Gradients stay."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = enabled


def read_model(folder: str | os.PathLike[str], *kinds: type[AnyModel]) -> AnyModel:
    """The model in a folder, as :meth:`Model.from_pretrained` of whichever of some kinds it is.

    Raises:
        OSError, ValueError: as there; a model of none of the kinds.
    """
    description, weights = read_pretrained(Path(folder))
    name = description.pop("type", "VQGAN")  # whose folders had none at first
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(f"{folder} holds a {name}, not a {' or '.join(kind.__name__ for kind in kinds)}")
    try:
        model = kind._build(**description)
    except TypeError as error:
        raise ValueError(f"the architecture in {folder} doesn't fit this version: {error}") from None
    check_state_dict(weights, {name: value.shape for name, value in model.state_dict().items()}, f"this {name}")
    model.load_state_dict(weights)
    return model.eval()


class Checkpointed(nn.Module):
    """A part of a model that can keep its inputs alone for backward and run once more there."""

    layers: Callable[..., Tensor]
    """The computation of the part, a method of the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False

    def forward(self, *inputs: Any) -> Tensor:
        """`layers`, whose shapes these are."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers, *inputs, use_reentrant=False)
        return self.layers(*inputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is back in its own mode."""
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
