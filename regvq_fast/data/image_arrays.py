"""Images in one .npz file, the format of evaluation suites: ``arr_0``, (N, H, W, 3) uint8."""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.reading import is_of_the_machine, why_unreadable
from regvq_fast.data.samples import Sample
from regvq_fast.files import atomic_path

KEY = "arr_0"
"""Name of the images in the file: numpy.savez's name for an unnamed array."""
_UNSUSPECTED = 2**28
_MOST_PACKED = 100
"""An .npz file may unpack to this many times its size, more than tokens and images do, or to 256 MiB."""
_LOCAL_HEADER = 30  # bytes before the names of a member


class ImageArray(Dataset[Sample]):
    """Images of an .npz file, memory-mapped; compressed ones are loaded into memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npz file, or without at least one image in ``arr_0``.
    """

    split = "samples"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = _mapped(path)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(image=torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1))

    def __reduce__(self) -> tuple[type["ImageArray"], tuple[Path]]:  # a worker opens the file instead of copying it
        return ImageArray, (self.path,)


def open_npz(path: Path) -> Any:
    """Return the arrays of an .npz file by name, read on access.

    Raises:
        FileNotFoundError: no such file. ValueError: not an .npz file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        found = np.load(path)
    except Exception as error:  # a damaged file can make the reader raise anything
        if is_of_the_machine(error):
            raise
        raise ValueError(f"{path} is not an .npz file, or not a whole one") from None
    archive = getattr(found, "zip", None)
    if archive is None:
        raise ValueError(f"{path} is one array, not an .npz file: write it with numpy.savez")
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_UNSUSPECTED, _MOST_PACKED * path.stat().st_size):
        found.close()
        raise ValueError(f"{path} would unpack to {unpacked:,} bytes, over {_MOST_PACKED} times its size: make it anew")
    return found


def _mapped(path: Path) -> np.ndarray:
    """Return the images of a file, memory-mapped unless they are compressed."""
    try:
        return _images(path)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make the reader raise anything
        if is_of_the_machine(error):
            raise
        raise ValueError(f"{path} is damaged, or no file of images: {why_unreadable(error)}") from None


def _images(path: Path) -> np.ndarray:
    with open_npz(path) as arrays:
        if KEY not in arrays:
            raise ValueError(f"{path} has {', '.join(arrays) or 'no arrays'}, but no images in {KEY}")
        member = arrays.zip.getinfo(f"{KEY}.npy")
        with arrays.zip.open(member) as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            offset = file.tell()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or not shape[0]:
            raise ValueError(f"{KEY} of {path} is {shape} {dtype}: images are (N, height, width, 3) uint8, N >= 1")
        if fortran or member.compress_type != zipfile.ZIP_STORED:
            return arrays[KEY]
    with path.open("rb") as file:
        file.seek(member.header_offset)
        names = struct.unpack("<HH", file.read(_LOCAL_HEADER)[-4:])
    start = member.header_offset + _LOCAL_HEADER + sum(names) + offset
    return np.memmap(path, np.uint8, "r", start, shape)


class ImageWriter(Protocol):
    """Writes images (B, 3, H, W) uint8, in any number of calls."""

    def __call__(self, images: Tensor) -> None: ...


@contextmanager
def image_array_writer(path: Path, count: int, image_size: tuple[int, int]) -> Iterator[ImageWriter]:
    """Write ``count`` images of height and width ``image_size`` to an .npz file, batch by batch.

    The file appears atomically, after the body has written all images.
    """
    shape = count, *image_size, 3
    header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open(f"{KEY}.npy", "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        written = 0

        def write(images: Tensor) -> None:
            nonlocal written
            written += len(images)
            file.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)

        yield write
        if written != count:
            raise ValueError(f"{written} images were written to {path}, which was to have {count}")
