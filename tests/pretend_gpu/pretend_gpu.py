"""Runs scripts as on a GPU where there is none: what torch.cuda says of the device that ``backend.cpp`` provides.

    LD_PRELOAD=backend.so TRITON_INTERPRET=1 python pretend_gpu.py '[["train/vq.py", "--device", "cuda"]]'

Kernels run in Triton's interpreter. A CUDA graph is a list of ops: capturing takes back what they did, a replay does
them again with the tensors that they had. So a step that reads what it should not, waits for the device or copies from
the host while it is captured, fails here as it would on a GPU. ``PRETEND_CAPABILITY`` (9.0) is the device's.
"""

import contextlib
import ctypes
import json
import os
import runpy
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils import pin_memory

CAPABILITY = tuple(map(int, os.environ.get("PRETEND_CAPABILITY", "9.0").split(".")))
NAME = "Pretend GPU"

_WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class _Recorder(TorchDispatchMode):
    """Records ops into a graph; `undo` takes back what they wrote into tensors that were there before."""

    def __init__(self, graph: "_Graph") -> None:
        super().__init__()
        self._graph = graph
        self._overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self._overwritten.append((value, value.clone()))
        result = func(*args, **kwargs)
        with_host = any(tensor.device.type == "cpu" for tensor in _tensors((args, kwargs, result)))
        if func in _WAITS or (func in _COPIES and with_host):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self._graph.ops.append((func, args, kwargs, _tensors(result)))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self._overwritten):
            tensor.copy_(before)


class _Graph:
    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.ops:
            for result, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if result.data_ptr() != value.data_ptr():
                    result.copy_(value)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _capture(graph: _Graph, **_: Any) -> Iterator[None]:
    recorder = _Recorder(graph)
    with recorder:
        yield
    recorder.undo()


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass


def install() -> None:
    """Make torch.cuda report one GPU for the rest of the process."""
    properties = SimpleNamespace(name=NAME, total_memory=2**36, multi_processor_count=132, uuid="none")
    says = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_arch_list": [],
        "get_device_properties": properties,
        "is_bf16_supported": CAPABILITY >= (8, 0),
        "max_memory_allocated": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "stream": contextlib.nullcontext(),
        "device": contextlib.nullcontext(),
        "device_of": contextlib.nullcontext(),
        "current_stream": _Stream(),
        "Stream": _Stream(),
    } | dict.fromkeys(
        (
            "synchronize empty_cache reset_peak_memory_stats manual_seed manual_seed_all set_rng_state set_device "
            "_lazy_init"
        ).split()
    )
    for name, answer in says.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.CUDAGraph, torch.cuda.graph = _Graph, _capture  # type: ignore[assignment,misc]

    # The memory is the host's: nothing needs copying to be written to a file, pinned, or read by the interpreter.
    torch.UntypedStorage.cpu = _to_host  # type: ignore[method-assign]
    copy_tensor = Tensor.__deepcopy__  # of buffers: by their storage, which PyTorch for CPUs can't make on a GPU
    Tensor.__deepcopy__ = lambda self, memo: self.clone() if self.is_cuda else copy_tensor(self, memo)  # type: ignore
    pin_memory.pin_memory = lambda data, device=None: data  # type: ignore[assignment]
    from triton.runtime import interpreter

    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    # Products of 16-bit factors into fp32, which cuBLAS has and the CPU's library lacks.
    torch.library.impl("aten::mm.dtype", "CPU")(lambda a, b, dtype: a.to(dtype) @ b.to(dtype))
    torch.library.impl("aten::bmm.dtype", "CPU")(lambda a, b, dtype: a.to(dtype) @ b.to(dtype))


def _to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    size = storage.nbytes()
    if storage.device.type == "cpu":
        return storage
    if size == 0:
        return torch.UntypedStorage(0)
    return torch.UntypedStorage.from_buffer(  # type: ignore[attr-defined]
        bytearray(ctypes.string_at(storage.data_ptr(), size)), dtype=torch.uint8
    )


if __name__ == "__main__":
    install()
    for command in json.loads(sys.argv[1]):
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
