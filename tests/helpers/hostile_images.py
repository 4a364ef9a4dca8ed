"""Files that an upload may be: odd but valid images, and what only looks like one."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the file of an image."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """An image of three different channels."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2)
    return Image.fromarray(pixels.astype(np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size in its header, and holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(3 * 64)))
        + chunk(b"IEND", b"")
    )


def many_scans(scans: int, side: int = 7000) -> bytes:
    """A progressive JPEG whose last, empty scan comes again and again: 270 bytes that cost a pass over the image."""
    flat = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = flat.rindex(b"\xff\xda")
    return flat[:last] + flat[last:-2] * scans + b"\xff\xd9"


def valid_oddities() -> dict[str, bytes]:
    """Images that have to be read."""
    plain = gradient()
    palette = plain.convert("P")
    frames = [plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "16bit.png": encoded(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)),
        "16bit.tiff": encoded(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60), "TIFF"),
        "cmyk.jpg": encoded(plain.convert("CMYK"), "JPEG"),
        "transparent-palette.png": encoded(palette, transparency=0),
        "alpha.png": encoded(plain.convert("RGBA")),
        "bilevel.png": encoded(plain.convert("1")),
        "one-pixel.png": encoded(gradient(1, 1)),
        "long.png": encoded(gradient(3000, 2)),
        "rotated.jpg": encoded(plain, "JPEG", exif=rotated),
        "wrong-name.txt": encoded(plain),
    }


def refused() -> dict[str, tuple[bytes, str]]:
    """Files that can't be read, and a word of the reason."""
    png, jpeg = encoded(gradient(200, 200)), encoded(gradient(200, 200), "JPEG")
    return {
        "empty.png": (b"", "empty"),
        "text.png": (b"This is no image.\n" * 100, "not a PNG"),
        "page.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a PNG"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n", "not a PNG"),
        "truncated.png": (png[: len(png) // 2], "damaged"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "header-only.png": (png[:33], "not a PNG"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "damaged"),
        "bomb.png": (png_of_size(20_000, 20_000), "million pixels"),
        "larger-bomb.png": (png_of_size(2**31 - 1, 2**31 - 1), "million pixels"),
    }
