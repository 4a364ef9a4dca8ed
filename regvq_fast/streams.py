"""Standard output and error that survive a closed pipe or terminal, a full disk and any encoding."""

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO


def survive_lost_output(*, warns: bool = True) -> None:
    """Replace this process's output streams by streams whose writes don't fail; a second call does nothing.

    Characters that the encoding lacks are escaped. After a pipe or terminal is closed, output is discarded; on a full
    disk, only what does not fit.

    Args:
        warns: warn once, on the other stream, that output is lost.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed at the start: a data file would get its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    outputs = (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)
    if any(stream is not original for stream, original in outputs):  # replaced by a program, or by an earlier call
        return
    sys.stdout, sys.stderr = _surviving(sys.stdout, 2 if warns else None), _surviving(sys.stderr, 1 if warns else None)


def _surviving(stream: Any, other: int | None) -> TextIO:
    stream.flush()
    raw = _Output(stream.fileno(), other)
    buffer: Any = raw if getattr(stream, "write_through", False) else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        newline=None,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    """A descriptor whose writes don't fail.

    Args:
        descriptor: stays open when this is closed.
        other: descriptor for one warning; None: no warning.
    """

    def __init__(self, descriptor: int, other: int | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._other = other

    def write(self, data: Any, /) -> int:
        """Write as much as possible; lost bytes count as written."""
        size = len(memoryview(data).cast("B"))
        try:
            while (written := super().write(data)) is None:  # another program made the pipe non-blocking
                select.select((), (self,), ())
            return written
        except OSError as error:
            self._warn(error)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a disk may have room later
                self._discard()
            return size

    def _discard(self) -> None:
        """Discard all further output of this process and its children."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)

    def _warn(self, error: OSError) -> None:
        if self._other is None:
            return
        text = f"warning: output can't be written any more ({error.strerror}); the work goes on without it\n"
        with suppress(OSError):  # the other stream is lost, too
            os.write(self._other, text.encode())
        self._other = None
