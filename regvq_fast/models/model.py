"""Base class of the models: saving, loading and publishing, activation checkpointing, evaluation mode."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint

from regvq_fast.models.card import Card
from regvq_fast.models.hub import CARD, HubName, local_folder, publish
from regvq_fast.models.pretrained import CONFIG, pretrained_files, read_pretrained, with_manifest, write_folder
from regvq_fast.models.weights import check_state_dict, weights_hash
from regvq_fast.version import __version__

_ANY_SIZE = 2**20
"""Largest number in an architecture that is accepted for weights of any size, such as the size of images."""

AnyModel = TypeVar("AnyModel", bound="Model")


class Model(nn.Module):
    """A network with a description of its architecture, from which it can be rebuilt.

    A subclass stores the arguments of its constructor, as plain values, in `_arguments`. If it contains another module,
    it adds that module's description to `architecture` and rebuilds the module in `_build`.
    """

    _arguments: dict[str, Any]
    title: ClassVar[str] = "Prior over image tokens"
    """Kind of model, as a heading."""
    pipeline_tag: ClassVar[str] = "image-to-image"
    """Task on the Hugging Face Hub."""
    example: ClassVar[str] = ""
    """Lines of Python for a model card, after those that load ``model``; names in braces are its arguments."""

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, and the name of the class as "type"."""
        return {"type": type(self).__name__, **self._arguments}

    @classmethod
    def _build(cls, **description: Any) -> Self:
        """Build the model of an `architecture` (without "type"), with new weights; TypeError if it doesn't fit."""
        return cls(**description)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save weights and architecture to a folder that `from_pretrained` reads.

        The folder appears complete or not at all, and replaces one saved earlier. Of a pre-trained text encoder only
        the name is saved; all other modules are saved with their weights.

        Raises:
            ValueError: `folder` exists and is not a saved model, or the quantizer is not one of this library's.
            OSError: the folder can't be written.
        """
        write_folder(Path(folder), pretrained_files(self.architecture(), self.state_dict()))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load a model from a folder of `save_pretrained`, a checkpoint or a run, or from the Hugging Face Hub.

        From a run this is the final model, or that of the newest checkpoint if the run is unfinished. Files with
        checksums are checked, and nothing is unpickled.

        Args:
            source: a folder; or, if there is no such folder, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION on the
                Hugging Face Hub, whose cache also works offline.
            revision: branch, tag or commit on the hub. None: the main branch.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder or repository, no weights in it, or no weights of a pre-trained text
                encoder.
            NotADirectoryError: the source is a file.
            OSError: the hub refuses access, or the download failed.
            ValueError: a file is truncated, damaged or foreign, or has another model; the message names it. Or the
                text encoder needs transformers, which is not installed.
        """
        return read_model(source, cls, revision=revision)

    def push_to_hub(
        self, to: str, *, revision: str | None = None, private: bool = False, license: str | None = None
    ) -> str:
        """Publish the model with a model card on the Hugging Face Hub, for `from_pretrained`.

        One commit replaces the card and files of an earlier model. `regvq push` publishes a run, with its settings and
        measurements in the card, or a prior with its tokenizer.

        Args:
            to: ORGANIZATION/NAME.
            revision: branch, created if needed. None: the main branch.
            private: create a private repository; an existing public one is refused.
            license: identifier of the weights' license on the hub, such as "mit". None: the card states none.

        Returns:
            The address of the commit.

        Raises:
            ValueError: an invalid name, a public repository with ``private``, a quantizer that is not one of this
                library's; or huggingface_hub is not installed.
            OSError: the hub can't be reached or refuses the commit.
        """
        files = pretrained_files(self.architecture(), self.state_dict())
        card = self.card(HubName(to, revision), config=json.loads(files[CONFIG]), license=license).text().encode()
        message = f"{self.title} of regvq_fast {__version__}"
        return publish({**with_manifest(files), CARD: card}, to, revision=revision, private=private, message=message)

    def card(self, name: HubName, **contents: Any) -> Card:
        """Return the model's card; ``contents`` are further fields of `regvq_fast.models.card.Card`."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Card(name=name, kind=type(self), parameters=parameters, sha256=weights_hash(self), **contents)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trade time for memory: each `Checkpointed` module is recomputed in backward. Gradients stay the same."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = enabled


def read_model(source: str | os.PathLike[str], *kinds: type[AnyModel], revision: str | None = None) -> AnyModel:
    """Load a model as :meth:`Model.from_pretrained` of the one of ``kinds`` that it is.

    Raises:
        OSError, ValueError: as there, or a model of none of these kinds.
    """
    description, weights = read_pretrained(local_folder(source, revision))
    name = description.pop("type", "VQGAN")  # early folders of a VQGAN have no type
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{source} holds a {name}, not a {wanted}: give the folder of a {wanted}")
    most = 2 * sum(value.numel() for value in weights.values())
    try:
        for number in _whole_numbers(description):
            if number > max(most, _ANY_SIZE):
                raise ValueError(f"its architecture has the number {number}, more than its weights could have")
        with _at_most(most):
            model = kind._build(**description)
        fresh = model.state_dict()
        check_state_dict(weights, {name: value.shape for name, value in fresh.items()}, f"this {name}")
        for name, value in fresh.items():
            if value.is_floating_point() != weights[name].is_floating_point():
                raise ValueError(f"the weights have {name} as {weights[name].dtype}, not {value.dtype}")
            if not weights[name].isfinite().all():
                raise ValueError(f"the weights have non-finite values in {name}")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"the architecture in {source} doesn't fit this version: {error}") from None
    model.load_state_dict(weights)
    return model.eval()


def _whole_numbers(description: Any) -> Iterator[int]:
    """Yield the integers in nested plain values."""
    if isinstance(description, int):
        yield description
    elif isinstance(description, (list, dict)):
        for value in description.values() if isinstance(description, dict) else description:
            yield from _whole_numbers(value)


_counts = True  # False inside `weights_of_its_own`


@contextmanager
def weights_of_its_own() -> Iterator[None]:
    """Allow modules of any size inside the block: they are loaded, and don't belong to the model being read."""
    global _counts
    before, _counts = _counts, False
    try:
        yield
    finally:
        _counts = before


@contextmanager
def _at_most(numbers: int) -> Iterator[None]:
    """Raise ValueError if modules built inside the block have more than ``numbers`` parameters, before filling them.

    A damaged description could otherwise use up memory or time.
    """
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter.numel() if _counts and isinstance(parameter, Tensor) else 0
        if made > numbers:
            raise ValueError("its architecture has more parameters than its weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class Checkpointed(nn.Module):
    """A module that can store only its inputs for backward, and be recomputed there."""

    layers: Callable[..., Tensor]
    """The module's computation, a method of the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False

    def forward(self, *inputs: Any) -> Tensor:
        """Compute `layers`."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers, *inputs, use_reentrant=False)
        return self.layers(*inputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block; afterwards restore the mode of every submodule."""
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
