"""One owner for each folder that a job writes to: a lock file names the owner, also across machines.

A killed process leaves its file behind. On the same machine, the next process sees that no process has the owner's
number and start time. On another machine or in another container that is not visible: there an owner counts as gone if
it has not touched the file for ten minutes by the clock of the disk; a running one touches it every half minute. A
process that was paused for longer notices before it writes again (:meth:`FolderLock.check`).
"""

import atexit
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_TOUCH_SECONDS, _GONE_SECONDS = 30.0, 600.0
_WRITING_SECONDS = 10.0  # a new file may be empty for this long


class FolderLock:
    """The right to write into a folder, until it is released or this process ends.

    Args:
        folder: to lock; created if it is missing.
        purpose: locks with different purposes don't exclude each other; the file is ``.PURPOSE.lock``.

    Raises:
        FileExistsError: another process has the lock. OSError: the folder is not writable.
    """

    def __init__(self, folder: Path, purpose: str) -> None:
        self.path = folder / f".{purpose}.lock"
        self._process = os.getpid()
        self._content = json.dumps({**_this_process(), "command": shlex.join(sys.argv)[:120], "since": time.time_ns()})
        self._released = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        atexit.register(self.release)
        try:
            self._acquire()
            threading.Thread(target=self._keep_touching, daemon=True).start()
        except BaseException:  # Ctrl-C while the thread starts
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise FileExistsError if another process took over while this one was paused; restore a lost file."""
        if not self.is_held():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()

    def is_held(self) -> bool:
        """Return whether the file is still this process's: its folder was neither removed, emptied nor taken over."""
        return self._read() == self._content

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._released.is_set() or os.getpid() != self._process:  # a forked child does not own the lock
            return
        with suppress(OSError):
            if self.is_held():
                self.path.unlink()
        # Last: Ctrl-C before leaves the release to the end of the process.
        self._released.set()
        atexit.unregister(self.release)

    def _acquire(self) -> None:
        try:
            with open(self.path, "x") as file:  # "x" is exclusive on network disks, too
                file.write(self._content)
        except FileExistsError:
            try:
                self._take_over()
            except FileNotFoundError:  # released meanwhile
                self._acquire()
        except OSError:  # a full disk
            if self._read() == "":
                self.path.unlink()
            raise

    def _take_over(self) -> None:
        """Replace an owner that is gone; FileExistsError if it is not gone."""
        with open(self.path, "r+") as file:
            with suppress(OSError):  # some network disks have no flock
                fcntl.flock(file, fcntl.LOCK_EX)  # if two processes find the owner gone, the second sees the first
            content = file.read()
            if (problem := _in_use(self.path, content)) is not None:
                raise FileExistsError(problem)
            file.seek(0)
            file.write(self._content)
            file.truncate()

    def _read(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def _keep_touching(self) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            with suppress(OSError):
                if self.is_held():
                    os.utime(self.path)


def check_free(folder: Path, purpose: str) -> None:
    """Raise FileExistsError if a process owns the :class:`FolderLock` of a folder."""
    path = folder / f".{purpose}.lock"
    with suppress(FileNotFoundError):
        if (problem := _in_use(path, path.read_text())) is not None:
            raise FileExistsError(problem)


def _in_use(path: Path, content: str) -> str | None:
    """Return an error message that names the owner; None if the owner is gone."""
    try:
        owner: dict[str, Any] = dict(json.loads(content))
        host, number, command = owner["host"], int(owner["pid"]), owner["command"]
    except (ValueError, KeyError, TypeError):  # the file is being written, or its writer was killed
        owner, host, number, command = {}, "an unknown host", 0, "an unknown command"
    here = _this_process()
    refusal = (
        f"{path.parent} is in use by process {number} on {host} ({command}): wait until it ends, or name another --out"
    )
    if owner.get("machine") == here["machine"]:
        return refusal if _start_time(number) == owner["started"] else None
    silent = _clock_of_disk(path.parent) - path.stat().st_mtime
    if silent > (_GONE_SECONDS if owner else _WRITING_SECONDS):
        return None
    return (
        f"{refusal}; if it was killed, delete {path}, or wait until {_GONE_SECONDS / 60:.0f} minutes after its last "
        f"sign of life, {max(silent, 0):.0f} seconds ago"
    )


def _this_process() -> dict[str, Any]:
    """Return host, number and start time of this process, and the machine or container that numbers it."""
    host, pid = socket.gethostname(), os.getpid()
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        machine = host
    return {"host": host, "pid": pid, "started": _start_time(pid), "machine": machine}


def _start_time(pid: int) -> str | None:
    """Return the start time of a process, as the system states it; "" if unknown, None if the process is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists() or pid <= 0:
            return None
    else:
        state, *_ = fields = status.rpartition(")")[2].split()
        return None if state in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _clock_of_disk(folder: Path) -> float:
    """Return the time by the clock that sets the modification times in a folder."""
    probe = folder / f".clock.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
