"""Sharded training: each rank holds some rows of every weight, gradient and optimizer state (PyTorch's FSDP2).

A sharded tensor is a `DTensor`; consecutive rows are on consecutive ranks. The functions return unsharded tensors
unchanged. All ranks must call those that gather.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from regvq_fast.models.model import Checkpointed
from regvq_fast.ranks import rank, world_size
from regvq_fast.training.compilation import maybe_compile

Module = TypeVar("Module", bound=nn.Module)


def shard(module: nn.Module, device: torch.device, *, compile: bool = False) -> None:
    """Shard the parameters of a module in place: each `Checkpointed` block by itself, then the rest.

    A block's weights are gathered for its forward pass and again for its backward pass; the rest stays gathered in
    between. Frozen parameters stay whole on every rank.

    Args:
        module: called as a whole in training; equal on all ranks.
        device: of the module.
        compile: compile each block. Gathering can't be part of a graph, so the rest is not compiled.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for block in [block for block in module.modules() if isinstance(block, Checkpointed)]:
        block.layers = maybe_compile(block.layers, compile)
        fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(module, mesh=mesh, ignored_params=frozen)


def skeleton(module: Module) -> Module:
    """Return a copy of a module, before it is sharded, with its parameters on the meta device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def copied(module: Module, structure: Module | None) -> Module:
    """Return a copy of a module, sharded alike, but without hooks that communicate.

    Args:
        module: to copy.
        structure: its :func:`skeleton` if it is sharded.
    """
    if structure is None:
        return copy.deepcopy(module)
    return _filled(structure, {name: value.clone() for name, value in module.state_dict().items()})


def whole(module: Module, structure: Module | None) -> Module:
    """Return a module with all weights on each rank: if it is sharded, a copy gathered tensor by tensor.

    Args:
        module: to gather.
        structure: its :func:`skeleton` if it is sharded.
    """
    if structure is None:
        return module
    return _filled(structure, {name: full(value) for name, value in module.state_dict().items()})


def _filled(structure: Module, values: Mapping[str, Tensor]) -> Module:
    filled = copy.deepcopy(structure)
    filled.load_state_dict(values, assign=True)
    return filled


def full(value: Tensor) -> Tensor:
    """Return the full tensor, gathered if it is sharded."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """Return this rank's rows of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors. Sharded ones are gathered one after the other to rank 0's CPU, and missing elsewhere."""
    found = {}
    for name, value in tensors.items():
        all_rows = full(value)
        if not isinstance(value, DTensor):
            found[name] = value
        elif rank() == 0:
            found[name] = all_rows.cpu()
    return found


class Pieces(tuple[Tensor, ...]):
    """A sharded tensor in a checkpoint: the rows from each rank that wrote it."""


def split(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the sharded tensors out of a state of nested dicts, lists and tuples.

    Returns:
        The state, equal on all ranks, with meta tensors instead of the sharded ones; and this rank's rows by name.
    """
    rows: dict[str, Tensor] = {}

    def take(name: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        rows[name] = value.to_local().detach()
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return _mapped(take, state), rows


def joined(state: Any, shards: Sequence[Mapping[str, Tensor]]) -> Any:
    """Undo :func:`split`: replace the meta tensors of a state by `Pieces`, the rows of all ranks in order.

    Raises:
        ValueError: rows of a tensor are missing.
    """

    def put(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        pieces = Pieces(part[name] for part in shards if name in part)
        if len(pieces) != len(shards) or sum(map(len, pieces)) != len(value):
            raise ValueError(f"rows of {name} are missing")
        return pieces

    return _mapped(put, state)


def _mapped(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(function, value, f"{name}/{key}" if name else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(function, value, f"{name}/{k}") for k, value in enumerate(tree))
    return function(name, tree)


def placed(saved: Tensor | Pieces, like: Tensor) -> Tensor:
    """Return a tensor of a checkpoint, sharded as ``like`` if that is sharded, else in full."""
    value = torch.cat(saved) if isinstance(saved, Pieces) else saved
    if isinstance(like, DTensor) and value.shape == like.shape:
        # Every rank has read the full tensor; the clone keeps only its rows.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()
    return value


def load(module: nn.Module, saved: Mapping[str, Tensor | Pieces]) -> None:
    """Load a module's state dict from a checkpoint."""
    own = module.state_dict()
    module.load_state_dict({name: placed(value, own.get(name, torch.empty(0))) for name, value in saved.items()})
