"""Mutations of valid files: a function of a random number generator alone."""

import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO

from helpers.hostile_images import png_of_size

_INTEGERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = [
    *(
        b"0 1 -1 2 255 256 65536 2147483648 9223372036854775808 1e999 -1e999 NaN Infinity 0.5 null true [] {} [[]] "
        b'"" "x" "1" "../x" "\\ud800" "\\u0000"'
    ).split(),
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'"' + b"x" * 100_000 + b'"',
]
_VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:e-?\d+)?|"(?:[^"\\]|\\.)*"(?!\s*:)|true|false|null|\[[^\[\]{}]*\]', re.ASCII)
_ODD = (
    b"\xff",
    b"\x00",
    b"\xc3",
    b"\xe2\x80\xa8",
    b"\x1c",
    b"\xc2\xa0",
    b"\r",
    b"\n",
    b"\xef\xbb\xbf",
    b"..",
    b"/",
    b",",
)
_TEXT = (".json", ".jsonl", ".txt", ".csv", ".yaml", ".cls")


def mutate(name: str, data: bytes, others: Sequence[bytes], rng: random.Random) -> tuple[str, bytes]:
    """Return the name of a mutation, and a mutated copy of the file ``name``."""
    kinds: dict[str, Callable[[], bytes]] = {
        "bits": lambda: _overwritten(
            data, rng, lambda old: bytes([old[0] ^ 1 << rng.randrange(8)]), rng.choice((1, 1, 8))
        ),
        "bytes": lambda: _overwritten(data, rng, lambda old: rng.randbytes(rng.choice((1, 4, 16))), rng.choice((1, 4))),
        "extreme": lambda: _overwritten(data, rng, lambda old: _integer(rng), rng.choice((1, 1, 3))),
        "truncated": lambda: data[: rng.randrange(len(data) + 1)],
        "twice": lambda: _spliced(data, rng, repeats=rng.choice((2, 2, 50))),
        "removed": lambda: _spliced(data, rng, repeats=0),
        "inserted": lambda: _inserted(data, rng, rng.choice((bytes(512), rng.randbytes(64), *_ODD))),
        "swapped": lambda: rng.choice(others),
        "empty": lambda: b"",
        "repeated": lambda: data * rng.choice((2, 20)),
        "giant header": lambda: struct.pack("<Q", rng.choice(_INTEGERS)) + data[8:],
        "bomb": lambda: _bomb(name, rng),
    }
    if name.endswith(_TEXT):
        for kind in ("value 1", "value 2", "value 3", "value 4", "value 5", "value 6"):
            kinds[kind] = lambda: _other_values(data, rng)
        kinds["lines"] = lambda: _other_lines(data, rng)
    if name.endswith(".safetensors"):
        for kind in ("entry 1", "entry 2", "entry 3", "entry 4"):
            kinds[kind] = lambda: _other_header(data, rng)
    if name.endswith((".npz", ".ckpt")):
        for kind in ("member 1", "member 2", "member 3", "member 4", "member 5", "member 6"):
            kinds[kind] = lambda: _other_member(data, rng)
    if name.endswith(".tar"):
        for kind in ("field 1", "field 2", "field 3", "field 4", "field 5"):
            kinds[kind] = lambda: _other_tar_field(data, rng)
    kind = rng.choice(list(kinds))
    return kind.rstrip(" 123456"), kinds[kind]()


