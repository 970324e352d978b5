"""Files made byte by byte, and damage done to them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

MARKER = "EXECUTED"
"""File that code hidden in a hostile file makes where it is run."""

DAMAGES = (
    "flip1 flip1 flip8 flip64 cut cut head zero garbage swap empty noise foreign append repeat ff delete".split()
)
_FOREIGN = [
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"GIF89a", b"PK\x03\x04", b"II*\0", b"\x93NUMPY\x01\0",
    b"MATLAB 5.0 MAT-file", b"<?xml version='1.0'?>", b"\x80\x02}q\0", b"%PDF-1.4\n", b"<html>", b"\x1f\x8b\x08",
]  # fmt: skip


class Evil:
    """Runs a harmless command where it is unpickled."""

    def __init__(self, function: Callable[..., Any] = os.system, *arguments: Any):
        self.call = (function, arguments or (f"touch {MARKER}",))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and a damaged copy of a file."""
    out, n = bytearray(data), len(data)
    kind = rng.choice(DAMAGES)
    if kind.startswith("flip"):
        for _ in range(int(kind[4:])):
            out[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del out[rng.randrange(n) :]
    elif kind == "head":
        del out[rng.choice([16, 64, 200, n // 2]) :]
    elif kind in ("zero", "garbage", "ff", "delete"):
        size = rng.choice([4, 16, 100, max(1, n // 8)])
        at = rng.randrange(max(1, n - size))
        fill = {"zero": bytes(size), "ff": b"\xff" * size, "garbage": rng.randbytes(size), "delete": b""}[kind]
        out[at : at + size] = fill
    elif kind == "swap":
        size = max(1, min(64, n // 4))
        a, b = rng.randrange(max(1, n - size)), rng.randrange(max(1, n - size))
        out[a : a + size], out[b : b + size] = out[b : b + size], out[a : a + size]
    elif kind == "empty":
        out.clear()
    elif kind == "noise":
        out = bytearray(rng.randbytes(n))
    elif kind == "foreign":
        head = rng.choice(_FOREIGN)
        out[: len(head)] = head
    elif kind == "append":
        out = out + rng.randbytes(rng.choice([1, 100, 5000]))
    elif kind == "repeat":
        out = out + out
    return kind, bytes(out)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """A copy with other bytes from a place on."""
    return data[:at] + new + data[at + len(new) :]


def flipped(data: bytes, at: int, mask: int = 0x10) -> bytes:
    """A copy with bits of one byte turned."""
    return patched(data, at, bytes([data[at] ^ mask]))


def later(make: Callable[[], bytes]) -> Callable[[Path], None]:
    """A large file that is only made when it is needed."""

    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(make())

    return write


def linked(target: str) -> Callable[[Path], None]:
    """A link in place of the file; ``.``: to itself."""

    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(path.name if target == "." else target)

    return write


def pipe(path: Path) -> None:
    """A named pipe in place of the file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path: Path) -> None:
    """A folder in place of the file."""
    path.unlink(missing_ok=True)
    path.mkdir()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of Pillow's format ``kind``."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG whose header says what is given; ``extra``: chunks before the pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels + png_chunk(b"IEND", b"")


def _is_damaged(data: bytes) -> bool:
    """Whether a PNG's own checksums say so."""
    at, pixels = 8, b""
    try:
        while at < len(data):
            (size,) = struct.unpack_from(">I", data, at)
            kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
            if struct.unpack_from(">I", data, at + 8 + size)[0] != zlib.crc32(kind + body):
                return True
            pixels += body if kind == b"IDAT" else b""
            at += 12 + size
            if kind == b"IEND":
                zlib.decompress(pixels)
                return False
    except (struct.error, zlib.error):
        pass
    return True


def other_pixels(path: Path, original: bytes) -> str:
    """What is wrong where a PNG was taken: damaged by its own checksums, and of other pixels than the original."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or not _is_damaged(data):
        return ""
    with Image.open(io.BytesIO(data)) as a, Image.open(io.BytesIO(original)) as b:
        first, second = np.array(a), np.array(b)
    if first.shape != second.shape or (first != second).any():
        return "the PNG's checksums say that it is damaged, its pixels are others, and it was taken"
    return ""


def npz(**arrays: Any) -> bytes:
    """A compressed archive of arrays."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def npz_of(**members: bytes) -> bytes:
    """An archive with these bytes as its members NAME.npy (two underscores: a slash)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/") + ".npy", data)
    return out.getvalue()


def npy(value: Any) -> bytes:
    """An array, or anything else pickled, as .npy."""
    out = io.BytesIO()
    np.save(out, value, allow_pickle=True)
    return out.getvalue()


def npy_header(text: bytes) -> bytes:
    """The start of a .npy file that says what is given."""
    text += b" " * (118 - len(text) - 1) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text


def npy_of_pickle(body: bytes) -> bytes:
    """A .npy file of one object whose pickle is given."""
    return npy_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (), }") + body


HUGE_NPY = npy_header(b"{'descr': '<f2', 'fortran_order': False, 'shape': (3, 1000000, 1000000), }") + bytes(64)
"""An array that claims 6 TB."""
CODE_IN_HEADER = (
    npy_header(b"{'descr': __import__('os').system('touch " + MARKER.encode() + b"'), 'shape': (), }") + bytes(8)
)


def saved(value: Any, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def pickled_code(*call: Any) -> bytes:
    """A pickle that calls a function; by default it makes the marker."""
    return pickle.dumps(Evil(*call))


HOSTILE_VALUES = [
    None, -1, 0, 1e308, float("nan"), float("inf"), "x", "", [], {}, 10**30, 10**400, True, [[[]]], {"a": 1}, "\u0000",
    "../../x", 1.5, -(2**63), [1, "a"],
]  # fmt: skip


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values of a JSON document (of lists: the first three)."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from json_paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from json_paths(value[index], (*path, index))


def json_with(document: Any, path: tuple[Any, ...], new: Any) -> bytes:
    """The document with another value at a path; "DELETE": without it."""
    if not path:
        return json.dumps(new).encode()
    document = json.loads(json.dumps(document))
    at = document
    for key in path[:-1]:
        at = at[key]
    if new == "DELETE":
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return json.dumps(document).encode()
