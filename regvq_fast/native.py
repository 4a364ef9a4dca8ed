"""Optional C code for CPUs, compiled on first use if there is a compiler; all of it has a PyTorch fallback."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from regvq_fast.files import user_cache


@functools.lru_cache
def library(source: Path) -> ctypes.CDLL | None:
    """Compile and load a C file; None if that fails, as without a compiler.

    Compiled files are cached in ``$XDG_CACHE_HOME/regvq_fast`` (default: ``~/.cache/regvq_fast``) by a hash of the
    source.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        folder = user_cache("native")
        built = folder / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # so that it appears complete
                new = Path(scratch) / built.name
                flags = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]
                command = [compiler, *flags, str(source), "-o", str(new)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                os.replace(new, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None
