"""Atomic files and folders, checks of output folders, and the user's cache."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; when the body succeeds, it replaces ``path``.

    Creates missing parent folders. If the body fails, the temporary file is removed and ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # writers choose the format by the suffix
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(out: Path, remedy: str = "name a new one") -> None:
    """Raise FileExistsError unless ``out`` is missing or an empty folder; ``remedy`` ends the message.

    Hidden files, such as a killed process leaves, are ignored.
    """
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is not an empty folder; {remedy}")


@contextmanager
def kept_folder(out: Path) -> Iterator[Callable[[], None]]:
    """Create ``out`` and yield a function, also called at the end, that raises FileNotFoundError if it was removed.

    Without that the rest of the files would be written into a new folder, and the first ones be missing in silence. A
    folder that is still empty at the end goes, unless it was there before.
    """
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)  # no new folder gets this one's number while it is open

    def check() -> None:
        if not (out.exists() and os.path.samestat(os.fstat(handle), out.stat())):
            raise FileNotFoundError(f"--out {out} was removed while files were written into it: run the command again")

    try:
        yield check
        check()
    finally:
        os.close(handle)
        if not there:
            with suppress(OSError):  # it is not empty
                out.rmdir()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` to fill; when the body succeeds, it replaces ``out``.

    Creates missing parent folders. If the body fails, the temporary folder is removed.

    Raises:
        FileExistsError: ``out`` exists and is not empty. ValueError: it is a mount point or the current folder.
    """
    check_new_folder(out)
    out = out.resolve()
    if out.is_mount() or out == Path.cwd():  # another folder can't replace it
        raise ValueError(f"--out {out} is a mount point or the current folder: name a new folder in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(out: Path, remedy: str = "name another one") -> None:
    """Raise OSError unless ``out``, a folder or a missing path, is writable; ``remedy`` ends the message."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out {out} is not a folder: {there} is a file; {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} can't be written to; {remedy}")


def user_cache(name: str) -> Path:
    """Return the user's cache folder for files of one kind, ``$XDG_CACHE_HOME/regvq_fast/NAME``; it may not exist.

    Raises:
        OSError: neither ``XDG_CACHE_HOME`` nor a home folder is known.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise OSError("this user has no home folder to keep a cache in: set XDG_CACHE_HOME to a folder") from None
    return home / "regvq_fast" / name


class LineFile:
    """A file of lines that survives a full disk and its removal.

    Lines that can't be written wait in memory until the next write; :meth:`restore` rewrites a removed file.

    Args:
        path: of the file, which is created if it is missing.
        keep: bytes to keep; the rest is cut off, with an incomplete last line.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self.size = path.read_bytes()[:keep].rfind(b"\n") + 1
        """Bytes of all lines so far, including waiting ones."""
        self._file.truncate(self.size)
        self._waiting = b""

    def write(self, line: str) -> None:
        """Add a line; OSError if it has to wait."""
        added = line.encode() + b"\n"
        self._waiting += added
        self.size += len(added)
        self._flush()

    def sync(self) -> None:
        """Flush all lines to the disk; OSError if that fails."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; waiting lines are lost."""
        self._file.close()

    def restore(self) -> None:
        """Rewrite the file with all its lines if it was removed; OSError if that fails."""
        with suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                return
            raise FileExistsError(f"{self.path} is now held by another process")
        self._file.seek(0)
        content = self._file.read()
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(content)
        removed, self._file = self._file, self.path.open("a+b", buffering=0)
        removed.close()

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
