"""Base of the models: saving and loading of folders, activation checkpointing, evaluation mode."""

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
"""A number in an architecture may be so large whatever the weights are, as the size of images is."""

AnyModel = TypeVar("AnyModel", bound="Model")


class Model(nn.Module):
    """A network that says what it was built with, so that weights and this are all that it takes to have it again.

    A subclass keeps the arguments of its constructor, as plain values, in `_arguments`. One that is built around
    another module adds the description of it to `architecture`, and makes it anew in `_build`.
    """

    _arguments: dict[str, Any]
    title: ClassVar[str] = "Prior over image tokens"
    """Kind of model, as a heading."""
    pipeline_tag: ClassVar[str] = "image-to-image"
    """Its task on the Hugging Face Hub."""
    example: ClassVar[str] = ""
    """Lines of Python for a model card, behind those that load ``model``; fields in braces are its arguments."""

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
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load the model in a folder: one of `save_pretrained`, a checkpoint of a run, or a run; or from the hub.

        Of a run it is the final model, or that of the newest checkpoint where the run has not come to its end. Files
        that have checksums are compared with them, and nothing is unpickled.

        Args:
            source: a folder; if there is none, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION on the Hugging Face Hub,
                whose cache serves it without a network, too.
            revision: branch, tag or commit on the hub. None: the main branch.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: neither such a folder nor such a repository, or no weights in it, or not those of a
                pre-trained text encoder.
            NotADirectoryError: it is a file.
            OSError: the hub refuses it, or the download failed.
            ValueError: a file is truncated, damaged or foreign, or holds another model; the message names it. Or the
                text encoder needs transformers, which is not installed.
        """
        return read_model(source, cls, revision=revision)

    def push_to_hub(
        self, to: str, *, revision: str | None = None, private: bool = False, license: str | None = None
    ) -> str:
        """Publish the model on the Hugging Face Hub, as `from_pretrained` loads it, with a model card.

        Card and files of a model that was published there earlier are replaced, in one commit. `regvq push` publishes
        a run, whose card has settings and measurements, and a prior with its tokenizer.

        Args:
            to: ORGANIZATION/NAME.
            revision: branch, made if it isn't there. None: the main branch.
            private: make a private repository; a public one that exists is refused.
            license: identifier of the weights' license on the hub, such as "mit". None: the card states none.

        Returns:
            The address of the commit.

        Raises:
            ValueError: not such a name, a public repository, a quantizer that is not one of this library's; or
                huggingface_hub is not installed.
            OSError: the hub can't be reached, or refuses it.
        """
        files = pretrained_files(self.architecture(), self.state_dict())
        card = self.card(HubName(to, revision), config=json.loads(files[CONFIG]), license=license).text().encode()
        message = f"{self.title} of regvq_fast {__version__}"
        return publish({**with_manifest(files), CARD: card}, to, revision=revision, private=private, message=message)

    def card(self, name: HubName, **contents: Any) -> Card:
        """Return the model's card, with further contents of `regvq_fast.models.card.Card`."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Card(name=name, kind=type(self), parameters=parameters, sha256=weights_hash(self), **contents)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trade time for memory: each `Checkpointed` part runs a second time in backward. Gradients stay."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = enabled


def read_model(source: str | os.PathLike[str], *kinds: type[AnyModel], revision: str | None = None) -> AnyModel:
    """Load a model as :meth:`Model.from_pretrained` of whichever of some kinds it is.

    Raises:
        OSError, ValueError: as there; a model of none of the kinds.
    """
    description, weights = read_pretrained(local_folder(source, revision))
    name = description.pop("type", "VQGAN")  # whose folders had none at first
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(f"{source} holds a {name}, not a {' or '.join(kind.__name__ for kind in kinds)}")
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
    """Yield the whole numbers in plain values."""
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
    """Raise ValueError where modules made inside the block have more parameters than this, before these are filled.

    A damaged description would ask for more memory, or time, than there is.
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