def _integer(rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    return (rng.choice(_INTEGERS) % 256**size).to_bytes(size, rng.choice(("little", "big")))


def _overwritten(data: bytes, rng: random.Random, new: Callable[[bytes], bytes], times: int) -> bytes:
    changed = bytearray(data)
    for _ in range(times if data else 0):
        start = rng.randrange(rng.choice((len(data), min(len(data), 600))))  # headers more often
        content = new(bytes(changed[start : start + 1]))
        changed[start : start + len(content)] = content
    return bytes(changed)


def _spliced(data: bytes, rng: random.Random, repeats: int) -> bytes:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if rng.random() < 0.5:
        stop = min(stop, start + rng.choice((1, 4, 16, 512)))
    return data[:start] + data[start:stop] * repeats + data[stop:]


def _inserted(data: bytes, rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + content + data[start:]


def _other_values(data: bytes, rng: random.Random) -> bytes:
    found = list(_VALUE.finditer(data))
    if not found:
        return data + rng.choice(_VALUES)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(_VALUES) + data[match.end() :]


def _other_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    k = rng.randrange(len(lines))
    choices = (
        [],
        [lines[k]] * 2,
        [rng.choice(_ODD) + b"\n"],
        [lines[k].rstrip() + rng.choice(_ODD) + b"\n"],
        lines[:k],
    )
    return b"".join([*lines[:k], *rng.choice(choices), *lines[k + 1 :]])


def _other_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = _other_values(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _other_tar_field(data: bytes, rng: random.Random) -> bytes:
    """Change a field of a header of a tar file, and make its checksum right again."""
    headers = [k for k in range(0, len(data), 512) if data[k + 257 : k + 262] == b"ustar"]
    if not headers:
        return data
    start = rng.choice(headers)
    header = bytearray(data[start : start + 512])
    offset, size = rng.choice(((0, 100), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (345, 155), (257, 8)))
    if size == 1:
        header[offset] = rng.choice(b"0123456789LKSxgXDMNV\0")
    elif size == 12:
        base_256 = bytes([rng.choice((0x80, 0xFF))]) + bytes(3) + struct.pack(">Q", rng.choice(_INTEGERS))
        header[offset : offset + 12] = rng.choice((base_256, b"%011o\0" % rng.randrange(2**33), b"-0000000512\0"))
    else:
        header[offset : offset + size] = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size)))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def _bomb(name: str, rng: random.Random) -> bytes:
    """A small file that claims to be a large one, or nests deeply."""
    if name.endswith(".tar"):
        kind = rng.choice((tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE))
        member = tarfile.TarInfo("x")
        member.type = kind
        return member.tobuf(tarfile.GNU_FORMAT) * 5000
    if name.endswith((".npz", ".npy")):
        return _npz_bomb()
    if name.endswith(_TEXT):
        return rng.choice((b"[" * 200_000, b'{"a":' * 200_000, b"1" * 1_000_000, b"\n" * 200_000, _yaml_bomb()))
    if name.endswith(".safetensors"):
        header = json.dumps({"tokens": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
        return struct.pack("<Q", len(header)) + rng.choice((header, b"[" * len(header)))
    side = rng.choice((13_000, 20_000, 2**31 - 1))
    return png_of_size(side, side)


def _yaml_bomb() -> bytes:
    """Nine levels of nine references each."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):
        values = ", ".join(f"k{k}: *a{level - 1}" for k in range(9))
        lines.append(f"a{level}: &a{level} {{{values}}}")
    return "\n".join(lines).encode()


@cache
def _npz_bomb() -> bytes:
    """An .npz file of 4 MiB whose every array is 512 MiB of zeros."""
    described = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**29},), }}".ljust(117)
    header = b"\x93NUMPY\x01\x00v\x00" + described.encode() + b"\n"
    squeeze = zlib.compressobj(9, wbits=-15)
    content = squeeze.compress(header)
    crc = zlib.crc32(header)
    zeros = bytes(2**20)
    for _ in range(2**9):
        content += squeeze.compress(zeros)
        crc = zlib.crc32(zeros, crc)
    content += squeeze.flush()
    parts, directory = [], []
    names = "tokens names shapes sizes tokenizer num_codes downsampling_factor arr_0".split()
    offset, size = 0, len(header) + 2**29
    for name in names:
        file = f"{name}.npy".encode()
        common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, crc, len(content), size, len(file), 0)
        parts.append(b"PK\x03\x04" + common + file + content)
        directory.append(
            b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, offset) + file
        )
        offset += len(parts[-1])
    listed = b"".join(directory)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(names), len(names), len(listed), offset, 0)
    return b"".join(parts) + listed + end


def _other_member(data: bytes, rng: random.Random) -> bytes:
    """Change one member of a zip file, whose checksums stay right."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except zipfile.BadZipFile:
        return data
    name = rng.choice(list(members))
    content = members[name]
    choices = (
        lambda: _overwritten(content, rng, lambda old: _integer(rng), 1),
        lambda: _overwritten(content, rng, lambda old: rng.randbytes(1), 1),
        lambda: _other_values(content[:200], rng) + content[200:],
        lambda: content[: rng.randrange(len(content) + 1)],
        lambda: rng.choice(list(members.values())),
    )
    members[name] = rng.choice(choices)()
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()
