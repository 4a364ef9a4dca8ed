"""Reading of image files and captions: errors of files, errors of the storage, and retries."""

import codecs
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

Result = TypeVar("Result")

_OF_A_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PAUSES = (0.1, 1.0, 5.0)
"""Seconds between attempts; the restart of a file server takes longer, and should be an error."""


@contextmanager
def opened_image(path: Path, name: str, damaged: Callable[[str], str]) -> Iterator[Image.Image]:
    """Open an image file that a user named; errors of the block name the file.

    Args:
        path: of the file.
        name: of the file in messages.
        damaged: returns the message for an unreadable file, given the reason.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or the block can't read it.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image") from None
    except Exception as error:  # Pillow's decoders raise many types of errors for damaged files
        if is_of_the_machine(error):
            raise
        raise ValueError(damaged(why_unreadable(error))) from None


def is_of_the_machine(error: Exception) -> bool:
    """Return whether the machine, not the file, caused a read error: EIO, ESTALE, EMFILE, no memory.

    Pillow raises OSError for damaged files, too, but without an errno; a damaged offset gives EINVAL.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL) and not isinstance(error, _OF_A_FILE)
    return isinstance(error, MemoryError)


def patiently(work: Callable[[], Result], name: Callable[[], str]) -> Result:
    """Return the result of ``work``, with a few retries after pauses if the storage fails.

    Raises:
        OSError: the storage still fails; the message contains the result of ``name``. Otherwise as ``work``.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return work()
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            if (pause := next(pauses, None)) is None:
                raise OSError(error.errno, error.strerror, name()) from None
            time.sleep(pause)


def why_unreadable(error: Exception) -> str:
    """Return the reason of an error in reading an image file, on one line."""
    if isinstance(error, UnidentifiedImageError):  # its message is about a buffer
        return "it is no image"
    return " ".join(str(error).split()) or type(error).__name__


def caption_lines(data: bytes) -> list[str]:
    """Return the captions in a file, at least one: its lines in order, without empty and repeated ones.

    Lines end with LF, CR or both; U+2028 and other breaks are part of a line. A byte order mark is removed.

    Raises:
        ValueError: there is no caption, or the file is not UTF-8.
    """
    lines = list(dict.fromkeys(filter(None, (line.decode().strip() for line in raw_lines(data)))))
    if not lines:
        raise ValueError("its caption is empty")
    return lines


def raw_lines(data: bytes) -> list[bytes]:
    """Return the lines of a text in UTF-8, without its byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8).splitlines()


def text_lines(path: Path) -> list[str]:
    """Return the lines of a list in UTF-8, without empty ones.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return [text for line in raw_lines(path.read_bytes()) if (text := line.decode()).strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, or not UTF-8 ({error}): unpack it anew") from None


def check_same_size(labels: Image.Image, size: tuple[int, int]) -> None:
    """Raise ValueError unless a map has the (width, height) of its image."""
    if labels.size != size:
        raise ValueError(f"its map has {labels.width} x {labels.height} pixels, the image {size[0]} x {size[1]}")
