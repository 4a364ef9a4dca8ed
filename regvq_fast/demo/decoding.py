"""Process that decodes untrusted images: its time and memory are limited, and it may crash."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from regvq_fast.demo.uploads import Square, read_square

SECONDS = 20.0
"""Time limit of decoding. A small file can take hours, such as a JPEG with many empty scans."""
MEMORY = 2 * 2**30
"""Memory limit of decoding in bytes: a WebP image of 50 million pixels takes 1.1 GiB."""
_START_SECONDS = 120.0
_AFTER_SECONDS = 10  # the parent's limit comes first


class Decoder:
    """`read_square` in another process, for one image at a time; a process that ends is replaced.

    Args:
        seconds: time limit per image.
        memory: memory limit per image in bytes.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._begun = False
        self._start()

    def read_square(self, file: Path, size: int) -> Square:
        """Read an image as :func:`regvq_fast.demo.uploads.read_square`.

        Raises:
            ValueError: as there; or decoding takes too much time or memory, or crashes.
            OSError: the disk fails, or the process does not start.
        """
        with self._lock:
            if not self._process.is_alive():
                self._start()
            try:
                if not self._begun:
                    if not self._pipe.poll(_START_SECONDS):
                        raise OSError(f"the process that decodes images did not start in {_START_SECONDS:.0f} seconds")
                    self._begun = self._pipe.recv()
                self._pipe.send((file, size))
                if not self._pipe.poll(self.seconds):
                    self.close()
                    raise ValueError(
                        f"The image takes over {self.seconds:.0f} seconds to decode: save a smaller version."
                    )
                answer = self._pipe.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                raise ValueError("The image is damaged: its decoder crashed.") from None
        if isinstance(answer, Exception):
            raise answer
        pixels, width, height = answer
        return Square(torch.from_numpy(pixels), width, height)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that this process's threads hold
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_decode, args=(other, self.seconds, self.memory), daemon=True)
        self._process.start()
        other.close()
        self._begun = False


def _decode(pipe: Connection, seconds: float, memory: int) -> None:
    """Answer requests until the pipe is closed.

    The parent ends this process after its time limit. If the parent was killed, an alarm does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this one
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    pipe.send(True)
    while True:
        try:
            file, size = pipe.recv()
        except EOFError:
            return
        answer: object
        signal.alarm(int(seconds) + _AFTER_SECONDS)  # not of Python, which waits for Pillow
        try:
            square = read_square(file, size)
            answer = (square.pixels.numpy(), square.width, square.height)
        except MemoryError:
            answer = ValueError(f"The image takes over {memory / 2**30:.1f} GiB to decode: save a smaller version.")
        except Exception as error:
            answer = error
        signal.alarm(0)
        pipe.send(answer)
