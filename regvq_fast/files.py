"""Atomic files and folders, checks of output folders, and the user's cache."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regvq_fast.ownership import FolderLock

_LONGEST_STEM = 40  # characters of a name in that of its temporary file, whose length is limited, too


def temporary_path(path: Path) -> Path:
    """Return a new hidden path beside ``path``; its suffix is the same, since writers choose the format by it.

    It is random: processes in several containers have the same number.
    """
    return path.with_name(f".{path.stem[:_LONGEST_STEM]}.{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; when the body succeeds, it replaces ``path``.

    Creates missing parent folders. If the body fails, the temporary file is removed and ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
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


def check_new_file(flag: str, path: Path) -> None:
    """Raise FileExistsError, about a flag, if its file exists."""
    if path.exists():
        raise FileExistsError(f"{flag} {path} exists; name a new file")


@contextmanager
def kept_folder(out: Path) -> Iterator[Callable[[], None]]:
    """Create and lock ``out``, and yield a function, also called at the end, that raises if the folder was removed.

    Without that the rest of the files would be written into a new folder, and the first ones be missing in silence. A
    folder that is still empty at the end is removed, unless it was there before.

    Raises:
        FileNotFoundError: ``out`` was removed. FileExistsError: another process writes or wrote into it.
    """
    there = out.exists()
    try:
        with _owned(out, out) as check:
            check_new_folder(out)
            yield check
    finally:
        if not there:
            with suppress(OSError):  # it is not empty
                out.rmdir()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` to fill; when the body succeeds, it replaces ``out``.

    Creates missing parent folders. If the body fails, the temporary folder is removed.

    Raises:
        FileExistsError: ``out`` exists and is not empty. ValueError: it is a mount point or the current folder.
        FileNotFoundError: the temporary folder was removed.
    """
    check_new_folder(out)
    named, out = out, out.resolve()
    if out.is_dir() and any(out.iterdir()):  # another folder can't replace it
        raise FileExistsError(f"--out {named} has hidden files; name a new folder")
    if out.is_mount() or out == Path.cwd():  # nor these
        raise ValueError(f"--out {out} is a mount point or the current folder: name a new folder in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_path(out)
    partial.mkdir()
    try:
        with _owned(partial, named):
            yield partial
        try:
            os.replace(partial, out)
        except OSError:
            check_new_folder(named)  # another process may have filled it
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _owned(folder: Path, out: Path) -> Iterator[Callable[[], None]]:
    """Lock ``folder``, and yield a function that raises FileNotFoundError, about ``out``, if it was removed or emptied.

    It is also called at the end, and after an error. A folder in which files appear while it is removed is
    emptied only, of the lock's file, too.
    """
    with FolderLock(folder, "output") as lock:

        def check() -> None:
            if not lock.is_held():
                raise FileNotFoundError(
                    f"--out {out} was removed while files were written into it: run the command again"
                )

        try:
            yield check
            check()
        except Exception:  # each library has its own for a missing folder
            check()
            raise


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
