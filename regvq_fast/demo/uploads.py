"""Uploaded images, which are untrusted: read within limits, or refused with one sentence."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from regvq_fast.data.image_files import OVERSAMPLING
from regvq_fast.data.reading import is_of_the_machine, why_unreadable
from regvq_fast.data.transforms import center_box, crop_rgb, image_to_tensor, upright_size

MAX_BYTES = 10 * 2**20
"""Largest file in bytes."""
MAX_PIXELS = 50_000_000
"""Largest image in pixels: 150 MB of RGB."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats, by Pillow's names. Other decoders run external programs, or are rarely maintained."""

_LIMIT = f"{MAX_PIXELS // 10**6} million pixels"


class Square(NamedTuple):
    """The central square of an image."""

    pixels: Tensor
    """(3, S, S) uint8."""
    width: int
    """Pixels of the whole image, upright."""
    height: int


def read_square(file: Path | bytes, size: int) -> Square:
    """Return the central square of an image, resized to ``size`` pixels a side.

    The format is detected from the content, not from the name. The size is checked before any pixel is decoded. Of
    several frames the first is used.

    Args:
        file: path or content.
        size: S.

    Raises:
        ValueError: not an image, damaged, or over the limits; the message is one sentence without a path.
        OSError: the disk fails.
    """
    length = len(file) if isinstance(file, bytes) else file.stat().st_size
    if length == 0:
        raise ValueError("The file is empty: choose another one.")
    if length > MAX_BYTES:
        raise ValueError(f"The file has {length / 2**20:.1f} MiB, the limit is {MAX_BYTES // 2**20}: make it smaller.")
    content = file if isinstance(file, bytes) else file.read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            width, height = upright_size(image)
            square = crop_rgb(image, center_box(width, height), size, size, OVERSAMPLING["val"])
    except Image.UnidentifiedImageError:
        raise ValueError("The file is no PNG, JPEG, WebP, GIF, BMP or TIFF image: choose another one.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"The image has more than {_LIMIT}, which is the limit: make it smaller.") from None
    except Exception as error:  # Pillow's decoders raise far more than OSError on damaged files
        if is_of_the_machine(error):
            raise
        raise ValueError(f"The image is damaged: {why_unreadable(error)}.") from None
    return Square(image_to_tensor(square), width, height)
