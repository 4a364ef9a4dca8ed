"""Optional C code for CPUs, compiled on first use if there is a compiler; all of it has a PyTorch fallback."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from regvq_fast.files import user_cache

_ROWS = Path(__file__).parent / "kernels" / "rows.c"
_FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"]
_PART_ELEMENTS = 1 << 15  # fewest scores of a thread, PyTorch's own grain


@functools.lru_cache
def library(source: Path) -> ctypes.CDLL | None:
    """Compile and load a C file; None if that fails, as without a compiler.

    Compiled files are cached in ``$XDG_CACHE_HOME/regvq_fast`` (default: ``~/.cache/regvq_fast``) by a hash of flags
    and source.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        folder = user_cache("native")
        digest = hashlib.sha256(" ".join(_FLAGS).encode() + source.read_bytes()).hexdigest()
        built = folder / f"{source.stem}-{digest[:16]}.so"
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # so that it appears complete
                new = Path(scratch) / built.name
                command = [compiler, *_FLAGS, str(source), "-o", str(new)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                os.replace(new, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None


def rows_library(like: Tensor) -> ctypes.CDLL | None:
    """Return ``kernels/rows.c`` if it takes tensors such as ``like``: float32 on a CPU, outside of torch.compile."""
    if like.device.type != "cpu" or like.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return library(_ROWS)


def run_rows(name: str, scores: Tensor, *arguments: Tensor | int | None) -> None:
    """Call a function of ``kernels/rows.c`` for all rows of ``scores`` (rows, N), in PyTorch's number of threads."""
    native = library(_ROWS)
    assert native is not None
    num_rows, num_codes = scores.shape
    num_parts = max(1, min(torch.get_num_threads(), scores.numel() // _PART_ELEMENTS, num_rows))
    getattr(native, name)(*map(_as_c, (num_parts, num_rows, num_codes, *arguments)))  # releases the GIL


def _as_c(value: Tensor | int | None) -> ctypes.c_int64 | ctypes.c_void_p:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    assert value is None or value.is_contiguous()
    return ctypes.c_void_p(None if value is None else value.data_ptr())
