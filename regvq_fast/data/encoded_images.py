"""Files with the token maps of images, and the hash of their tokenizer.

An ``.npz`` file for NumPy, without pickles:

    names                 (K,) str: of the image files, or their paths in the encoded folder
    tokens                (T,) uint16 or int32: the maps of all images in row-major order, one after the other
    shapes                (K, 2) int32: h and w of each map
    sizes                 (K, 2) int32: H and W of each image before padding
    tokenizer             () str: SHA-256 of its weights (:func:`regvq_fast.models.weights.weights_hash`)
    num_codes             () int64: N
    downsampling_factor   () int64: pixels per token along each side
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from regvq_fast.data.image_arrays import open_npz
from regvq_fast.files import atomic_path

_ARRAYS = ("names", "tokens", "shapes", "sizes", "tokenizer", "num_codes", "downsampling_factor")


@dataclass(frozen=True)
class EncodedImages:
    """Tokens of images.

    Raises:
        ValueError: tokens, sizes and names don't match, or tokens are out of range.
    """

    names: Sequence[str]
    """Names of the image files, or their paths in the encoded folder."""
    tokens: Sequence[Tensor]
    """(h, w) int64 in [0, num_codes), for each image."""
    sizes: Sequence[tuple[int, int]]
    """H and W of each image, before it was padded to a multiple of the down-sampling factor."""
    tokenizer: str
    """SHA-256 of the tokenizer's weights."""
    num_codes: int
    """N."""
    downsampling_factor: int
    """Pixels per token along each side."""

    def __post_init__(self) -> None:
        counts = {len(self.names), len(self.tokens), len(self.sizes)}
        if len(counts) > 1 or counts == {0}:
            raise ValueError(f"{len(self.names)} names, {len(self.tokens)} token maps and {len(self.sizes)} sizes")
        for name, tokens, size in zip(self.names, self.tokens, self.sizes, strict=True):
            wanted = tuple(-(-side // self.downsampling_factor) for side in size)
            if tuple(tokens.shape) != wanted or not tokens.numel():
                raise ValueError(
                    f"{name} has {tuple(tokens.shape)} tokens, an image of {size[0]} x {size[1]} has {wanted}"
                )
            smallest, largest = (int(extreme) for extreme in tokens.aminmax())
            if smallest < 0 or largest >= self.num_codes:
                raise ValueError(
                    f"tokens must lie in [0, {self.num_codes}), those of {name} go from {smallest} to {largest}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file for :meth:`load` atomically; its name must end in ``.npz``."""
        flat = torch.cat([tokens.flatten() for tokens in self.tokens]).numpy()
        with atomic_path(path) as temporary:
            np.savez_compressed(
                temporary,
                names=np.array(self.names),
                tokens=flat.astype(np.uint16 if self.num_codes <= 2**16 else np.int32),
                shapes=np.array([tokens.shape for tokens in self.tokens], dtype=np.int32),
                sizes=np.array(self.sizes, dtype=np.int32),
                tokenizer=np.array(self.tokenizer),
                num_codes=np.array(self.num_codes),
                downsampling_factor=np.array(self.downsampling_factor),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of tokens, or damaged; the message names it.
        """
        path = Path(path)
        try:
            with open_npz(path) as file:
                arrays = {name: file[name] for name in _ARRAYS}
            named = arrays["names"].dtype.kind == "U" and all(arrays["names"].tolist())
            if not named or arrays["tokens"].dtype.kind not in "iu":
                raise ValueError("its names are no texts, or its tokens no whole numbers")
            lengths = arrays["shapes"].prod(axis=1, dtype=np.int64)
            flat = torch.from_numpy(arrays["tokens"].astype(np.int64))
            return cls(
                names=arrays["names"].tolist(),
                tokens=[
                    tokens.view(*shape)
                    for tokens, shape in zip(flat.split(lengths.tolist()), arrays["shapes"].tolist(), strict=True)
                ],
                sizes=[(height, width) for height, width in arrays["sizes"].tolist()],
                tokenizer=str(arrays["tokenizer"]),
                num_codes=int(arrays["num_codes"]),
                downsampling_factor=int(arrays["downsampling_factor"]),
            )
        except FileNotFoundError:
            raise
        except KeyError as error:
            raise ValueError(f"{path} is not a file of regvq encode: {error.args[0]}") from None
        except Exception as error:  # a damaged file can make the reader raise anything, also MemoryError
            raise ValueError(f"{path} is damaged, or not a file of regvq encode: {error}") from None
