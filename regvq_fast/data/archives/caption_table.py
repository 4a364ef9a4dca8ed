"""Captions of many images in one file."""

from collections.abc import Mapping, Sequence

import numpy as np


class CaptionTable:
    """Captions by image name, in arrays whose memory worker processes share.

    Args:
        captions: of each image, in order. Line breaks become spaces, and empty captions are left out.
    """

    def __init__(self, captions: Mapping[str, Sequence[str]]) -> None:
        # Some captions contain or end with a line break.
        texts = {
            name: "\n".join(filter(None, (" ".join(caption.split()) for caption in captions[name])))
            for name in sorted(captions)
        }
        encoded = [text.encode() for text in texts.values() if text]
        self.names = np.array([name for name, text in texts.items() if text], dtype=np.str_)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def of(self, name: str) -> bytes:
        """Return the captions of an image, one per line; empty if there are none."""
        position = int(np.searchsorted(self.names, name))
        if position == len(self.names) or self.names[position] != name:
            return b""
        return self._text[int(self._ends[position - 1]) if position else 0 : int(self._ends[position])]
